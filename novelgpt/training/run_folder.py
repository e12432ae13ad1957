"""output/RUN/: which folder a run gets, and its run.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import OUTPUT, ROOT, check_folder_can_be_made
from novelgpt.settings.process import first_process_value, is_first_process
from novelgpt.settings.runs import TrainingRun

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")


def choose_run_folder(run: TrainingRun) -> None:
    """Settle `run.training.output_dir`, the same on all ranks. Nothing is written yet.

    Raises:
        UserError: the folder that the user named holds another run.
    """
    folder = first_process_value(_choose_folder(run) if is_first_process() else None)
    if isinstance(folder, UserError):
        raise folder
    run.training.output_dir = str(folder)


def start_run_folder(run: TrainingRun) -> Path:
    """Make the chosen folder, in place of the run there where that was asked for, with run.json of status "running"."""
    folder = Path(str(run.training.output_dir))
    if is_first_process():
        if run.training.overwrite_output_dir and read_run(folder) is not None:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, _description(run) | {"status": "running"})
    return folder


def finish_run_folder(folder: Path, results: dict[str, Any]) -> None:
    """Note in run.json that the run is complete, with its final figures."""
    description = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(folder, description | {"status": "finished", "finished": finished, "results": results})


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, None where it is no run.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "delete it, or the folder, if it is of no use") from error
    return description


def only_json(value: Any) -> Any:
    """The same with None for numbers that are not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: only_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [only_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def newest_finetuning(root: Path = OUTPUT) -> Path | None:
    """The fine-tuning run under `root` that finished last."""
    runs = [(read_run(path.parent) or {}, path.parent) for path in root.glob("**/run.json")]
    finished = [
        (str(description["finished"]), folder)
        for description, folder in runs
        if description.get("status") == "finished" and description["pipeline"] in ("finetune", "finetune_lora")
    ]
    return max(finished)[1] if finished else None


def _choose_folder(run: TrainingRun) -> Path | UserError:
    named = run.training.output_dir
    if named is None:
        names = [run.pipeline, *(f"{run.pipeline}-{number}" for number in range(2, 10_000))]
        return next(OUTPUT / name for name in names if not (OUTPUT / name).exists())
    folder = Path(named).absolute()
    try:
        check_folder_can_be_made(folder, f"--output_dir {named}")
        description = read_run(folder)
    except UserError as error:
        return error
    if run.training.overwrite_output_dir and run.training.resume_from_checkpoint:
        return UserError(
            "--overwrite_output_dir would delete what --resume_from_checkpoint goes on from", "take one of the two"
        )
    replaced = run.training.overwrite_output_dir or run.training.resume_from_checkpoint
    if description is not None and not replaced:
        return UserError(
            f"{named} holds another run ({description['pipeline']}, {description['status']}, "
            f"started {description['started']})",
            "choose another --output_dir, go on with --resume_from_checkpoint, or replace it: --overwrite_output_dir",
        )
    if description is None and folder.is_dir() and any(folder.iterdir()):
        return UserError(f"--output_dir {named} holds files that are no run's", "choose an empty or a new folder")
    return folder


def _description(run: TrainingRun) -> dict[str, Any]:
    files = [*run.data.train_files, *run.data.valid_files]
    return {
        "pipeline": run.pipeline,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": run.model.model,
        "seed": run.training.seed,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "arguments": {
            field.name: _plain(vars(run)[field.name]) for field in dataclasses.fields(run)
        },
        "data_sha256": {name: _sha256(Path(name)) for name in files},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }  # fmt: skip


def _plain(group: Any) -> dict[str, Any]:
    arguments = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
    # Keys for hubs and trackers have no place in a file that people pass on.
    return {key: value for key, value in arguments.items() if not key.endswith("_token")}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    # The manifest of a prepared folder holds the hashes of its files.
    with (path / "manifest.json" if path.is_dir() else path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write(folder: Path, description: dict[str, Any]) -> None:
    unfinished = folder / "run.json.partial"
    text = json.dumps(only_json(description), ensure_ascii=False, indent=2, default=str)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / "run.json")
