"""Files to rows. A text row is {"text", "book", "chapter", "title", "source"}; a conversation row is
{"id", "messages": [{"role", "content"}], "source"}. Every error names file, row and field."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dataset.decode import decode_text, read_bytes
from dataset.instructions import PAPERS_TASK, Instructions, load_instructions
from dataset.records import Record, load_json, load_record, read_records
from dataset.row_fields import (
    ABSENT,
    REFUSED_IN_MESSAGES,
    REFUSED_IN_ROWS,
    SPECIAL_FIELDS,
    THOUGHTS,
    merge_calls,
    read_call_text,
    read_calls,
    read_thought,
    read_tools,
    read_weight,
    refuse_fields,
)
from dataset.sources import RowSource, text_error
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pipeline_name, python_module
from novelgpt.text.messages import (
    EMPTY_CONTENT,
    THOUGHT,
    Message,
    begins_with_thought,
    full_answer,
    is_empty_answer,
    map_texts,
)

# Where no other is named.
TEXT_COLUMN = "text"
TITLE_TO_ABSTRACT = "请根据下面的论文标题，写出这篇论文的摘要。\n标题：{title}"
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "tool": "tool",
    "tool_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")
# (field, key of the role, key of the content) of rows that are one list of messages.
_LISTS = (("messages", "role", "content"), ("conversations", "from", "value"))
_PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("query", "response"))
# Fields of messages that templates may read as they are.
_KEPT = ("name", "tool_call_id")


class SourceRow(NamedTuple):
    """A row of a file whose messages `read_conversation` makes.

    Attributes:
        id: the row's own, or one made of the file's name and the row's number.
        fields: of the row; line ends inside texts are "\\n".
        source: file and row, as errors name them.
    """

    id: str
    fields: Record
    source: str


class _Conversation(TypedDict):
    id: str
    messages: list[Message]
    source: str


class Conversation(_Conversation, total=False):
    """A conversation row; where the row says more than its messages, "tools" (as chat templates take them) and
    "enable_thinking"."""

    tools: list[Record]
    enable_thinking: bool


def read_text_rows(path: Path, text_column: str = TEXT_COLUMN) -> Iterator[Record]:
    """Text rows of a .txt (the whole file is one row), .jsonl, .json, .csv or .parquet file.

    Args:
        path: of the file.
        text_column: field of the text; of several, separated by commas, the texts are joined by line ends.

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid JSON, a row without `text_column`.
    """
    if path.suffix.lower() == ".txt":
        yield {"text": decode_text(read_bytes(path), str(path)), "book": path.stem, "chapter": "", "title": "",
               "source": str(path)}  # fmt: skip
        return
    for where, record in read_records(path):
        texts = []
        for field in text_fields(record, text_column):
            text = record.get(field)
            if not isinstance(text, str):
                raise UserError(
                    f"{where}: no text in field {field!r} (the row has: {', '.join(map(str, record)) or 'nothing'})",
                    "name the field that holds the text with --text_column; conversations are for fine-tuning: "
                    f"{pipeline_name('finetune')} or {pipeline_name('finetune_lora')}",
                )
            texts.append(_with_line_feeds(text))
        extra = {key: str(record.get(key) or "") for key in ("book", "chapter", "title")}
        yield {"text": "\n".join(texts), **extra, "source": where}


def text_fields(record: Mapping[str, Any], text_column: str) -> list[str]:
    """The fields that hold a row's text: a field of that name, or else those between its commas."""
    return [text_column] if text_column in record else text_column.split(",")


def read_conversation_rows(path: Path, instructions: Instructions | None = None) -> Iterator[Conversation]:
    """Conversation rows of a .jsonl, .json, .csv or .parquet file whose rows have any accepted shape.

    Args:
        path: of the file.
        instructions: as for `read_conversation`.

    Raises:
        UserError: what `read_source_rows` and `read_conversation` raise.
    """
    for row in read_source_rows(path):
        yield read_conversation(row, instructions)


def read_source_rows(path: Path) -> Iterator[SourceRow]:
    """The rows of a .jsonl, .json, .csv or .parquet file, before any of them is read as a conversation.

    Raises:
        UserError: what `read_records` raises, or a file or folder of text, which is for pretraining.
    """
    if path.suffix.lower() == ".txt" or path.is_dir():
        raise text_error(path)
    for number, (where, record) in enumerate(read_records(path)):
        yield make_source_row(record, where, f"{path.stem}-{number}")


def read_sourced_rows(source: RowSource) -> Iterator[SourceRow]:
    """The rows of a source under the names that are read here, before any of them is read as a conversation.

    Raises:
        UserError: what `RowSource.rows`, `load_record` and `RowSource.record` raise.
    """
    for file, rows in itertools.groupby(source.rows(), key=attrgetter("file")):
        path = source.files[file]
        for number, row in enumerate(rows):
            where = f"{path}{row.place}"
            record = source.record(load_record(row.text, where), where)
            yield make_source_row(record, where, f"{Path(path).stem}-{number}")


def make_source_row(record: Record, where: str, name: str) -> SourceRow:
    """The row that a record holds.

    Args:
        record: of the row, as its file has it.
        where: file and row, for errors.
        name: the id, if the record holds none.
    """
    values: list[Any] = [record]  # yet to be looked into; no recursion, as rows may nest deeply
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, str) and "\r" in value:
            record = map_texts(record, _with_line_feeds)
            break
    return SourceRow(name if record.get("id") in ABSENT else str(record["id"]), record, where)


def read_conversation(row: SourceRow, instructions: Instructions | None = None) -> Conversation:
    """The messages of a row, and what else it says.

    The weight of an answer is the product of its own and the row's; answers that say nothing have weight 0.

    Args:
        row: in any accepted shape.
        instructions: wordings of rows that name a task; by default, the first of the built-in ones.

    Raises:
        UserError: what `messages_of` raises, or a field that changes training and is not obeyed.
    """
    where = row.source
    special = {name: row.fields[name] for name in SPECIAL_FIELDS.intersection(row.fields)}
    if special:
        for name in _fields_of_task(row.fields, where, instructions):  # texts like any other
            special.pop(name, None)
        refuse_fields(special, REFUSED_IN_ROWS, f"{where}: field ")
    messages = messages_of(row.fields, where, instructions)
    weight = read_weight(special, where) if special else None
    factor = 1.0 if weight is None else weight[1]
    for message in messages:
        is_empty = EMPTY_CONTENT.fullmatch(message["content"]) is not None and is_empty_answer(message)
        if message["role"] == "assistant" and (factor != 1 or is_empty):
            message["weight"] = 0.0 if is_empty else message.get("weight", 1.0) * factor
    conversation: Conversation = {"id": row.id, "messages": messages, "source": where}
    tools = read_tools(special, where) if special else []
    if tools:
        conversation["tools"] = tools
    if special.get("enable_thinking") not in ABSENT:
        conversation["enable_thinking"] = _checked_thinking(special["enable_thinking"], messages, where)
    return conversation


def messages_of(record: Record, where: str, instructions: Instructions | None = None) -> list[Message]:
    """Messages of a row in Alpaca, ShareGPT, OpenAI, prompt/completion, task or title/abstract shape.

    The last answer, where there is one, comes last: in every shape the answers are the messages of role "assistant".
    Rows that name a task are worded by `instructions` (by default, by the first of the built-in wordings);
    title/abstract rows that name none have one wording, unless `instructions` word them, too.

    Raises:
        UserError: no shape fits, a field is not a text, or a role or a task is unknown.
    """
    shape = next((shape for shape in _LISTS if shape[0] in record), None)
    pair = next((pair for pair in _PAIRS if pair[0] in record and pair[1] in record), None)
    if shape is not None:
        refuse_beside(record, ("history", *THOUGHTS), where, "beside a list of messages")
        messages = read_turns(record[shape[0]], *shape, where)
    elif pair is not None:
        messages = _read_history(record["history"], where) if record.get("history") else []
        for field, role in zip(pair, ("user", "assistant"), strict=True):
            value = record[field]
            if isinstance(value, list) and field not in ("instruction", "output"):
                if messages and field == pair[0]:
                    raise UserError(f"{where}: field history is beside a list of messages", f"put it into {field}")
                messages += read_turns(value, field, "role", "content", where)
                continue
            if not isinstance(value, str):
                raise _not_a_text(value, where, field)
            if field == "instruction" and record.get("input"):
                if not isinstance(record["input"], str):
                    raise _not_a_text(record["input"], where, "input")
                value = "\n".join(filter(None, (value, record["input"])))
            messages.append({"role": role, "content": value})
        if not record.keys().isdisjoint(THOUGHTS):
            thought = read_thought(record, where)
            if thought and messages[-1]["role"] == "assistant":
                messages[-1] = _with_thought(messages[-1], thought, where, pair[1])
    else:
        messages = _word_task(record, where, instructions)
    if record.get("system") or messages[0]["role"] == "system":
        task_fields = () if shape or pair else _fields_of_task(record, where, instructions)
        messages = messages if "system" in task_fields else _with_system(record, where, messages)
    return messages


def _fields_of_task(record: Record, where: str, instructions: Instructions | None) -> Collection[str]:
    """Fields that a row of a task, or of title and abstract, reads as texts, whatever they mean in other rows."""
    is_list = any(shape[0] in record for shape in _LISTS)
    if is_list or any(prompt in record and completion in record for prompt, completion in _PAIRS):
        return ()
    if record.get("task"):
        question, answer = (instructions or load_instructions()).fields(record["task"], where)
        return [*question, *answer]
    return ("title", "abstract")


def _word_task(record: Record, where: str, instructions: Instructions | None) -> list[Message]:
    """Messages of a row that names a task, or that has title and abstract."""
    fields = _fields_of_task(record, where, instructions)
    refuse_beside(record, {"history", *THOUGHTS}.difference(fields), where, "in a row of a task")
    if record.get("task"):
        return (instructions or load_instructions()).messages(record["task"], record, where)
    if "title" not in record or "abstract" not in record:
        raise UserError(
            f"{where}: the row has the fields {', '.join(map(str, record)) or 'none'}, which make no known shape",
            f"text is for pretraining: {pipeline_name('pretrain')}; {python_module('dataset conversations')} makes "
            "conversations of it"
            if isinstance(record.get("text"), str)
            else "use messages, conversations, instruction+output, prompt+completion, title+abstract or a task",
        )
    if instructions is not None and instructions.words_papers:
        return instructions.messages(PAPERS_TASK, record, where)
    for field in ("title", "abstract"):
        if not isinstance(record[field], str):
            raise _not_a_text(record[field], where, field)
    question = TITLE_TO_ABSTRACT.format(title=record["title"])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["abstract"]}]


def _read_history(history: Any, where: str) -> list[Message]:
    if isinstance(history, str):
        history = load_json(history, f"{where} field history")  # a column of a .csv
    if not isinstance(history, (list, tuple)):
        raise UserError(f"{where}: field history is not a list of pairs", 'write [["question", "answer"], …]')
    messages: list[Message] = []
    for number, turn in enumerate(history):
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UserError(f"{where}: field history[{number}] is not a pair of texts", 'write ["question", "answer"]')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _with_system(record: Record, where: str, messages: list[Message]) -> list[Message]:
    """The messages with at most one system message before them, whether a field or messages hold it."""
    given = record.get("system") or None
    if not isinstance(given, (str, type(None))):
        raise _not_a_text(given, where, "system")
    leading = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    systems = [*([given] if given else []), *(message["content"] for message in leading)]
    if any(text.strip() != systems[0].strip() for text in systems):
        raise UserError(
            f"{where}: {'field system and ' if given else ''}the first messages hold "
            f"{len(systems)} system messages that differ",
            "write one, with all that it is to say",
        )
    return [{"role": "system", "content": systems[0]}, *messages[len(leading) :]]


def read_turns(turns: Any, field: str, role_key: str, content_key: str, where: str) -> list[Message]:
    """Messages of a list of turns.

    Args:
        turns: the list, or its JSON text.
        field: its name.
        role_key: field of the role in each turn; `role` is read as well.
        content_key: field of the content; `content` is read as well.
        where: file and row, for errors.

    Raises:
        UserError: not a list of turns, an unknown role, or a field that is not read; names the field.
    """
    if isinstance(turns, str):
        turns = load_json(turns, f"{where} field {field}")  # a column of a .csv
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: field {field} is not a list of messages", f"write [{{{role_key!r}: …}}, …]")
    messages: list[Message] = []
    called = set()
    for number, turn in enumerate(turns):
        name = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where}: field {name} is not a message", f"write {{{role_key!r}: …, {content_key!r}: …}}")
        role = turn.get(role_key, turn.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{where}: field {name}.{role_key} is {role!r}", f"use one of {', '.join(_ROLES)}")
        key = content_key if content_key in turn else "content"
        if role not in _CALLS and turn.keys() <= {role_key, "role", key}:
            if not isinstance(turn.get(key), str):
                raise _not_a_text(turn.get(key), where, f"{name}.{key}")
            messages.append({"role": _ROLES[role], "content": turn[key]})
            continue
        messages.append(_read_special_turn(turn, role, key, where, name))
        if role in _CALLS:
            called.add(number)
    return merge_calls(messages, called) if called else messages


def _read_special_turn(turn: Record, role: str, key: str, where: str, name: str) -> Message:
    """A message of a turn that says more than its role and its content."""
    refuse_fields(turn, REFUSED_IN_MESSAGES, f"{where}: field {name}.")
    is_answer = _ROLES[role] == "assistant"
    calls = read_calls(turn, where, name)
    if calls and not is_answer:
        raise UserError(f"{where}: field {name} is a call of a tool by the role {role!r}", "let the assistant call")
    content = turn.get(key)
    if role in _CALLS and not calls:
        calls, content = read_call_text(content, where, f"{name}.{key}"), ""
    elif calls and content in ABSENT:
        content = ""
    elif not isinstance(content, str):
        raise _not_a_text(content, where, f"{name}.{key}")
    message: Message = {"role": _ROLES[role], "content": content}
    for field in _KEPT:
        if isinstance(turn.get(field), str):
            message[field] = turn[field]  # type: ignore[literal-required]
    if calls:
        message["tool_calls"] = calls
    weight = read_weight(turn, where, f"{name}.")
    if weight is not None and weight[1] and not is_answer:
        raise UserError(
            f"{where}: field {name}.{weight[0]} asks to train what the role {role!r} says, "
            "and only answers are trained",
            "leave it out, or set it to false",
        )
    if weight is not None and weight[1] != 1 and is_answer:
        message["weight"] = weight[1]
    thought = read_thought(turn, where, f"{name}.")
    if thought and not is_answer:
        raise UserError(f"{where}: field {name} holds a thought of the role {role!r}", "let the assistant think")
    return _with_thought(message, thought, where, f"{name}.{key}") if thought else message


def _with_thought(message: Message, thought: str, where: str, name: str) -> Message:
    if THOUGHT.fullmatch(message["content"]):
        raise UserError(
            f"{where}: field {name} starts with <think>, and {THOUGHTS[0]} holds a thought, too", "keep one of them"
        )
    return {**message, "reasoning_content": thought}


def _checked_thinking(value: Any, messages: list[Message], where: str) -> bool:
    """A row's switch for thoughts, which must say what its answers do: they decide what prompts leave room for."""
    thinking = {"true": True, "false": False}.get(str(value).strip().lower())
    if thinking is None:
        raise UserError(f"{where}: field enable_thinking is {value!r}", "write true or false, or leave it out")
    for message in messages:
        if message["role"] == "assistant" and begins_with_thought(full_answer(message)) != thinking:
            raise UserError(
                f"{where}: field enable_thinking is {value!r}, and the answer {message['content'][:20]!r} "
                f"{'has no thought' if thinking else 'starts with one'}",
                "leave it out: whether an answer thinks decides",
            )
    return thinking


def refuse_beside(record: Record, fields: Collection[str], where: str, place: str) -> None:
    """Refuse a row with one of `fields`, which are not read in such a `place`.

    Raises:
        UserError: names the first of them.
    """
    for field in sorted(fields):
        if record.get(field) not in ABSENT:
            raise UserError(
                f"{where}: field {field} is not read {place}", "put what it says into the messages, or leave it out"
            )


def _not_a_text(value: Any, where: str, name: str) -> UserError:
    cause = f"{where}: field {name} is {'missing' if value is None else 'not a text'}"
    return UserError(cause, "give it a text, or remove the row")


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
