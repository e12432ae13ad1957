"""Preference rows: two answers to one prompt, one of them preferred; all shapes of other tools to one.

    python -m dataset preferences rows.jsonl pairs.jsonl

writes them as TRL reads them, which LLaMA-Factory and ms-swift can map as well. No pipeline here trains on them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from dataset.readers import SourceRow, messages_of, read_source_rows, read_turns, refuse_beside
from dataset.records import Record
from dataset.row_fields import (
    ABSENT,
    FLAGS,
    PREFERENCE_FIELDS,
    REFUSED_IN_ROWS,
    THOUGHTS,
    WEIGHTS,
    read_tools,
    refuse_fields,
)
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.locks import make_and_lock, unlock
from novelgpt.settings.terminal import counted, say
from novelgpt.text.messages import Message, is_empty_answer

# Fields of the prompt that make a pair with an answer elsewhere, and the field of that answer.
_PROMPTS = {"prompt": "completion", "instruction": "output", "query": "response"}
_REJECTED = ("rejected", "rejected_response", "rejected_messages")


class _Preference(TypedDict):
    id: str
    messages: list[Message]
    chosen: Message
    rejected: Message
    source: str


class PreferenceRow(_Preference, total=False):
    """A prompt and two answers to it.

    Attributes:
        id: the row's own, or one made of the file's name and the row's number.
        messages: the prompt; the last one is not an answer.
        chosen: the answer that is preferred.
        rejected: the other one.
        source: file and row, as errors name them.
        tools: that the answers may call.
        margin: by how much the first answer is better, where the row says so.
    """

    tools: list[Record]
    margin: float


def is_preference(record: Record) -> bool:
    """Whether a row holds preferred or rejected answers; a row of a task may give such names to its texts."""
    return not record.get("task") and any(record.get(name) not in ABSENT for name in ("chosen", *_REJECTED))


def read_preference_rows(path: Path) -> Iterator[PreferenceRow]:
    """Preference rows of a .jsonl, .json, .csv or .parquet file.

    Raises:
        UserError: what `read_source_rows` and `read_preference` raise.
    """
    return map(read_preference, read_source_rows(path))


def read_preference(row: SourceRow) -> PreferenceRow:
    """The prompt and the two answers of a row.

    The answers are in `chosen` and `rejected`, each a text, a message, or a list of messages that may start with the
    prompt; the prompt is in the fields of conversation rows (TRL, LLaMA-Factory), or is what both lists begin with. Or
    the preferred answer ends the conversation, and `rejected_response` or `rejected_messages` holds the other
    (ms-swift).

    Raises:
        UserError: one answer or the prompt is missing, an answer is not one message, both are equal, or a field is not
            read here; names file, line and field.
    """
    where = row.source
    given = {name: value for name, value in row.fields.items() if value not in ABSENT}
    others = {name: value for name, value in given.items() if name not in PREFERENCE_FIELDS}
    refuse_fields(others, REFUSED_IN_ROWS, f"{where}: field ")
    refuse_beside(others, (*FLAGS, *WEIGHTS, *THOUGHTS, "enable_thinking"), where, "in a preference row")
    second = next((name for name in _REJECTED if name in given), None)
    if second is None:
        raise UserError(
            f"{where}: field rejected is missing: the row has a preferred answer and no other",
            "write both answers, or the preferred one as messages to fine-tune on it",
        )
    rejected = _read_answer(given[second], second, where)
    if "chosen" in given:
        first, chosen = "chosen", _read_answer(given["chosen"], "chosen", where)
        prompt = _read_prompt(others, chosen, rejected, where)
    else:
        first, conversation = "the conversation", messages_of(others, where)
        prompt, chosen = conversation[:-1], conversation[-1:]
    if not prompt or prompt[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the prompt of the row's two answers {'ends in an answer' if prompt else 'is missing'}",
            "write it as prompt, or let chosen and rejected be lists of messages that begin with it",
        )
    made: PreferenceRow = {
        "id": row.id,
        "messages": [_without_weight(message) for message in prompt],
        "chosen": _after_prompt(chosen, prompt, first, where),
        "rejected": _after_prompt(rejected, prompt, second, where),
        "source": where,
    }
    if is_empty_answer(made["chosen"]) or made["chosen"] == made["rejected"]:
        fault = "are the same answer" if made["chosen"] == made["rejected"] else "prefer an empty answer"
        raise UserError(f"{where}: fields {first} and {second} {fault}", "leave the row out")
    if tools := read_tools(others, where):
        made["tools"] = tools
    if "margin" in given:
        made["margin"] = _read_margin(given["margin"], where)
    return made


def as_trl(row: PreferenceRow) -> Record:
    """The row as TRL's DPOTrainer and RewardTrainer read it; `read_preference` makes the same row of it."""
    record: Record = {"id": row["id"], "prompt": row["messages"], "chosen": [row["chosen"]]}
    record["rejected"] = [row["rejected"]]
    return record | {name: row[name] for name in ("tools", "margin") if name in row}  # type: ignore[literal-required]


def _read_answer(value: Any, field: str, where: str) -> list[Message]:
    """An answer that is a text, a message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, dict) else value
    has_from = isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns)
    return read_turns(turns, field, *(("from", "value") if has_from else ("role", "content")), where)


def _read_prompt(record: Record, chosen: list[Message], rejected: list[Message], where: str) -> list[Message]:
    """The prompt of a row with two answers beside it; [] for none."""
    question = next((name for name in _PROMPTS if name in record), "instruction" if "input" in record else None)
    if question is not None:
        whole = {name: value for name, value in record.items() if name not in ("messages", "conversations")}
        return messages_of({**whole, question: record.get(question, ""), _PROMPTS[question]: ""}, where)[:-1]
    if "messages" in record or "conversations" in record:
        return messages_of(record, where)
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = [message for message, _ in pairs]
    return messages_of({**record, "messages": shared}, where) if shared else []


def _after_prompt(messages: list[Message], prompt: list[Message], field: str, where: str) -> Message:
    """The only message of an answer that follows the prompt, which the list may repeat, with its system message or
    without."""
    without_system = prompt[1:] if prompt[0]["role"] == "system" else prompt
    for start in (prompt, without_system):
        if start and messages[: len(start)] == start:
            messages = messages[len(start) :]
            break
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise UserError(
            f"{where}: field {field} is not one answer to the prompt: behind what the row's answers share, it holds "
            f"{roles}",
            "write one answer of the assistant; further turns are rows of their own",
        )
    if "weight" in messages[0]:
        raise UserError(
            f"{where}: field {field} weighs an answer in the loss, which is not read in a preference row",
            "leave the weight out; margin says by how much one answer is better",
        )
    return messages[0]


def _without_weight(message: Message) -> Message:
    """A message of a prompt, no part of which is trained, whatever it says."""
    return {name: value for name, value in message.items() if name != "weight"}  # type: ignore[return-value]


def _read_margin(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: field margin is not a number", "write by how much the first answer is better")
    return float(value)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the preference rows of files as TRL reads them."""
    parser = CommandParser(prog="python -m dataset preferences", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="files of preference rows, in any shape")
    parser.add_argument("output", type=Path, metavar="OUT", help="the same rows with prompt, chosen and rejected, "
                        "as .jsonl")  # fmt: skip
    args = parser.parse_args(argv)
    if args.output.suffix != ".jsonl":
        raise UserError(f"{args.output} does not end in .jsonl", "name the output last, ending in .jsonl")
    if any(path.exists() and path.resolve() == args.output.resolve() for path in args.inputs):
        raise UserError(f"{args.output} is read and written", "name another output")
    count = _write(args.inputs, args.output)
    say(f"{counted(count, 'preference row')} in {args.output}")


def _write(inputs: list[Path], output: Path) -> int:
    """Write all rows, under the file's name when it is complete; returns their number."""
    partial = output.with_name(f"{output.name}.partial")
    try:
        handle, _ = make_and_lock(output.absolute().parent, partial.name)
    except BlockingIOError as error:
        raise UserError(f"another run writes {output}", "wait for its end, or name another output") from error
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}", "name an output that can be written") from error
    count = 0
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in itertools.chain.from_iterable(map(read_preference_rows, inputs)):
                file.write(json.dumps(as_trl(row), ensure_ascii=False) + "\n")
                count += 1
        partial.replace(output)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}", "name an output that can be written") from error
    finally:
        partial.unlink(missing_ok=True)
        unlock(handle)
    return count
