"""Datasets of LLaMA-Factory: names in dataset_info.json -> files, and rows as its converters read them.

Read in llamafactory 0.9.5: data/parser.py, data/loader.py, data/converter.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from cli.convert_config.conversion import Conversion
from cli.convert_config.rows import MAX_ROWS, RowFile
from dataset.records import Record
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, read_object

INFO = "dataset_info.json"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_MEDIA = ("images", "videos", "audios")
# Where dataset_info.json names no columns, and no tags.
_DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_ELSEWHERE = {
    "hf_hub_url": "lies on a hub: hf download --repo-type dataset {url} --local-dir FOLDER",
    "ms_hub_url": "lies on a hub: modelscope download --dataset {url} --local_dir FOLDER",
    "om_hub_url": "lies on a hub: download {url}",
    "script_url": "is made by code, {url}, which is not run here: write its rows to a file",
    "cloud_file_name": "lies in a cloud: download {url}",
}


class _Described(BaseModel):
    """A dataset in dataset_info.json, as far as its rows depend on it."""

    file_name: str
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None
    num_samples: int | None = Field(default=None, gt=0, le=MAX_ROWS)
    split: str | None = None


def dataset_files(conversion: Conversion, key: str, folder: str) -> list[RowFile]:
    """The files of the datasets that a key names.

    Args:
        conversion: whose settings they are.
        key: dataset or eval_dataset.
        folder: where dataset_info.json lies, as the file says it.

    Raises:
        UserError: names the dataset that is not there, or cannot be read here.
    """
    value = conversion.value(key)
    names = [str(name).strip() for name in (value.split(",") if isinstance(value, str) else value or [])]
    if not names:
        return []
    if folder == "ONLINE" or folder.startswith("REMOTE:"):
        raise conversion.refuse(
            "dataset_dir", "nothing is downloaded here", "download the rows, and name a local folder"
        )
    info_file = conversion.path(folder) / INFO
    info = read_object(info_file, f"name the folder in which {conversion.peer.tool} was called with --root FOLDER")
    sources: list[RowFile] = []
    for name in names:
        if not isinstance(info.get(name), dict):
            raise UserError(f"{info_file} describes no dataset {name!r}", f"it has {', '.join(list(info)[:12])}, …")
        sources += _files_of(conversion, name, info[name], info_file)
    return sources


def _files_of(conversion: Conversion, name: str, described: dict[str, Any], info: Path) -> Iterator[RowFile]:
    where = f"{info}: {name}"
    for kind, text in _ELSEWHERE.items():
        if kind in described:
            what = text.format(url=described[kind])
            raise UserError(f"{where} {what.split(':')[0]}", f"{what.partition(': ')[2]}, then set its file_name")
    if described.get("ranking") or "kto_tag" in (described.get("columns") or {}):
        raise UserError(
            f"{where} holds preferences", "train on them with LLaMA-Factory or TRL; it is not supported here"
        )
    fields = check_fields(_Described, described, where, "correct it; file_name names the rows")
    columns = {key: name for key, name in (fields.columns or _DEFAULT_COLUMNS).items() if name}
    if media := [column for column in _MEDIA if column in columns]:
        raise UserError(f"{where} names {media[0]}", "models here read only text: leave the dataset out")
    if fields.split not in (None, "train"):
        raise UserError(f"{where}: a file has no split {fields.split!r}", "name a file with the rows of that split")
    file = info.parent / fields.file_name
    if not file.exists():
        raise UserError(f"{file}, which {where} names, does not exist", "check the path, or name --root FOLDER")
    files = sorted(file.iterdir()) if file.is_dir() else [file]
    tags = _TAGS | {key: name for key, name in (fields.tags or {}).items() if name}
    first, sampled = conversion.value("max_samples"), fields.num_samples
    if len(files) > 1 and (first or sampled):
        key = "num_samples" if sampled else "max_samples"
        raise UserError(f"{where}: {key} of several files", "join them into one file")
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: no reader for {path.suffix or 'files without a suffix'}", "make it .jsonl")
        own = name if len(files) == 1 else f"{name}_{path.stem}"
        column = None
        if conversion.pipeline == "pretrain":
            column = columns["prompt"] if "query" not in columns and columns.get("prompt") else "text"
            read = partial(_text, columns=columns, column=column)
        elif path.suffix.lower() == ".txt":
            raise UserError(f"{path} holds text, not conversations", "stage: pt trains on text")
        elif fields.formatting == "alpaca":
            read = partial(_alpaca, columns=columns, conversion=conversion)
        else:
            read = partial(_sharegpt, columns=columns, tags=tags, conversion=conversion)
        yield RowFile(own, path, read, first, sampled, column)


def _cell(record: Record, columns: dict[str, str], column: str) -> Any:
    return record.get(columns[column]) if columns.get(column) else None


def _question(record: Record, columns: dict[str, str]) -> str:
    parts = [_cell(record, columns, column) for column in ("prompt", "query")]
    return "\n".join(str(part) for part in parts if part)


def _text(record: Record, columns: dict[str, str], column: str) -> Record | None:
    text = _question(record, columns)
    return {column: text} if text else None


def _alpaca(record: Record, columns: dict[str, str], conversion: Conversion) -> Record | None:
    answer = _cell(record, columns, "response")
    if not isinstance(answer, str):
        return None
    messages = []
    for pair in _cell(record, columns, "history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{columns['history']} is not a list of pairs of a question and an answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": _question(record, columns)}, {"role": "assistant", "content": answer}]
    return _row(messages, _cell(record, columns, "system"), _cell(record, columns, "tools"), conversion)


def _sharegpt(record: Record, columns: dict[str, str], tags: dict[str, str], conversion: Conversion) -> Record | None:
    turns = _cell(record, columns, "messages")
    if not isinstance(turns, list) or not turns:
        return None
    roles = {
        tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["observation_tag"]: "observation",
        tags["function_tag"]: "function_call", tags["system_tag"]: "system",
    }  # fmt: skip
    if not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"a turn of {columns['messages']} is not a mapping of fields")
    named = [(roles.get(str(turn.get(tags["role_tag"]))), turn.get(tags["content_tag"]), turn) for turn in turns]
    system = _cell(record, columns, "system")
    if named[0][0] == "system":
        system = named.pop(0)[1]
    messages: list[dict[str, Any]] = []
    for role, content, turn in named:
        calls = turn.get("tool_calls")
        if role is None or role == "system":
            return None
        messages.append({"role": role, "content": content} | ({"tool_calls": calls} if calls else {}))
    if not _takes_turns([message["role"] for message in messages]):
        return None
    return _row(messages, system, _cell(record, columns, "tools"), conversion)


def _takes_turns(roles: Sequence[str]) -> bool:
    """Whether questions (or tool results) and answers (or calls) alternate; LLaMA-Factory drops other rows."""
    merged = [role for number, role in enumerate(roles) if role != "observation" or roles[number - 1] != "observation"]
    asked, answered = merged[::2], merged[1::2]
    return (
        len(merged) % 2 == 0
        and all(role in ("user", "observation") for role in asked)
        and all(role in ("assistant", "function_call") for role in answered)
    )


def _row(messages: list[dict[str, Any]], system: Any, tools: Any, conversion: Conversion) -> Record:
    """Our row, with the effects of the settings."""
    system = system or conversion.value("default_system")
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, *messages]} | ({"tools": tools} if tools else {})
