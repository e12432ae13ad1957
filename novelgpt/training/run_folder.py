"""output/RUN/, from the moment it is chosen, made and locked, before anything is loaded, to the end of the run."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from novelgpt.settings.attempts import this_attempt
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import first_process_value, is_first_process, raise_on_all_ranks
from novelgpt.settings.run_record import RUN_FILE, DataSource
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import say
from novelgpt.training.checkpoints.folders import checkpoints
from novelgpt.training.data_identity import check_unwritten, identify_data
from novelgpt.training.folder_claim import LOCK, Claim, check_none_held_below, empty, snapshot, take
from novelgpt.training.result_files import remove_result_files
from novelgpt.training.run_choice import choose, settle
from novelgpt.training.run_record import describe_run, now, write_run
from novelgpt.training.shared_folder import check_shared_folder
from novelgpt.training.signals import StopOnSignal, Stopped

# Where the run that is replaced waits to be deleted; a kill in between leaves it for the next one.
REPLACED = "replaced.unfinished"


@dataclass
class RunFolder:
    """The folder of a run, on each of its processes; the first one holds it and writes there.

    Attributes:
        path: absolute.
        checkpoint: that the run goes on from; None where it begins.
        stop: that has listened for signals since before the folder was made.
        found: the folder, or the nearest one above it, that was there before.
        trained: whether there was a step, so that there is something to keep.
    """

    path: Path
    checkpoint: Path | None
    stop: StopOnSignal
    found: Path
    trained: bool = False
    _claim: Claim | None = None
    _data: list[DataSource] = field(default_factory=list)
    _before: dict[str, Any] | None = None
    _contents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _description: dict[str, Any] = field(default_factory=dict)

    def begin(self, run: TrainingRun) -> None:
        """Write run.json with status "running", in place of the run that was there where this one does not go on.

        All ranks call it. From here on a signal finds a folder that is the run's own.

        Raises:
            UserError: what shall be replaced, or the data, are not what was there when the folder was chosen.
        """
        self.stop.only_note()
        with raise_on_all_ranks():
            if is_first_process():
                try:
                    check_unwritten(self._data)
                    self._begin(describe_run(run, self._data) | {"status": "running"})
                    this_attempt().begin(self.path, self.checkpoint)
                except OSError as error:
                    cause = f"{error.filename or self.path} cannot be written: {error.strerror}"
                    raise UserError(cause, "make room there, or name another --output_dir") from error
        self.stop.end_at_once()

    @property
    def description(self) -> dict[str, Any]:
        """What run.json holds, on the first process, once the run has begun."""
        return self._description

    def finish(self, results: dict[str, Any]) -> None:
        """Note in run.json that the run is complete, with its final figures."""
        self._write(self._description | {"status": "finished", "finished": now(), "results": results})
        this_attempt().finish()

    def leave(self, error: BaseException | None) -> None:
        """Let go of the folder, and of what is in it where the run has not come to a first step.

        Args:
            error: that ends the run; None where it is complete.
        """
        if self._claim is None:
            return
        if error is not None and self._description:
            if not (self._goes_on or self.trained or checkpoints(self.path)):
                empty(self.path)  # before the first step: what is there looks like a run
            elif isinstance(error, Stopped):
                try:
                    self._write(self._description | {"status": "stopped", "stopped_by": error.signal})
                except OSError as problem:  # the run goes on all the same
                    reason = problem.strerror or problem
                    say(f"{self.path / RUN_FILE} cannot note that the run was stopped: {reason}", style="yellow")
        self._claim.let_go(unused=not self._description)

    @property
    def _goes_on(self) -> bool:
        """Whether the run that the folder holds is the one that is gone on with."""
        return self._before is not None and self.checkpoint is not None

    def _begin(self, description: dict[str, Any]) -> None:
        if self._claim is None or not self._claim.holds():
            raise UserError(f"{self.path} was moved or deleted while this run loaded", "start again")
        restarts = this_attempt().restarts(self.checkpoint)
        before = self._before if self._before is not None and self.checkpoint is not None else {}
        description["id"] = before.get("id") or secrets.token_hex(8)  # for trackers, whose runs go on as well
        if self._before is not None and self.checkpoint is not None:
            again = {"at": description["started"], "checkpoint": self.checkpoint.name}
            description["started"] = self._before.get("started", description["started"])
            description["resumed"] = [*self._before.get("resumed", []), again]
            known = {entry.get("at") for entry in restarts}
            earlier = [entry for entry in self._before.get("restarts", []) if entry.get("at") not in known]
            self._write(description | ({"restarts": [*earlier, *restarts]} if earlier or restarts else {}))
            remove_result_files(self.path)
            return
        changed = sorted({name for name, _ in snapshot(self.path).items() ^ self._contents.items()})
        if changed:
            raise UserError(
                f"{self.path} was changed by something else after this run had chosen it: {', '.join(changed[:3])}",
                "look at what it holds, and start again, or choose another --output_dir",
            )
        self._replace(description | ({"restarts": restarts} if restarts else {}))

    def _write(self, description: dict[str, Any]) -> None:
        write_run(self.path, description)
        self._description = description

    def _replace(self, description: dict[str, Any]) -> None:
        """At no moment has the folder a run.json beside what belongs to another run."""
        check_none_held_below(self.path)
        aside = self.path / REPLACED
        if self._contents:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(exist_ok=True)
            for path in self.path.iterdir():
                if path.name not in (LOCK, RUN_FILE, REPLACED):
                    path.rename(aside / path.name)
        self._write(description)
        if self._contents:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def claim_run_folder(run: TrainingRun) -> Iterator[RunFolder]:
    """The folder that a run gets, for the block. All ranks call it; `run.training` notes the folder and the checkpoint.

    A folder that holds an unfinished run of the same settings is gone on with, from its newest whole checkpoint. What
    the run replaces stays as it is until `begin`. After an error or a signal before the first step, what was made is
    gone again; signals end the block at once until then.

    Raises:
        UserError: the folder that the user named holds another run, none of its checkpoints is whole, or not all hosts
            see it.
        Stopped: a signal came.
    """
    stop = StopOnSignal()
    stop.listen()  # signals are only noted until the folder is this run's
    folder: RunFolder | None = None
    problem: BaseException | None = None
    try:
        folder = _claim_together(run, stop)
        stop.end_at_once()
        check_shared_folder(folder.found)
        yield folder
    except BaseException as error:
        problem = error
        stop.only_note()
        if isinstance(error, Stopped) and is_first_process():
            say(error.explain())
        raise
    finally:
        try:
            if folder is not None:
                folder.leave(problem)
        finally:
            stop.leave()


def _claim_together(run: TrainingRun, stop: StopOnSignal) -> RunFolder:
    """Let the first process choose; all ranks raise its errors."""
    claim: Claim | None = None
    chosen: tuple[Path, Path | None, Path] | None = None
    own: dict[str, Any] = {}
    try:
        with raise_on_all_ranks():
            if is_first_process():
                data = identify_data(run)  # before it is read
                claim, checkpoint, before = choose(run, lambda: data, take)
                contents = snapshot(claim.folder) if checkpoint is None else {}
                own = {"_claim": claim, "_data": data, "_before": before, "_contents": contents}
                chosen = claim.folder, checkpoint, claim.made[-1].parent if claim.made else claim.folder
        chosen = first_process_value(chosen)
    except BaseException:
        if claim is not None:
            claim.let_go(unused=True)
        raise
    assert chosen is not None
    path, checkpoint, found = chosen
    settle(run, path, checkpoint)
    return RunFolder(path, checkpoint, stop, found, **own)
