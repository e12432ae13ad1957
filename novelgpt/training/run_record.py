"""run.json: what a run is and what became of it, written whole, and checked where it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from novelgpt import __version__
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import IS_CHECKOUT, OUTPUT, ROOT
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.whole_files import write_whole
from novelgpt.training.data_identity import DataSource, data_sha256
from novelgpt.training.resume import model_identity

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")
# A description takes some ten kilobytes, and more only where data lie in very many files.
MOST_BYTES = 64_000_000


class _Batch(BaseModel):
    """Of the arguments of training, those that are reckoned with."""

    model_config = ConfigDict(strict=True)

    per_device_train_batch_size: int
    gradient_accumulation_steps: int


class _RunRecord(BaseModel):
    """What is asked of a run.json: keys may be missing and others be there, but these hold what they should."""

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


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, None where it is no run. Any key may be missing; those that are there hold their type.

    Raises:
        UserError: it cannot be read, or holds something else than the description of a run.
    """
    path = folder / RUN_FILE
    remedy = "delete it, or the folder, if it is of no use; or name another folder"
    try:
        if not path.is_file():
            return None
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path} cannot be read: {size} bytes are no description of a run", remedy)
        description = json.loads(path.read_text(encoding="utf-8-sig"))
        record = _RunRecord.model_validate(description)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} cannot be read: {where + ': ' if where else ''}{first['msg']}", remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy) from error
    return record.model_dump(exclude_unset=True)


def write_run(folder: Path, description: dict[str, Any]) -> None:
    """Write run.json, in place of the one that is there."""
    text = json.dumps(only_json(description), ensure_ascii=False, indent=2, default=str)
    write_whole(folder / RUN_FILE, text + "\n")


def describe_run(run: TrainingRun, data: list[DataSource]) -> dict[str, Any]:
    """What run.json says of a run that begins.

    Args:
        run: with all that is settled by then.
        data: what it trains and evaluates on, as it was before it was read.
    """
    return {
        "pipeline": run.pipeline,
        "started": now(),
        "model": run.model.model,
        "model_identity": model_identity(run.model.model),
        "seed": run.training.seed,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "arguments": {field.name: _plain(vars(run)[field.name]) for field in dataclasses.fields(run)},
        "data_sha256": data_sha256(data),
        "versions": {"python": platform.python_version(), "novelgpt": __version__}
        | {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "data": [source.model_dump() for source in data],
    }


def newest_finetuning(root: Path = OUTPUT) -> Path | None:
    """The fine-tuning run under `root` that finished last. What is no sound run.json is passed over."""
    finished = []
    for path in root.glob(f"**/{RUN_FILE}"):
        try:
            description = read_run(path.parent) or {}
        except UserError:
            continue
        if description.get("status") == "finished" and description.get("pipeline") in ("finetune", "finetune_lora"):
            finished.append((description.get("finished", ""), path.parent))
    return max(finished)[1] if finished else None


def now() -> str:
    """The time, as run.json notes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def only_json(value: Any) -> Any:
    """The same with None for numbers that are not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: only_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [only_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(group: Any) -> dict[str, Any]:
    arguments = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
    # Keys for hubs and trackers have no place in a file that people pass on.
    return {key: value for key, value in arguments.items() if not key.endswith("_token")}


def _git_commit() -> str | None:
    """Of the checkout; None where pip has installed a wheel, which may lie in the repository of somebody else."""
    if not IS_CHECKOUT:
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
