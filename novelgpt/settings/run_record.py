"""run.json: the record of a training run, written atomically and validated where it is read."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields
from novelgpt.settings.paths import OUTPUT

RUN_FILE = "run.json"
# A record takes some ten kilobytes, and more only where the data lie in very many files.
MAX_BYTES = 64_000_000


class DataFile(BaseModel):
    """A file that rows are read from.

    Attributes:
        name: path within its folder; for a file named directly, its suffix, which decides how it is read.
        split: of token shards, as in their manifest; else "".
        bytes: file size.
        sha256: of its content, hexadecimal.
        written: for token shards: inode, mtime and ctime in ns at the time of the hash; else [].
    """

    model_config = ConfigDict(strict=True)

    name: str
    bytes: int
    sha256: str
    split: str = ""
    written: list[int] = []


class DataSource(BaseModel):
    """A file or a prepared folder that a run reads.

    Attributes:
        role: train_files, valid_files or instruction_templates.
        path: absolute; not compared between runs.
        name: as given on the command line.
        manifest_sha256: of a prepared folder, else "".
        files: everything read there, in order.
        seen: in this process only: inode, size and mtime of each file by path, taken before hashing.
    """

    model_config = ConfigDict(strict=True)

    role: str
    path: str
    name: str
    manifest_sha256: str = ""
    files: list[DataFile]
    seen: dict[str, list[int]] = Field(default={}, exclude=True)

    @property
    def digest(self) -> str:
        """sha256 of a file, or of a prepared folder's manifest."""
        return self.manifest_sha256 or (self.files[0].sha256 if self.files else "")


class _Batch(BaseModel):
    """The training arguments that are computed with."""

    model_config = ConfigDict(strict=True)

    per_device_train_batch_size: int
    gradient_accumulation_steps: int


class _RunRecord(BaseModel):
    """Types of the known keys; any may be missing, and others are kept."""

    model_config = ConfigDict(strict=True, extra="allow")

    pipeline: str = ""
    id: str = ""
    status: str = ""
    started: str = ""
    finished: str = ""
    model: str = ""
    model_identity: dict[str, Any] = {}
    seed: int = 0
    processes: int = Field(1, ge=1)
    arguments: dict[str, dict[str, Any]] = {}
    data_sha256: dict[str, str] = {}
    data: list[DataSource] = []
    resumed: list[dict[str, Any]] = []
    restarts: list[dict[str, Any]] = []
    results: dict[str, Any] = {}

    @field_validator("arguments")
    @classmethod
    def _check_batch(cls, arguments: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if "training" in arguments:
            _Batch.model_validate(arguments["training"])
        return arguments


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """Return the run.json of a folder, None where there is none. Any key may be missing; known ones have their type.

    Raises:
        UserError: it cannot be read, or is not a run record.
    """
    path = folder / RUN_FILE
    remedy = "delete it, or the folder, if it is not needed; or name another folder"
    try:
        if not path.is_file():
            return None
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path} cannot be read: {size} bytes are too many for a run record", remedy)
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy) from error
    return check_fields(_RunRecord, content, f"{path} cannot be read", remedy).model_dump(exclude_unset=True)


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, in place of an existing one."""
    text = json.dumps(only_json(record), ensure_ascii=False, indent=2, default=str)
    atomic_write(folder / RUN_FILE, text + "\n")


def only_json(value: Any) -> Any:
    """Return a copy with None for numbers that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: only_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [only_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def utc_now() -> str:
    """Return the current time in ISO format, as run.json notes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def pipeline_of(folder: Path) -> str:
    """Return the pipeline that trained the model in a folder, or in a checkpoint inside its run; "" if unknown."""
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((str(run.get("pipeline", "")) for run in map(read_run_record, places) if run is not None), "")


def newest_finetuning(root: Path = OUTPUT) -> Path | None:
    """Return the folder of the last finished fine-tuning run under `root`; damaged records are skipped."""
    finished = []
    for path in root.glob(f"**/{RUN_FILE}"):
        try:
            record = read_run_record(path.parent) or {}
        except UserError:
            continue
        if record.get("status") == "finished" and record.get("pipeline") in ("finetune", "finetune_lora"):
            finished.append((record.get("finished", ""), path.parent))
    return max(finished)[1] if finished else None
