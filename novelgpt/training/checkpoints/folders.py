"""Checkpoint folders: filled under another name, hashed, renamed when complete, ranked, deleted when outdated."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from novelgpt.model.card import CARD
from novelgpt.settings.atomic_files import atomic_write, hash_file, sync
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, read_object

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
HASHING_THREADS = 8


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step, once it is complete."""
    return run_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def unfinished_folder(folder: Path) -> Path:
    """Where a folder is filled: beside it, on the same disk, so that it only has to be renamed."""
    return folder.with_name(folder.name + UNFINISHED)


def checkpoints(run_folder: Path) -> list[Path]:
    """Folders named as checkpoints, the newest first, whatever they hold."""
    named = [path for path in run_folder.glob("*") if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]
    return sorted((path for path in named if path.is_dir()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step of a folder that is named as a checkpoint."""
    return int(folder.name.rpartition("-")[2])


def best_checkpoint(folders: Iterable[Path], history: list[dict[str, Any]], training: TrainingArguments) -> Path | None:
    """The checkpoint whose step has the best finite figure, the earlier of two equal ones; None where none has one.

    An evaluation between two checkpoints does not count, as its weights are lost.

    Args:
        folders: of checkpoints.
        history: log entries with "step", those of evaluations with the figure.
        training: `metric_for_best_model` names the figure, `greater_is_better` says what is best.
    """
    name = f"eval_{str(training.metric_for_best_model).removeprefix('eval_')}"
    sign = -1.0 if training.greater_is_better else 1.0
    figures = {entry["step"]: entry[name] for entry in history if name in entry}
    known = [folder for folder in folders if math.isfinite(figures.get(step_of(folder), math.nan))]
    return min(known, key=lambda folder: (sign * figures[step_of(folder)], step_of(folder)), default=None)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of files, which are synced to the disk when this returns."""

    def describe(name: str) -> dict[str, Any]:
        path = folder / name
        sync(path)
        sha256, size = hash_file(path)
        return {"bytes": size, "sha256": sha256}

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))


def files_in(folder: Path) -> list[str]:
    """Names of all files in a folder and below, except its manifest and its card, which people may edit."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in paths if path.name not in (MANIFEST, CARD)]


def finish(folder: Path, files: dict[str, dict[str, Any]], step: int) -> None:
    """Write the manifest of a filled folder, and give it its name.

    Raises:
        OSError: the disk is full, for example.
    """
    unfinished = unfinished_folder(folder)
    atomic_write(unfinished / MANIFEST, json.dumps({"step": step, "files": files}, indent=1) + "\n")
    replaced = unfinished_folder(folder.with_name(f"{folder.name}.replaced"))
    if folder.exists():  # the same step, written before the run resumed from an older one
        folder.replace(replaced)
    unfinished.replace(folder)
    sync(folder.parent)


class _File(BaseModel):
    bytes: int
    sha256: str


class _CheckpointManifest(BaseModel):
    files: dict[str, _File]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file matches the manifest."""
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST}"
    try:
        manifest = check_fields(_CheckpointManifest, read_object(folder / MANIFEST), MANIFEST)
    except UserError:
        return f"{MANIFEST} cannot be read"
    files = {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()}
    if not files:
        return f"{MANIFEST} lists no files"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = pool.map(hash_file, [folder / name for name in files])
        for (name, (_, expected)), (found, _) in zip(files.items(), hashes, strict=True):
            if found != expected:
                return f"{name} has changed since it was written"
    return None


def delete_old(run_folder: Path, newest: Path, best: str | None, limit: int | None) -> None:
    """Delete the oldest checkpoints above `limit`, but never the newest nor the best one.

    Args:
        run_folder: of the run.
        newest: just written, and complete.
        best: folder of the best one so far.
        limit: how many to keep; None or 0 for all.
    """
    kept = {newest.name} | ({Path(best).name} if best else set())
    others = [folder for folder in checkpoints(run_folder) if folder.name not in kept]
    if limit:
        for folder in others[max(0, limit - len(kept)) :]:
            folder.replace(unfinished_folder(folder))  # a kill would else leave what looks like a damaged checkpoint
    for folder in run_folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*{UNFINISHED}"):
        shutil.rmtree(folder, ignore_errors=True)
