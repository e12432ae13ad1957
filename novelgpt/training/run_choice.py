"""Chooses the folder of a run and the checkpoint that it resumes from."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import is_locked
from novelgpt.settings.paths import OUTPUT, check_folder_can_be_made, check_not_replaced
from novelgpt.settings.run_record import DataSource, read_run_record, this_attempt
from novelgpt.settings.runs import TrainingRun, with_training
from novelgpt.settings.terminal import say
from novelgpt.training.checkpoints.folders import checkpoints, damage, step_of
from novelgpt.training.checkpoints.trainer import STATES
from novelgpt.training.folder_claim import LOCK, Claim, check_none_held_below, is_vacant, peek
from novelgpt.training.run_identity import NAMES, ROLES, changes, check_same_run, describe_run, identify_data

RELEASE_SECONDS = 60.0  # for a rank that has lost its launcher to save and exit
MAX_FOLDERS = 10_000


Take = Callable[[Path], Claim]
"""Claims a folder, or only peeks at it; raises BlockingIOError where another process holds it."""
Record = Callable[[], dict[str, Any]]
"""Returns what run.json would hold; hashes the data when it is first called."""


@dataclass(frozen=True)
class RunChoice:
    """What a run starts from.

    Attributes:
        run: with its folder and checkpoint settled.
        claim: of the folder.
        checkpoint: to resume from; None for a fresh start.
        resumed: run.json of the run that is resumed in its own folder; None for a fresh one.
    """

    run: TrainingRun
    claim: Claim
    checkpoint: Path | None
    resumed: dict[str, Any] | None


_Found = tuple[Claim, Path | None, dict[str, Any] | None]
"""The folder, the checkpoint to resume from, and run.json of the run that is there."""


def preview_run_folder(run: TrainingRun) -> TrainingRun:
    """Return the run with the folder and checkpoint that `claim_run_folder` would settle now. Nothing is made or held.

    Raises:
        UserError: as there.
    """
    return choose(run, lambda: identify_data(run), peek).run


def choose(run: TrainingRun, data: Callable[[], list[DataSource]], take: Take) -> RunChoice:
    """Choose a folder and claim it with `take`; decisions are made while it is held.

    Raises:
        UserError: the folder that the user named holds another run, or none of its checkpoints is intact.
    """
    attempt = this_attempt()
    if attempt.record.folder is not None:  # of the previous start, by the same launcher
        run = with_training(run, output_dir=attempt.record.folder, overwrite_output_dir=False, resume=None)
    named = run.training.resume_from_checkpoint
    if str(named).lower() in ("true", "false"):
        run, named = with_training(run, resume=str(named).lower() == "true"), None
    training = run.training
    if training.overwrite_output_dir and (named or training.resume):
        raise UserError("--overwrite_output_dir would delete what the run resumes from", "use only one of the two")
    with ExitStack() as on_error:

        def take_and_register(folder: Path) -> Claim:
            claim = _take_patiently(take, folder) if attempt.watched else take(folder)
            on_error.callback(claim.release, unused=True)
            return claim

        record = functools.cache(lambda: describe_run(run, data()))
        try:
            if training.output_dir is None:
                claim, checkpoint, before = _choose_unnamed(run, record, take_and_register, resumable=not named)
            else:
                claim, checkpoint, before = _choose_named(run, record, take_and_register, training.output_dir)
        except OSError as error:
            where = error.filename or training.output_dir or OUTPUT
            raise UserError(f"{where} cannot be read: {error.strerror}", "choose another --output_dir") from error
        # A previous start may have got further; checkpoints beyond what it reached are older than the run.
        further = attempt.record.folder and checkpoint is not None and step_of(checkpoint) <= attempt.record.reached
        if named and not further:
            checkpoint = _named_checkpoint(record, Path(named))
        if training.resume and checkpoint is None:
            raise UserError(f"{claim.folder} holds no checkpoint to resume from", "start without --resume")
        on_error.pop_all()
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    resumed = None if checkpoint is None else before
    return RunChoice(settle(run, claim.folder, checkpoint), claim, checkpoint, resumed)


def settle(run: TrainingRun, folder: Path, checkpoint: Path | None) -> TrainingRun:
    """Return the run with its folder and checkpoint settled."""
    resumed = None if checkpoint is None else str(checkpoint)
    return with_training(run, output_dir=str(folder), resume_from_checkpoint=resumed)


def newest_intact_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be resumed from; damaged ones are reported. None without any.

    Raises:
        UserError: there are some, and all of them are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in found:
        problem = _unusable(checkpoint)
        if problem is None:
            return checkpoint
        say(f"{checkpoint} is not used: {problem}", style="yellow")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} is intact",
            "restore one from a copy, choose another --output_dir, or start over with --overwrite_output_dir",
        )
    return None


def _take_patiently(take: Take, folder: Path) -> Claim:
    """Claim a folder whose holder may be about to exit: rank 0 of a launcher that was killed and has come back."""
    with contextlib.suppress(BlockingIOError):
        return take(folder)
    say(f"{folder} is held by another process; waiting up to {RELEASE_SECONDS:.0f} s for it to exit")
    deadline = time.monotonic() + RELEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(BlockingIOError):
            return take(folder)
    return take(folder)


def _choose_unnamed(run: TrainingRun, record: Record, take: Take, resumable: bool) -> _Found:
    """Choose the next free folder, unless the last one holds the same run, unfinished, with a checkpoint."""
    folders = [OUTPUT / run.pipeline, *(OUTPUT / f"{run.pipeline}-{number}" for number in range(2, MAX_FOLDERS))]
    free = next(number for number, folder in enumerate(folders) if is_vacant(folder))
    if free and run.training.resume is not False and resumable:
        last = _resume_unnamed(record, take, folders[free - 1])
        if last is not None:
            return last
    for folder in folders[free:]:
        if is_vacant(folder):
            with contextlib.suppress(BlockingIOError):  # another run, started at the same time, has just taken it
                claim = take(folder)
                if is_vacant(folder):
                    return claim, None, None
                claim.release(unused=True)
    raise UserError(f"{OUTPUT} holds {MAX_FOLDERS} runs of {run.pipeline}", "name --output_dir")


def _resume_unnamed(record: Record, take: Take, folder: Path) -> _Found | None:
    """Claim a folder that nobody named; None unless it holds an unfinished run of these settings with a checkpoint."""
    try:
        if _unfinished_same(record, folder) is None:
            return None
        claim = take(folder)
    except (BlockingIOError, UserError):
        return None  # it is in use, or its run.json is damaged: nobody asked for that one
    before = _unfinished_same(record, folder)
    checkpoint = newest_intact_checkpoint(folder) if before is not None else None
    if before is not None and checkpoint is not None:
        check_same_run(folder, before, record(), checkpoint)
        return claim, checkpoint, before
    claim.release(unused=True)
    return None


def _unfinished_same(record: Record, folder: Path) -> dict[str, Any] | None:
    before = read_run_record(folder)
    if before is None or before.get("status") == "finished" or changes(before, record()):
        return None
    return before


def _choose_named(run: TrainingRun, record: Record, take: Take, named: str) -> _Found:
    folder = Path(named).absolute()
    check_folder_can_be_made(Path(os.path.realpath(folder)), f"--output_dir {named}")
    if run.training.overwrite_output_dir:
        # What the run reads, what an adapter needs later, and what is in use must not be deleted with the old run.
        check_none_held_below(folder)
        options: dict[str, list[Any]] = {"model": [run.model.model], "deepspeed": [run.training.deepspeed]}
        options |= {role: vars(run.data).get(role, []) for role in ROLES if role not in NAMES}
        if any(vars(run.data).get(role) for role in NAMES):
            options["dataset_dir"] = [vars(run.data)["dataset_dir"]]
        for option, values in options.items():
            for value in values:
                if isinstance(value, str):
                    check_not_replaced(value, option, folder)
    if not is_locked(folder / LOCK):
        _read_replaceable(run, folder, named)  # so that what is refused is not even locked
    try:
        claim = take(folder)
    except BlockingIOError as error:
        raise UserError(
            f"another process trains into {folder}", "wait until it exits, or choose another folder"
        ) from error
    before = _read_replaceable(run, folder, named)
    if before is None or run.training.overwrite_output_dir:
        return claim, None, before
    check_same_run(folder, before, record(), None)  # before checkpoints are hashed
    checkpoint = newest_intact_checkpoint(folder)
    check_same_run(folder, before, record(), checkpoint)
    return claim, checkpoint, before


def _read_replaceable(run: TrainingRun, folder: Path, named: str) -> dict[str, Any] | None:
    """Read run.json of a folder; None where the folder is empty.

    Raises:
        UserError: it holds something that this run can neither resume nor may replace.
    """
    before = read_run_record(folder)
    if before is None:
        if not is_vacant(folder):
            raise UserError(
                f"--output_dir {named} holds files that belong to no run", "choose an empty or a new folder"
            )
    elif not run.training.overwrite_output_dir and (before.get("status") == "finished" or run.training.resume is False):
        what = ", ".join(before.get(key) or f"{key} unknown" for key in ("pipeline", "status"))
        raise UserError(
            f"{named} holds another run ({what}, started {before.get('started', 'at an unknown time')})",
            "choose another --output_dir, or replace it: --overwrite_output_dir",
        )
    return before


def _named_checkpoint(record: Record, checkpoint: Path) -> Path:
    """Resolve and check what --resume_from_checkpoint names."""
    if not checkpoint.is_dir():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} is not a folder", "name a checkpoint-N folder, or `true`"
        )
    checkpoint = checkpoint.resolve()
    problem = _unusable(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} cannot be resumed from: {problem}", "name another checkpoint-N folder")
    if not re.fullmatch(r"checkpoint-[0-9]+", checkpoint.name):
        raise UserError(
            f"{checkpoint} cannot be resumed from: its name does not give the step",
            "name it checkpoint-N, N being the step, as it was",
        )
    before = read_run_record(checkpoint.parent)
    if before is not None:
        check_same_run(checkpoint.parent, before, record(), checkpoint)
    else:
        note = f"{checkpoint.parent} holds no run.json: whether data and settings are the same as before is unknown"
        say(note, style="yellow")
    return checkpoint


def _unusable(checkpoint: Path) -> str | None:
    """Say why a run cannot resume from a folder; None where it can."""
    problem = damage(checkpoint)
    if problem is None and not (checkpoint / STATES).is_file():
        return "it holds weights alone (--save_only_model)"
    return problem
