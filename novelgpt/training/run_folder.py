"""output/RUN/: which folder a run gets, and its run.json."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import OUTPUT, ROOT, check_folder_can_be_made
from novelgpt.settings.process import first_process_value, is_first_process
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import say
from novelgpt.settings.whole_files import hash_file, write_whole
from novelgpt.training.resume import changes, check_same_run, model_identity, newest_whole_checkpoint, unusable

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")
LOCK = "run.lock"
# Locks end with the files they are on, and those with the process.
_held: list[IO[str]] = []


def choose_run_folder(run: TrainingRun) -> None:
    """Settle `run.training.output_dir` and the checkpoint to go on from, the same on all ranks. Nothing is written yet.

    A folder that holds an unfinished run of the same settings is gone on with, from its newest whole checkpoint.

    Raises:
        UserError: the folder that the user named holds another run, or none of its checkpoints is whole.
    """
    chosen = first_process_value(_choose(run) if is_first_process() else None)
    if isinstance(chosen, UserError):
        raise chosen
    folder, checkpoint = chosen
    run.training.output_dir = str(folder)
    run.training.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)


def start_run_folder(run: TrainingRun) -> Path:
    """Make the chosen folder, in place of the run there where that was asked for, with run.json of status "running".

    Raises:
        UserError: another process writes there.
    """
    folder = Path(str(run.training.output_dir))
    if is_first_process():
        checkpoint = run.training.resume_from_checkpoint
        before = read_run(folder)
        if before is not None and checkpoint is None:
            _refuse_held(folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _hold(folder)
        description = _description(run) | {"status": "running"}
        if before is not None and checkpoint is not None:
            again = {"at": description["started"], "checkpoint": Path(checkpoint).name}
            description["started"] = before["started"]
            description["resumed"] = [*before.get("resumed", []), again]
        _write(folder, description)
    return folder


def finish_run_folder(folder: Path, results: dict[str, Any]) -> None:
    """Note in run.json that the run is complete, with its final figures."""
    description = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(folder, description | {"status": "finished", "finished": finished, "results": results})


def stop_run_folder(folder: Path, signal: str) -> None:
    """Note in run.json that a signal has ended the run before its end."""
    description = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    _write(folder, description | {"status": "stopped", "stopped_by": signal})


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


def _choose(run: TrainingRun) -> tuple[Path, Path | None] | UserError:
    """The folder and the checkpoint; errors are handed to all ranks."""
    try:
        named = run.training.resume_from_checkpoint
        if named and str(named).lower() in ("true", "false"):
            run.training.resume = str(named).lower() == "true"
            named = None
        if run.training.overwrite_output_dir and (named or run.training.resume):
            raise UserError("--overwrite_output_dir would delete what the run goes on from", "take one of the two")
        if run.training.output_dir is None:
            folder, checkpoint = _choose_unnamed(run)
        else:
            folder, checkpoint = _choose_named(run, run.training.output_dir)
        if named:
            checkpoint = _named_checkpoint(run, Path(named))
        if run.training.resume and checkpoint is None:
            raise UserError(f"{folder} holds no checkpoint to go on from", "start without --resume")
        if checkpoint is not None:
            say(f"going on from {checkpoint}")
    except UserError as error:
        return error
    return folder, checkpoint


def _choose_unnamed(run: TrainingRun) -> tuple[Path, Path | None]:
    """The next free folder, unless the last one holds the same run, unfinished, with a checkpoint."""
    names = [run.pipeline, *(f"{run.pipeline}-{number}" for number in range(2, 10_000))]
    free = next(number for number, name in enumerate(names) if not (OUTPUT / name).exists())
    if free and run.training.resume is not False and not run.training.resume_from_checkpoint:
        last = OUTPUT / names[free - 1]
        before = read_run(last)
        unfinished = before is not None and before["status"] != "finished" and not _is_held(last)
        if before is not None and unfinished and not changes(before, _description(run)):
            checkpoint = newest_whole_checkpoint(last)
            if checkpoint is not None:
                check_same_run(last, before, _description(run), checkpoint)
                return last, checkpoint
    return OUTPUT / names[free], None


def _choose_named(run: TrainingRun, named: str) -> tuple[Path, Path | None]:
    folder = Path(named).absolute()
    check_folder_can_be_made(folder, f"--output_dir {named}")
    before = read_run(folder)
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--output_dir {named} holds files that are no run's", "choose an empty or a new folder")
        return folder, None
    if run.training.overwrite_output_dir:
        return folder, None
    _refuse_held(folder)
    if before["status"] == "finished" or run.training.resume is False:
        raise UserError(
            f"{named} holds another run ({before['pipeline']}, {before['status']}, started {before['started']})",
            "choose another --output_dir, or replace it: --overwrite_output_dir",
        )
    check_same_run(folder, before, _description(run), None)  # before checkpoints are read through
    checkpoint = newest_whole_checkpoint(folder)
    check_same_run(folder, before, _description(run), checkpoint)
    return folder, checkpoint


def _named_checkpoint(run: TrainingRun, checkpoint: Path) -> Path:
    """What --resume_from_checkpoint names."""
    if not checkpoint.is_dir():
        raise UserError(f"--resume_from_checkpoint {checkpoint} is no folder", "name a checkpoint-N folder, or `true`")
    problem = unusable(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} cannot be gone on from: {problem}", "name another checkpoint-N folder")
    before = read_run(checkpoint.absolute().parent)
    if before is not None:
        check_same_run(checkpoint.parent, before, _description(run), checkpoint)
    return checkpoint.absolute()


def _hold(folder: Path) -> None:
    """Keep other processes from writing into the folder for as long as this one lives."""
    file = (folder / LOCK).open("w", encoding="utf-8")
    _held.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _is_being_written(folder) from error
    except OSError:
        return  # a file system without locks


def _is_held(folder: Path) -> bool:
    """Whether a living process, other than this one, writes into the folder."""
    try:
        with (folder / LOCK).open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return all(Path(held.name) != folder / LOCK for held in _held)
    except OSError:
        return False
    return False


def _refuse_held(folder: Path) -> None:
    if _is_held(folder):
        raise _is_being_written(folder)


def _is_being_written(folder: Path) -> UserError:
    return UserError(f"another process trains into {folder}", "wait for its end, or choose another folder")


def _description(run: TrainingRun) -> dict[str, Any]:
    files = [*run.data.train_files, *run.data.valid_files]
    return {
        "pipeline": run.pipeline,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": run.model.model,
        "model_identity": model_identity(run.model.model),
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


@functools.cache
def _sha256(path: Path) -> str:
    # The manifest of a prepared folder holds the hashes of its files.
    return hash_file(path / "manifest.json" if path.is_dir() else path)[0]


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write(folder: Path, description: dict[str, Any]) -> None:
    text = json.dumps(only_json(description), ensure_ascii=False, indent=2, default=str)
    write_whole(folder / "run.json", text + "\n")
