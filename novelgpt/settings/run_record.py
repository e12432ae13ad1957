"""run.json, the record of a training run, and the progress of its starts.

run.json is written atomically, and validated where it is read. A launcher that may restart a run, and rank 0 of that
run, exchange progress in two further files: a variable in rank 0's environment names the launcher's folder,
`record.json` there is written before each start, `progress.json` by rank 0, which may be killed at any moment: what it
has written stays.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from novelgpt.settings.atomic_files import atomic_write, hash_json
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
        """sha256 of a file, of a prepared folder's manifest, or of the list of several files."""
        if self.manifest_sha256 or not self.files:
            return self.manifest_sha256
        own = [[file.name, file.sha256] for file in self.files]
        return self.files[0].sha256 if len(own) == 1 else hash_json(own)


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
    return str((_run_of(folder) or {}).get("pipeline", ""))


def has_read_documents_only(folder: Path) -> bool:
    """Whether the model in a folder, or in a checkpoint, was pretrained from random weights, by one run or several."""
    seen: set[Path] = set()
    while folder not in seen:
        seen.add(folder)
        run = _run_of(folder)
        if run is None or run.get("pipeline") != "pretrain":
            return False
        model = run.get("arguments", {}).get("model", {})
        if model.get("config_name"):
            return True
        folder = Path(str(model.get("model", "")))
    return False


def _run_of(folder: Path) -> dict[str, Any] | None:
    """The record of the run that made the model in a folder, or in a checkpoint inside it."""
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((run for run in map(read_run_record, places) if run is not None), None)


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


ATTEMPT_VARIABLE = "NOVELGPT_ATTEMPT"
RECORD, PROGRESS = "record.json", "progress.json"


@dataclass
class StartRecord:
    """The starts so far, by one launcher, as the next start reads them.

    Attributes:
        folder: of the run; None until a start has one.
        reached: the highest step of all starts.
        restarts: entries of run.json, the oldest first; see `novelgpt.launch.restarts`.
    """

    folder: str | None = None
    reached: int = 0
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def write(self, place: Path) -> None:
        """Write it for the next start, which has made no progress yet."""
        (place / PROGRESS).unlink(missing_ok=True)
        (place / RECORD).write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Progress:
    """The progress of a start.

    Attributes:
        folder: of the run, once its run.json is written; None before, and for commands without one.
        checkpoint: name of the one that it resumed from; None where it started anew.
        count: steps that are done, or rows that are answered; None before the first could be.
        unit: of the count.
        finished: whether everything is written.
    """

    folder: str | None = None
    checkpoint: str | None = None
    count: int | None = None
    unit: str = "step"
    finished: bool = False

    @classmethod
    def read(cls, place: Path) -> Progress:
        """Read what rank 0 has written last; empty where it has written nothing."""
        try:
            return cls(**json.loads((place / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return cls()


class Attempt:
    """This start of a run, for rank 0. Without a launcher that may restart it, nothing is written.

    Attributes:
        record: of the starts before.
        watched: whether a launcher may restart the run.
    """

    def __init__(self, place: Path | None) -> None:
        self.record = StartRecord()
        self.watched = place is not None
        self._progress = Progress()
        self._file = None
        self._length = 0
        if place is not None:
            self.record = StartRecord(**json.loads((place / RECORD).read_text(encoding="utf-8")))
            self._file = (place / PROGRESS).open("wb", buffering=0)

    def begin(self, folder: Path, checkpoint: Path | None) -> None:
        """Note the run's folder: from here on a restart resumes there."""
        self._progress.folder = str(folder)
        self._progress.checkpoint = None if checkpoint is None else checkpoint.name
        self._write()

    def reach(self, count: int, unit: str = "step") -> None:
        """Note how many are done. Takes some 20 µs."""
        self._progress.count, self._progress.unit = count, unit
        self._write()

    def finish(self) -> None:
        """Note that everything is written: a restart would have nothing to do."""
        self._progress.finished = True
        self._write()

    def restarts(self, checkpoint: Path | None) -> list[dict[str, Any]]:
        """Return entries of run.json. The last one is that of this start, and gets the checkpoint it resumes from."""
        entries = [dict(entry) for entry in self.record.restarts]
        if entries:
            entries[-1]["checkpoint"] = None if checkpoint is None else checkpoint.name
        return entries

    def _write(self) -> None:
        if self._file is None:
            return
        content = json.dumps(asdict(self._progress)).encode()
        # In one call, so that a kill leaves the former or the new content; spaces hide what was longer.
        content = content.ljust(self._length)
        self._length = len(content)
        with contextlib.suppress(OSError):  # a full disk: the launcher then knows less, and training continues
            self._file.seek(0)
            self._file.write(content)


@functools.cache
def this_attempt() -> Attempt:
    """Return the start that this process is rank 0 of. Processes that it starts are not part of it."""
    place = os.environ.pop(ATTEMPT_VARIABLE, None)
    return Attempt(None if place is None else Path(place))
