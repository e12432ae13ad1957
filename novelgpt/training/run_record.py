"""Writes run.json: what a run is, and what became of it."""

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

from novelgpt import __version__
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.paths import IS_CHECKOUT, ROOT
from novelgpt.settings.run_record import RUN_FILE, DataSource
from novelgpt.settings.runs import TrainingRun
from novelgpt.training.data_identity import data_sha256
from novelgpt.training.resume import model_identity

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")


def write_run(folder: Path, description: dict[str, Any]) -> None:
    """Write run.json, in place of the one that is there."""
    text = json.dumps(only_json(description), ensure_ascii=False, indent=2, default=str)
    atomic_write(folder / RUN_FILE, text + "\n")


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
