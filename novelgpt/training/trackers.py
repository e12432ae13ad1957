"""Trackers of --report_to: one run for one run folder, however often it goes on, and no training ends for them."""

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

# By tracker: what tells its runs apart, and lets one go on. What the user has set stays.
RUN_VARIABLES = {
    "wandb": ("WANDB_RUN_ID", "WANDB_RESUME"),
    "swanlab": ("SWANLAB_RUN_ID", "SWANLAB_RESUME"),
}


def name_tracked_run(training: TrainArguments, folder: Path, run_id: str) -> None:
    """Name the run of trackers after its folder; where the folder's run goes on, theirs does.

    Args:
        training: whose trackers are those that `report_to` names.
        folder: of the run.
        run_id: letters and digits that stay the same when the run goes on; "" on other processes than the first,
            which alone talks to trackers.
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
    """From here on, a tracker that fails is told once and left out."""
    for name in trainer.args.report_to or []:
        callback = trainer.pop_callback(INTEGRATION_TO_CALLBACK[name])
        if callback is not None:
            begin = _begin_swanlab if name == "swanlab" and trainer.is_world_process_zero() else None
            trainer.add_callback(_Dispensable(callback, name, begin))


class _Dispensable(TrainerCallback):
    """Hands each event on to a tracker, until it fails: it has no network, no login, no space, or breaks."""

    def __init__(self, tracker: TrainerCallback, name: str, begin: Callable[[str | None], None] | None = None) -> None:
        """`begin` takes the name of the run before training begins."""
        self.tracker: TrainerCallback | None = tracker
        self.name, self.begin = name, begin

    def hand_on(self, event: str, *arguments: Any, **keywords: Any) -> None:
        """Call the tracker's method of this event."""
        if self.tracker is None:
            return
        try:
            if event == "on_train_begin" and self.begin is not None:
                self.begin(arguments[0].run_name)
            getattr(self.tracker, event)(*arguments, **keywords)
        except Exception as error:  # of any kind: whatever goes wrong there is not worth a training
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            say_above_bars(f"--report_to {self.name} fails and is left out; training goes on: {reason}")


def _begin_swanlab(name: str | None) -> None:
    """Begin the run, as transformers asks for one that SwanLab 0.10 raises an error about where there is none."""
    import swanlab

    if not swanlab.has_run():
        identity, resume = (os.environ.get(variable) for variable in RUN_VARIABLES["swanlab"])
        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name=name, id=identity, resume=resume)


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(_Dispensable, _event, functools.partialmethod(_Dispensable.hand_on, _event))
