"""Data sets by the names that LLaMA-Factory's dataset_info.json gives them: their places, columns and tags.

Read as in llamafactory 0.9.5 (data/parser.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, read_object

INFO = "dataset_info.json"
# Drawn from a data set; a larger number is a typing error.
MAX_ROWS = 10_000_000
ROLES_OF_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "observation", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip
# Where dataset_info.json names no columns, and no tags.
_DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"}, "openai": {"messages": "conversations"},
}  # fmt: skip
DEFAULT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_MEDIA = ("images", "videos", "audios")
_PREFERENCES = ("chosen", "rejected", "kto_tag")
_ELSEWHERE = {
    "om_hub_url": "lies on a hub that is not read here: download {url}",
    "script_url": "is made by code, {url}, which is not run here: write its rows to a file",
    "cloud_file_name": "lies in a cloud: download {url}",
}


class Description(BaseModel):
    """A data set in dataset_info.json.

    Attributes:
        name: of the data set.
        info: the file.
        file_name: of its rows, in the folder of `info`; a file or a folder.
        hf_hub_url, ms_hub_url: names on hubs.
        formatting: of its rows.
        columns: what a row may hold -> field of the rows.
        tags: what turns hold -> key, or role.
        num_samples: rows to draw.
        subset, split, folder: of a hub's data set.
    """

    name: str
    info: str
    file_name: str = ""
    hf_hub_url: str = ""
    ms_hub_url: str = ""
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None
    num_samples: int | None = Field(default=None, gt=0, le=MAX_ROWS)
    subset: str | None = None
    split: str | None = None
    folder: str | None = None

    @property
    def where(self) -> str:
        """The file and the name, for errors."""
        return f"{self.info}: {self.name}"

    @property
    def place(self) -> str:
        """What names its rows: a path, or a hub's name as `--train_files` takes it."""
        if self.file_name:
            return str(Path(self.info).parent / self.file_name)
        hub, url = ("hf", self.hf_hub_url) if self.hf_hub_url else ("ms", self.ms_hub_url)
        split = self.split if self.split not in (None, "train") else ""
        parts = ":".join((url, self.subset or "", split or "")).rstrip(":")
        return f"{hub}://{parts}"

    def columns_read(self) -> dict[str, str]:
        """What a row may hold -> field of the rows."""
        return {key: name for key, name in (self.columns or _DEFAULT_COLUMNS[self.formatting]).items() if name}

    def tags_read(self) -> dict[str, str]:
        """Tags of turns -> key, or role; none where they are the usual ones, which the readers know."""
        tags = DEFAULT_TAGS | {key: name for key, name in (self.tags or {}).items() if name}
        return {} if tags == DEFAULT_TAGS else tags


def find_datasets(names: Sequence[str], dataset_dir: str) -> list[Description]:
    """The data sets of these names.

    Args:
        names: as `--dataset` has them; each may be several, with commas between.
        dataset_dir: the folder of dataset_info.json, or the file.

    Raises:
        UserError: a name that the file does not describe, or a data set that cannot be read here.
    """
    wanted = [name.strip() for given in names for name in given.split(",") if name.strip()]
    if not wanted:
        return []
    if dataset_dir == "ONLINE" or dataset_dir.startswith("REMOTE:"):
        raise UserError(
            f"--dataset_dir {dataset_dir}: a {INFO} on a hub is not read here",
            "download it, and name its folder; or name the data sets themselves: --train_files hf://OWNER/NAME",
        )
    file = Path(dataset_dir) if dataset_dir.endswith(".json") else Path(dataset_dir) / INFO
    info = read_object(file, f"name the folder that holds {INFO} by --dataset_dir")
    return [describe_dataset(name, info, file) for name in wanted]


def describe_dataset(name: str, info: Mapping[str, Any], file: Path) -> Description:
    """The data set of one name.

    Args:
        name: of the data set.
        info: content of dataset_info.json.
        file: for errors.

    Raises:
        UserError: there is none of that name, or it cannot be read here.
    """
    described = info.get(name)
    if not isinstance(described, dict):
        raise UserError(f"{file} describes no dataset {name!r}", f"it has {', '.join(list(info)[:12])}, …")
    where = f"{file}: {name}"
    for kind, text in _ELSEWHERE.items():
        if kind in described and not {"file_name", "hf_hub_url", "ms_hub_url"} & described.keys():
            what = text.format(url=described[kind])
            raise UserError(f"{where} {what.split(':')[0]}", f"{what.partition(': ')[2]}, then set its file_name")
    columns = described.get("columns")
    named = [key for key, own in columns.items() if own] if isinstance(columns, dict) else []
    if described.get("ranking") or set(_PREFERENCES) & set(named):
        raise UserError(
            f"{where} holds preferences", "train on them with LLaMA-Factory or TRL; it is not supported here"
        )
    if media := [column for column in _MEDIA if column in named]:
        raise UserError(f"{where} names {media[0]}", "models here read only text: leave the dataset out")
    if unknown := [column for column in named if column not in _COLUMNS]:
        raise UserError(f"{where}: columns: {unknown[0]} is not known", f"take {', '.join(_COLUMNS)}")
    fields = check_fields(Description, {**described, "name": name, "info": str(file)}, where,
                          "correct it; file_name names the rows")  # fmt: skip
    if not (fields.file_name or fields.hf_hub_url or fields.ms_hub_url):
        raise UserError(f"{where} has no file_name", "correct it; file_name names the rows")
    if fields.tags and (wrong := [tag for tag in fields.tags if tag not in DEFAULT_TAGS]):
        raise UserError(f"{where}: tags: {wrong[0]} is not known", f"take {', '.join(DEFAULT_TAGS)}")
    if fields.file_name and fields.folder:
        raise UserError(f"{where} names a folder, {fields.folder}, beside a file", "write the folder into file_name")
    if fields.file_name and fields.split not in (None, "train"):
        raise UserError(f"{where}: a file has no split {fields.split!r}", "name a file with the rows of that split")
    return fields
