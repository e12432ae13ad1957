"""Files to rows. A text row is {"text", "book", "chapter", "title", "source"}; a conversation row is
{"id", "messages": [{"role", "content"}], "source"}. Every error names file, row and field."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.decode import decode_text, read_bytes
from dataset.instructions import Instructions
from dataset.records import Record, read_records
from dataset.row_fields import check_row_fields, is_absent, read_flag
from dataset.row_shapes import TITLE_TO_ABSTRACT, fields_read, messages_of
from dataset.tool_rows import read_tools
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pipeline_name, python_module, run_pipeline
from novelgpt.text.messages import Message, answer_text, begins_with_thought, is_empty_answer

__all__ = [
    "TITLE_TO_ABSTRACT", "Message", "Record", "messages_of", "read_conversation_rows", "read_records",
    "read_text_rows", "read_unworded_rows", "word_row",
]  # fmt: skip


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
                "name the field that holds the text with --text_column; conversations are for fine-tuning: "
                f"{pipeline_name('finetune')} or {pipeline_name('finetune_lora')}",
            )
        extra = {key: str(record.get(key) or "") for key in ("book", "chapter", "title")}
        yield {"text": _with_line_feeds(text), **extra, "source": where}


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
    """{"id", "record", "source"} of each row: conversation rows whose messages `word_row` makes.

    Line ends inside texts are made "\\n", as those of the file are. A row without an id gets one.

    Raises:
        UserError: what `read_records` raises, or a file or folder of text, which is for pretraining.
    """
    if path.suffix.lower() == ".txt" or path.is_dir():
        raise UserError(
            f"{path}: no reader for {path.suffix.lower() or 'files without a suffix'}: it holds text, no conversations",
            f"pretrain on it: {run_pipeline('pretrain', f'--train_files {shlex.quote(str(path))}')}; or make "
            f"conversations of it: {python_module('dataset novels')}, then {python_module('dataset conversations')}",
        )
    for index, (where, record) in enumerate(read_records(path)):
        name = f"{path.stem}-{index}" if is_absent(record.get("id")) else str(record["id"])
        yield {"id": name, "record": _with_line_feeds(record), "source": where}


def word_row(row: Record, instructions: Instructions | None = None) -> Record:
    """The conversation row of a row of `read_unworded_rows`.

    Where the row says more than its messages: "tools", as chat templates take them, and "enable_thinking". Answers that
    hold nothing, or that the row keeps out of the loss, are marked "trained": False.

    Raises:
        UserError: what `messages_of` raises, or a field that changes training and is not obeyed.
    """
    record, where = row["record"], row["source"]
    used = fields_read(record, where, instructions)
    check_row_fields(record, where, used)
    messages = messages_of(record, where, instructions)
    flag = read_flag({name: value for name, value in record.items() if name not in used}, where)
    left_out = flag is not None and not flag[1]
    for message in messages:
        if message["role"] == "assistant" and (left_out or is_empty_answer(message)):
            message["trained"] = False
    worded: Record = {"id": row["id"], "messages": messages, "source": where}
    tools = read_tools({name: value for name, value in record.items() if name not in used}, where)
    if tools:
        worded["tools"] = tools
    thinking = record.get("enable_thinking")
    if not is_absent(thinking):
        worded["enable_thinking"] = _checked_thinking(thinking, messages, where)
    return worded


def _checked_thinking(value: Any, messages: list[Message], where: str) -> bool:
    """A row's switch for thoughts, which must say what its answers do: they decide what prompts leave room for."""
    thinking = {"true": True, "false": False}.get(str(value).strip().lower())
    if thinking is None:
        raise UserError(f"{where}: field enable_thinking is {value!r}", "write true or false, or leave it out")
    for message in messages:
        if message["role"] == "assistant" and begins_with_thought(answer_text(message)) != thinking:
            raise UserError(
                f"{where}: field enable_thinking is {value!r}, and the answer {message['content'][:20]!r} "
                f"{'has no thought' if thinking else 'begins with one'}",
                "leave it out: whether an answer thinks decides",
            )
    return thinking


def _with_line_feeds(value: Any) -> Any:
    """A value in whose texts every line ends in "\\n"."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
    if isinstance(value, list):
        return [_with_line_feeds(item) for item in value]
    if isinstance(value, dict):
        return {_with_line_feeds(name): _with_line_feeds(item) for name, item in value.items()}
    return value
