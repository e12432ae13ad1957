"""output/RUN/: claimed before anything is loaded, held until the run ends, and complete with its result files."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import (
    all_processes_values,
    first_process_value,
    in_process_group,
    is_first_process,
    raise_on_all_ranks,
)
from novelgpt.settings.run_record import RUN_FILE, DataSource, only_json, this_attempt, utc_now, write_run_record
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import say
from novelgpt.training.checkpoints.folders import checkpoints
from novelgpt.training.folder_claim import LOCK, check_none_held_below, empty, snapshot, take
from novelgpt.training.run_choice import RunChoice, choose, settle
from novelgpt.training.run_identity import check_unwritten, describe_run, identify_data
from novelgpt.training.signals import StopOnSignal, Stopped

# Where a replaced run waits to be deleted; after a kill in between, the next run deletes it.
REPLACED = "replaced.unfinished"
# Network file systems show new files late where a host has looked before.
VISIBLE_SECONDS = 30.0
TRAIN_RESULTS, EVAL_RESULTS, ALL_RESULTS = "train_results.json", "eval_results.json", "all_results.json"
RESULT_FILES = (TRAIN_RESULTS, EVAL_RESULTS, ALL_RESULTS, TRAINER_STATE_NAME)


@dataclass
class RunFolder:
    """The folder of a run, on each of its processes; the first one holds it and writes there.

    Attributes:
        run: with its folder and checkpoint settled.
        path: absolute.
        checkpoint: that the run resumes from; None for a fresh start.
        stop: has listened for signals since before the folder was made.
        record: what run.json holds, on the first process, once the run has started.
    """

    run: TrainingRun
    path: Path
    checkpoint: Path | None
    stop: StopOnSignal
    record: dict[str, Any] = field(default_factory=dict)
    _choice: RunChoice | None = None  # on the first process
    _data: list[DataSource] = field(default_factory=list)
    _contents: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def start(self, run: TrainingRun) -> None:
        """Write run.json with status "running", in place of a run that was there and is not resumed.

        All ranks call it. From here on a signal finds a folder that belongs to the run.

        Args:
            run: with everything settled.

        Raises:
            UserError: what is to be replaced, or the data, are not what they were when the folder was chosen.
        """
        self.stop.only_note()
        with raise_on_all_ranks():
            if self._choice is not None:
                try:
                    check_unwritten(self._data)
                    self._start(self._choice, describe_run(run, self._data) | {"status": "running"})
                except OSError as error:
                    raise UserError(
                        f"{error.filename or self.path} cannot be written: {error.strerror}",
                        "make room there, or name another --output_dir",
                    ) from error
                this_attempt().begin(self.path, self.checkpoint)
        self.stop.stop_immediately()

    def finish(self, results: dict[str, Any]) -> None:
        """Note in run.json that the run is complete, with its final figures."""
        self._write(self.record | {"status": "finished", "finished": utc_now(), "results": results})
        this_attempt().finish()

    def release(self, _: object, error: BaseException | None, __: object) -> None:
        """Release the folder, and remove what is in it where the run has not completed a first step.

        Args:
            error: that ends the run; None where it is complete. The arguments are those of `__exit__`.
        """
        if self._choice is None:
            return
        if error is not None and self.record:
            if not (self._choice.resumed is not None or self.stop.trained or checkpoints(self.path)):
                empty(self.path)  # before the first step: what is there looks like a run
            elif isinstance(error, Stopped):
                try:
                    self._write(self.record | {"status": "stopped", "stopped_by": error.signal})
                except OSError as problem:  # the run can be resumed all the same
                    reason = problem.strerror or problem
                    say(f"{self.path / RUN_FILE} cannot note that the run was stopped: {reason}", style="yellow")
        self._choice.claim.release(unused=not self.record)

    def _start(self, choice: RunChoice, record: dict[str, Any]) -> None:
        if not choice.claim.holds():
            raise UserError(f"{self.path} was moved or deleted while this run loaded", "start again")
        before = choice.resumed or {}
        record["id"] = before.get("id") or secrets.token_hex(8)  # for trackers, whose runs are resumed as well
        restarts = this_attempt().restarts(choice.checkpoint)
        if choice.resumed is not None and choice.checkpoint is not None:
            again = {"at": record["started"], "checkpoint": choice.checkpoint.name}
            record["started"] = before.get("started", record["started"])
            record["resumed"] = [*before.get("resumed", []), again]
            known = {entry.get("at") for entry in restarts}
            restarts = [entry for entry in before.get("restarts", []) if entry.get("at") not in known] + restarts
        if restarts:
            record["restarts"] = restarts
        if choice.resumed is not None:
            self._write(record)
            for name in RESULT_FILES:  # of an attempt that was killed when it was almost complete
                (self.path / name).unlink(missing_ok=True)
            return
        changed = sorted({name for name, _ in snapshot(self.path).items() ^ self._contents.items()})
        if changed:
            raise UserError(
                f"{self.path} was changed by something else after this run had chosen it: {', '.join(changed[:3])}",
                "check its content and start again, or choose another --output_dir",
            )
        check_none_held_below(self.path)
        # At no moment does the folder have a run.json beside what belongs to another run.
        aside = self.path / REPLACED
        if self._contents:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(exist_ok=True)
            for path in self.path.iterdir():
                if path.name not in (LOCK, RUN_FILE, REPLACED):
                    path.rename(aside / path.name)
        self._write(record)
        if self._contents:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, record: dict[str, Any]) -> None:
        write_run_record(self.path, record)
        self.record = record


@contextmanager
def claim_run_folder(run: TrainingRun) -> Iterator[RunFolder]:
    """Claim the folder of a run for the block, and choose the checkpoint that it resumes from. All ranks call it.

    An unfinished run of the same settings is resumed from its newest intact checkpoint. A run that is replaced stays as
    it is until `RunFolder.start`. After an error or a signal before the first step, what was made is removed again;
    until then, signals end the block immediately.

    Raises:
        UserError: the folder that the user named holds another run, none of its checkpoints is intact, or not all hosts
            see it.
        Stopped: a signal arrived.
    """
    # Signals are only noted until the folder is this run's, and while it is released.
    with StopOnSignal() as stop, ExitStack() as stack:
        try:
            folder = _claim_together(run, stop)
            stack.push(folder.release)
            stop.stop_immediately()
            _check_shared(folder)
            yield folder
        except BaseException as error:
            stop.only_note()
            if isinstance(error, Stopped) and is_first_process():
                say(error.explain())
            raise


def _claim_together(run: TrainingRun, stop: StopOnSignal) -> RunFolder:
    """Claim a folder on the first process, and settle the run on all of them."""
    choice: RunChoice | None = None
    data: list[DataSource] = []
    with ExitStack() as on_error:
        with raise_on_all_ranks():
            if is_first_process():
                data = identify_data(run)  # before it is read
                choice = choose(run, lambda: data, take)
                on_error.callback(choice.claim.release, unused=True)
        contents = snapshot(choice.claim.folder) if choice is not None and choice.checkpoint is None else {}
        path, checkpoint = first_process_value(None if choice is None else (choice.claim.folder, choice.checkpoint))
        on_error.pop_all()
    settled = settle(run, path, checkpoint) if choice is None else choice.run
    return RunFolder(settled, path, checkpoint, stop, _choice=choice, _data=data, _contents=contents)


def _check_shared(folder: RunFolder) -> None:
    """Probe whether all hosts see what the first one writes where the folder is or will be. All ranks call it.

    Raises:
        UserError: names the hosts that do not, on all ranks.
    """
    if not in_process_group():
        return
    ranks = distributed.get_world_size()
    if ranks == int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):
        return
    token = ""
    if folder._choice is not None:
        made = folder._choice.claim.made
        descriptor, token = tempfile.mkstemp(prefix=".shared-", dir=made[-1].parent if made else folder.path)
        os.close(descriptor)
    path = Path(first_process_value(token))
    try:
        answers = all_processes_values(None if _appears(path) else socket.gethostname())
    finally:
        if is_first_process():
            path.unlink()
    blind = sorted({answer for answer in answers if answer is not None})
    if blind:
        raise UserError(
            f"{', '.join(blind)} does not see what the first host writes into {path.parent}",
            f"name an --output_dir on a file system that all hosts share, in place of {folder.path}",
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        if path.parent.is_dir() and path in path.parent.iterdir():
            return True
        time.sleep(0.5)
    return False


def write_result_files(
    folder: Path, state: TrainerState, training: dict[str, Any], train_rows: int, eval_rows: int
) -> None:
    """Write the files, each of them atomically; called by the first process only.

    Args:
        folder: of the run.
        state: at its end; the last evaluation of its history is that of the weights that are saved.
        training: figures of training, as Trainer.train returns them.
        train_rows: number of training rows.
        eval_rows: number of rows evaluated on.
    """
    evaluation = next(entry for entry in reversed(state.log_history) if "eval_loss" in entry)
    evaluation = {name: value for name, value in evaluation.items() if name != "step"}
    evaluation |= {"perplexity": evaluation["eval_perplexity"], "eval_samples": eval_rows}
    training = training | {"train_samples": train_rows}
    # Of the best checkpoint's weights, the evaluation has an epoch of its own; the run's is that of training.
    figures = {TRAIN_RESULTS: training, EVAL_RESULTS: evaluation, ALL_RESULTS: evaluation | training}
    for name, content in figures.items():
        atomic_write(folder / name, json.dumps(only_json(content), indent=4, sort_keys=True) + "\n")
    # This file may leave the machine: it names the best checkpoint, which is beside it, without its path.
    best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
    content = only_json(dataclasses.asdict(dataclasses.replace(state, best_model_checkpoint=best)))
    atomic_write(folder / TRAINER_STATE_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")
