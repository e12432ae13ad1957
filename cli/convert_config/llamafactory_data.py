"""Datasets of LLaMA-Factory: names in dataset_info.json -> files, and rows as its converters read them.

Read in llamafactory 0.9.5: data/loader.py, data/converter.py. What dataset_info.json may say is in
`novelgpt.text.dataset_info`; here is what LLaMA-Factory makes of the rows, including those that it drops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import Conversion
from cli.convert_config.rows import RowFile
from dataset.records import Record
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object
from novelgpt.text.data_names import ROW_SUFFIXES, TEXT
from novelgpt.text.dataset_info import DEFAULT_TAGS, INFO, ROLES_OF_TAGS, Description, describe_dataset

SUFFIXES = (*ROW_SUFFIXES, TEXT)
# On hubs, which are not asked for a conversion.
_DOWNLOADS = {"hf_hub_url": "hf download --repo-type dataset {} --local-dir FOLDER",
              "ms_hub_url": "modelscope download --dataset {} --local_dir FOLDER"}  # fmt: skip


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
    return [file for name in names for file in _files_of(conversion, describe_dataset(name, info, info_file))]


def _files_of(conversion: Conversion, described: Description) -> Iterator[RowFile]:
    where = described.where
    if not described.file_name:
        key = "hf_hub_url" if described.hf_hub_url else "ms_hub_url"
        raise UserError(
            f"{where} lies on a hub", f"{_DOWNLOADS[key].format(vars(described)[key])}, then set its file_name"
        )
    columns, tags = described.columns_read(), DEFAULT_TAGS | described.tags_read()
    file = Path(described.place)
    if not file.exists():
        raise UserError(f"{file}, which {where} names, does not exist", "check the path, or name --root FOLDER")
    files = sorted(file.iterdir()) if file.is_dir() else [file]
    first, sampled = conversion.value("max_samples"), described.num_samples
    if len(files) > 1 and (first or sampled):
        key = "num_samples" if sampled else "max_samples"
        raise UserError(f"{where}: {key} of several files", "join them into one file")
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: no reader for {path.suffix or 'files without a suffix'}", "make it .jsonl")
        own = described.name if len(files) == 1 else f"{described.name}_{path.stem}"
        column = None
        if conversion.pipeline == "pretrain":
            column = columns["prompt"] if "query" not in columns and columns.get("prompt") else "text"
            read = partial(_text, columns=columns, column=column)
        elif path.suffix.lower() == TEXT:
            raise UserError(f"{path} holds text, not conversations", "stage: pt trains on text")
        elif described.formatting == "alpaca":
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
    roles = {tags[tag]: role for tag, role in ROLES_OF_TAGS.items()}
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
