"""Which folder a run gets, and which checkpoint it goes on from."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from novelgpt.settings.attempts import this_attempt
from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import is_locked
from novelgpt.settings.paths import OUTPUT, check_folder_can_be_made, check_not_replaced
from novelgpt.settings.run_record import read_run_record
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import say
from novelgpt.training.checkpoints.folders import step_of
from novelgpt.training.data_identity import DataSource, identify_data
from novelgpt.training.folder_claim import LOCK, Claim, check_none_held_below, is_vacant, look
from novelgpt.training.resume import FILES, changes, check_same_run, newest_whole_checkpoint, unusable
from novelgpt.training.run_record import describe_run

LEFT_SECONDS = 60.0  # for a rank that has lost its launcher to save and to end
MOST_NAMES = 10_000
NAME = re.compile(r"checkpoint-[0-9]+")
Take = Callable[[Path], Claim]
"""Claim a folder, or look at it; raises BlockingIOError where another process holds it."""
Choice = tuple[Claim, Path | None, dict[str, Any] | None]
"""The folder, the checkpoint to go on from, and run.json of the run that is there."""
Data = Callable[[], list[DataSource]]
"""What the run's data are: hashed when they are first asked for."""


def choose_run_folder(run: TrainingRun) -> None:
    """Settle the folder and the checkpoint as `claim_run_folder` would now, for a look: nothing is made or held.

    Raises:
        UserError: as there.
    """
    claim, checkpoint, _ = choose(run, functools.cache(lambda: identify_data(run)), look)
    settle(run, claim.folder, checkpoint)


def settle(run: TrainingRun, folder: Path, checkpoint: Path | None) -> None:
    """Note in the arguments of training what was chosen."""
    run.training.output_dir = str(folder)
    run.training.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)


def choose(run: TrainingRun, data: Data, take: Take) -> Choice:
    """Choose, and claim with `take` what is chosen; decisions are made while the folder is held.

    Raises:
        UserError: the folder that the user named holds another run, or none of its checkpoints is whole.
    """
    training, attempt = run.training, this_attempt().told
    if this_attempt().watched:
        take = functools.partial(_take_patiently, take)
    if attempt.folder is not None:  # that of the start before this one, by the same launcher
        training.output_dir, training.overwrite_output_dir, training.resume = attempt.folder, False, None
    named = training.resume_from_checkpoint
    if named and str(named).lower() in ("true", "false"):
        training.resume = str(named).lower() == "true"
        named = None
    if training.overwrite_output_dir and (named or training.resume):
        raise UserError("--overwrite_output_dir would delete what the run goes on from", "take one of the two")
    try:
        if training.output_dir is None:
            claim, checkpoint, before = _choose_unnamed(run, data, take, may_go_on=not named)
        else:
            claim, checkpoint, before = _choose_named(run, data, take, training.output_dir)
    except OSError as error:
        where = error.filename or training.output_dir or OUTPUT
        raise UserError(f"{where} cannot be read: {error.strerror}", "choose another --output_dir") from error
    try:
        # A start before this one may have come further; what lies beyond was there before it.
        further = attempt.folder is not None and checkpoint is not None and step_of(checkpoint) <= attempt.reached
        if named and not further:
            checkpoint = _named_checkpoint(run, data, Path(named))
        if training.resume and checkpoint is None:
            raise UserError(f"{claim.folder} holds no checkpoint to go on from", "start without --resume")
    except BaseException:
        claim.let_go(unused=True)
        raise
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    return claim, checkpoint, before


def _take_patiently(take: Take, folder: Path) -> Claim:
    """Claim a folder whose holder may be about to end: the rank 0 of a launcher that was killed and has come back."""
    deadline = time.monotonic() + LEFT_SECONDS
    told = False
    while True:
        try:
            return take(folder)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        if not told:
            say(f"{folder} is held by another process; waiting up to {LEFT_SECONDS:.0f} s for its end")
            told = True
        time.sleep(0.2)


def _choose_unnamed(run: TrainingRun, data: Data, take: Take, may_go_on: bool) -> Choice:
    """The next free folder, unless the last one holds the same run, unfinished, with a checkpoint."""
    folders = [OUTPUT / run.pipeline, *(OUTPUT / f"{run.pipeline}-{number}" for number in range(2, MOST_NAMES))]
    free = next(number for number, folder in enumerate(folders) if is_vacant(folder))
    if free and run.training.resume is not False and may_go_on:
        last = _go_on_with(run, data, take, folders[free - 1])
        if last is not None:
            return last
    for folder in folders[free:]:
        if not is_vacant(folder):
            continue
        try:
            claim = take(folder)
        except BlockingIOError:
            continue  # another run, started at the same time, has just taken it
        if is_vacant(folder):
            return claim, None, None
        claim.let_go(unused=True)
    raise UserError(f"{OUTPUT} holds {MOST_NAMES} runs of {run.pipeline}", "name --output_dir")


def _go_on_with(run: TrainingRun, data: Data, take: Take, folder: Path) -> Choice | None:
    """A folder that nobody named; None where it is no unfinished run of these settings with a checkpoint."""
    try:
        if _unfinished_same(run, data, folder) is None:
            return None
        claim = take(folder)
    except (BlockingIOError, UserError):
        return None  # it is being written, or its run.json is damaged: nobody asked for that one
    try:
        before = _unfinished_same(run, data, folder)
        checkpoint = newest_whole_checkpoint(folder) if before is not None else None
        if before is not None and checkpoint is not None:
            check_same_run(folder, before, describe_run(run, data()), checkpoint)
            return claim, checkpoint, before
    except BaseException:
        claim.let_go(unused=True)
        raise
    claim.let_go(unused=True)
    return None


def _unfinished_same(run: TrainingRun, data: Data, folder: Path) -> dict[str, Any] | None:
    before = read_run_record(folder)
    if before is None or before.get("status") == "finished" or changes(before, describe_run(run, data())):
        return None
    return before


def _choose_named(run: TrainingRun, data: Data, take: Take, named: str) -> Choice:
    folder = Path(named).absolute()
    check_folder_can_be_made(Path(os.path.realpath(folder)), f"--output_dir {named}")
    if run.training.overwrite_output_dir:
        _check_reads_nothing_there(run, folder)
    if not is_locked(folder / LOCK):
        _check_replaceable(run, folder, named)  # so that what is refused is not even locked
    try:
        claim = take(folder)
    except BlockingIOError as error:
        raise UserError(
            f"another process trains into {folder}", "wait for its end, or choose another folder"
        ) from error
    try:
        before = _check_replaceable(run, folder, named)
        if before is None or run.training.overwrite_output_dir:
            return claim, None, before
        check_same_run(folder, before, describe_run(run, data()), None)  # before checkpoints are read through
        checkpoint = newest_whole_checkpoint(folder)
        check_same_run(folder, before, describe_run(run, data()), checkpoint)
    except BaseException:
        claim.let_go(unused=True)
        raise
    return claim, checkpoint, before


def _check_reads_nothing_there(run: TrainingRun, folder: Path) -> None:
    """What a run reads, and an adapter needs later, must not go with the run that it replaces; nor what is in use.

    Raises:
        UserError: so it would.
    """
    check_none_held_below(folder)
    named: dict[str, list[Any]] = {"model": [run.model.model], "deepspeed": [run.training.deepspeed]}
    named |= {name: vars(run.data).get(name, []) for name in FILES}
    for option, values in named.items():
        for value in values:
            if isinstance(value, str):
                check_not_replaced(value, option, folder)


def _check_replaceable(run: TrainingRun, folder: Path, named: str) -> dict[str, Any] | None:
    """run.json of what a folder holds; None where it holds nothing.

    Raises:
        UserError: it holds something that this run neither goes on with nor was told to replace.
    """
    before = read_run_record(folder)
    if before is None:
        if not is_vacant(folder):
            raise UserError(f"--output_dir {named} holds files that are no run's", "choose an empty or a new folder")
    elif not run.training.overwrite_output_dir and (before.get("status") == "finished" or run.training.resume is False):
        what = ", ".join(before.get(key) or f"{key} unknown" for key in ("pipeline", "status"))
        raise UserError(
            f"{named} holds another run ({what}, started {before.get('started', 'at an unknown time')})",
            "choose another --output_dir, or replace it: --overwrite_output_dir",
        )
    return before


def _named_checkpoint(run: TrainingRun, data: Data, checkpoint: Path) -> Path:
    """What --resume_from_checkpoint names, where it lies: of a link, what that points to."""
    if not checkpoint.is_dir():
        raise UserError(f"--resume_from_checkpoint {checkpoint} is no folder", "name a checkpoint-N folder, or `true`")
    checkpoint = checkpoint.resolve()
    problem = unusable(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} cannot be gone on from: {problem}", "name another checkpoint-N folder")
    if not NAME.fullmatch(checkpoint.name):
        raise UserError(
            f"{checkpoint} cannot be gone on from: its name does not say the step",
            "name it checkpoint-N, N being the step, as it was",
        )
    before = read_run_record(checkpoint.parent)
    if before is not None:
        check_same_run(checkpoint.parent, before, describe_run(run, data()), checkpoint)
    else:
        note = f"{checkpoint.parent} holds no run.json: nothing tells whether data and settings are those of before"
        say(note, style="yellow")
    return checkpoint
