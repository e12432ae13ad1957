"""Trackers of --report_to: one tracked run per run folder, however often it resumes; their failures do not end it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.terminal import say_above_bars

# By tracker: the variables that identify its run and let it resume. Those that the user has set stay.
RUN_VARIABLES = {
    "wandb": ("WANDB_RUN_ID", "WANDB_RESUME"),
    "swanlab": ("SWANLAB_RUN_ID", "SWANLAB_RESUME"),
}


def name_tracked_run(training: TrainArguments, folder: Path, run_id: str) -> None:
    """Name the run of trackers after its folder; where the folder's run resumes, theirs does.

    Args:
        training: `report_to` names the trackers.
        folder: of the run.
        run_id: letters and digits that stay the same when the run resumes; "" on processes other than the first, which
            alone reports to trackers.
    """
    if training.run_name is None:
        training.run_name = folder.name
    for tracker in training.report_to or []:
        if tracker in RUN_VARIABLES:
            identity, resume = RUN_VARIABLES[tracker]
            if run_id and identity not in os.environ:
                os.environ[identity] = run_id
                os.environ.setdefault(resume, "allow")


def guard_trackers(trainer: Trainer) -> None:
    """Wrap the trackers of a trainer: one that fails is reported once and left out from then on."""
    for name in trainer.args.report_to or []:
        callback = trainer.pop_callback(INTEGRATION_TO_CALLBACK[name])
        if callback is not None:
            start = _start_swanlab if name == "swanlab" and trainer.is_world_process_zero() else None
            trainer.add_callback(_GuardedTracker(callback, name, start))


class _GuardedTracker(TrainerCallback):
    """Passes each event to a tracker until it fails: without network, login or space, or by a bug."""

    def __init__(self, tracker: TrainerCallback, name: str, start: Callable[[str | None], None] | None = None) -> None:
        """`start` takes the name of the run before training starts."""
        self.tracker: TrainerCallback | None = tracker
        self.name, self.start = name, start

    def forward(self, event: str, *arguments: Any, **keywords: Any) -> None:
        """Call the tracker's method for an event."""
        if self.tracker is None:
            return
        try:
            if event == "on_train_begin" and self.start is not None:
                self.start(arguments[0].run_name)
            getattr(self.tracker, event)(*arguments, **keywords)
        except Exception as error:  # of any kind: no failure of a tracker is worth ending a training
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            say_above_bars(f"--report_to {self.name} fails and is left out; training continues: {reason}")


def _start_swanlab(name: str | None) -> None:
    """Start the run: transformers asks for the current one, and SwanLab 0.10 raises an error where there is none."""
    import swanlab

    if not swanlab.has_run():
        identity, resume = (os.environ.get(variable) for variable in RUN_VARIABLES["swanlab"])
        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name=name, id=identity, resume=resume)


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(_GuardedTracker, _event, functools.partialmethod(_GuardedTracker.forward, _event))
