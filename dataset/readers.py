"""Files to rows. A text row is {"text", "book", "chapter", "title", "source"}; a conversation row is
{"id", "messages": [{"role", "content"}], "source"}. Every error names file, row and field."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dataset.decode import decode_text, read_bytes
from dataset.instructions import PAPERS_TASK, Instructions, load_instructions
from novelgpt.settings.errors import UserError

Record = dict[str, Any]
Message = dict[str, str]

TITLE_TO_ABSTRACT = "请根据下面的论文标题，写出这篇论文的摘要。\n标题：{title}"
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


def read_text_rows(path: Path, text_column: str = "text") -> Iterator[Record]:
    """Text rows of a .txt (the whole file is one row), .jsonl, .json, .csv or .parquet file.

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid JSON, a row without `text_column`.
    """
    if path.suffix.lower() == ".txt":
        yield {"text": decode_text(read_bytes(path), str(path)), "book": path.stem, "chapter": "", "title": "",
               "source": str(path)}  # fmt: skip
        return
    for where, record in read_records(path):
        text = record.get(text_column)
        if not isinstance(text, str):
            raise UserError(
                f"{where}: no text in field {text_column!r} (the row has: {', '.join(map(str, record)) or 'nothing'})",
                "name the field that holds the text with --text_column",
            )
        extra = {key: str(record.get(key) or "") for key in ("book", "chapter", "title")}
        yield {"text": text.replace("\r\n", "\n"), **extra, "source": where}


def read_conversation_rows(path: Path, instructions: Instructions | None = None) -> Iterator[Record]:
    """Conversation rows of a .jsonl, .json, .csv or .parquet file whose rows are in any accepted shape.

    Args:
        path: of the file.
        instructions: puts rows that name a task into words; by default, into the first wording of that task.

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid JSON, a row of no known shape.
    """
    for row in read_unworded_rows(path):
        yield word_row(row, instructions)


def read_unworded_rows(path: Path) -> Iterator[Record]:
    """{"id", "record", "source"} of each row: conversation rows whose messages `word_row` makes."""
    for index, (where, record) in enumerate(read_records(path)):
        yield {"id": str(record.get("id", f"{path.stem}-{index}")), "record": record, "source": where}


def word_row(row: Record, instructions: Instructions | None = None) -> Record:
    """The conversation row of a row of `read_unworded_rows`."""
    messages = messages_of(row["record"], row["source"], instructions)
    return {"id": row["id"], "messages": messages, "source": row["source"]}


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line" or "file row N", mapping) of each row of a .jsonl, .json, .csv or .parquet file."""
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    if suffix not in readers:
        raise UserError(f"{path}: no reader for {suffix or 'files without a suffix'}",
                        f"convert it to one of {', '.join(readers)}")  # fmt: skip
    for where, record in readers[suffix](path):
        if not isinstance(record, dict):
            raise UserError(f"{where}: the row is a {type(record).__name__}, not a mapping of fields",
                            'write rows like {"field": "value"}')  # fmt: skip
        yield where, record


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Split on line feeds only: JSON strings may hold U+2028 and its like, at which str.splitlines cuts.
    for number, line in enumerate(decode_text(read_bytes(path), str(path)).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _load_json(line, f"{path}:{number}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    text = decode_text(read_bytes(path), str(path))
    if not text.lstrip().startswith("["):
        # JSON lines under the name .json are common.
        yield from _json_lines(path)
        return
    for index, record in enumerate(_load_json(text, str(path))):
        yield f"{path} row {index}", record


def _load_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # may spell half of a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a \\ud… escape spells half of a character (a lone surrogate)",
                        "remove it, or write both halves") from error  # fmt: skip
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}{line}: invalid JSON, column {error.colno}: {error.msg}",
                        "mend that line, or write the file with json.dumps") from error  # fmt: skip
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise UserError(f"{where}: JSON that cannot be read: {error}", "write rows of fields and texts") from error


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a field may hold a whole book; the default ends at 128 KiB
    reader = csv.DictReader(io.StringIO(decode_text(read_bytes(path), str(path)), newline=""))
    for record in reader:
        yield f"{path}:{reader.line_num}", record


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        read_bytes(path)  # raises, with the reason
    try:
        rows = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        index = 0
        for batch in rows:
            for record in batch.to_pylist():
                yield f"{path} row {index}", record
                index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable parquet file: {error}", "write the file again") from error


def messages_of(record: Record, where: str, instructions: Instructions | None = None) -> list[Message]:
    """Messages of a row in Alpaca, ShareGPT, OpenAI, prompt/completion, task or title/abstract shape.

    The last answer, where there is one, comes last: in every shape the answers are the messages of role "assistant".
    Rows that name a task are worded by `instructions` (by default, by the first of the built-in wordings);
    title/abstract rows that name none have one wording, unless `instructions` word them, too.

    Raises:
        UserError: no shape fits, a field is no text, or a role or a task is unknown.
    """
    if "messages" in record:
        return _with_system(record, where, _turns(record["messages"], "role", "content", where, "messages"))
    if "conversations" in record:
        turns = _turns(record["conversations"], "from", "value", where, "conversations")
        return _with_system(record, where, turns)
    if "instruction" in record and "output" in record:
        return _alpaca(record, where)
    for prompt, completion in (("prompt", "completion"), ("prompt", "response"), ("query", "response")):
        if prompt in record and completion in record:
            return _pair(record, prompt, completion, where)
    if record.get("task"):
        return (instructions or load_instructions()).messages(record["task"], record, where)
    if "title" in record and "abstract" in record:
        if instructions is not None and instructions.words_papers:
            return instructions.messages(PAPERS_TASK, record, where)
        question = TITLE_TO_ABSTRACT.format(title=_text(record, "title", where))
        return [_message("user", question), _message("assistant", _text(record, "abstract", where))]
    raise UserError(
        f"{where}: the row has the fields {', '.join(map(str, record)) or 'none'}, which make no known shape",
        "use messages, conversations, instruction+output, prompt+completion, title+abstract or a task",
    )


def _alpaca(record: Record, where: str) -> list[Message]:
    messages = []
    history = record.get("history") or []
    if isinstance(history, str):
        history = _load_json(history, f"{where} field history")  # a column of a .csv
    for number, turn in enumerate(history):
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UserError(f"{where}: field history[{number}] is no pair of texts", 'write ["question", "answer"]')
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    parts = [_text(record, "instruction", where), _text(record, "input", where) if record.get("input") else ""]
    messages.append(_message("user", "\n".join(part for part in parts if part)))
    messages.append(_message("assistant", _text(record, "output", where)))
    return _with_system(record, where, messages)


def _pair(record: Record, prompt: str, completion: str, where: str) -> list[Message]:
    sides = []
    for field, role in ((prompt, "user"), (completion, "assistant")):
        if isinstance(record[field], list):
            sides += _turns(record[field], "role", "content", where, field)
        else:
            sides.append(_message(role, _text(record, field, where)))
    return _with_system(record, where, sides)


def _with_system(record: Record, where: str, messages: list[Message]) -> list[Message]:
    if record.get("system"):
        return [_message("system", _text(record, "system", where)), *messages]
    return messages


def _turns(turns: Any, role_key: str, content_key: str, where: str, field: str) -> list[Message]:
    if isinstance(turns, str):
        turns = _load_json(turns, f"{where} field {field}")  # a column of a .csv
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: field {field} is no list of messages", f"write [{{{role_key!r}: …}}, …]")
    messages = []
    for number, turn in enumerate(turns):
        name = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where}: field {name} is no message", f"write {{{role_key!r}: …, {content_key!r}: …}}")
        role = turn.get(role_key, turn.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{where}: field {name}.{role_key} is {role!r}", f"use one of {', '.join(_ROLES)}")
        key = content_key if content_key in turn else "content"
        messages.append(_message(_ROLES[role], _text(turn, key, where, f"{name}.{key}")))
    return messages


def _text(record: Record, field: str, where: str, name: str | None = None) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name or field} is {'missing' if value is None else 'no text'}",
                        "give it a text, or remove the row")  # fmt: skip
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
