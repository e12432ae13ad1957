"""Trackers of --report_to: one run for one run folder, however often it goes on, and no training ends for them."""

from __future__ import annotations

import functools
import os
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
            trainer.add_callback(_Dispensable(callback, name))


class _Dispensable(TrainerCallback):
    """Hands each event on to a tracker, until it fails: it has no network, no login, no space, or breaks."""

    def __init__(self, tracker: TrainerCallback, name: str) -> None:
        self.tracker: TrainerCallback | None = tracker
        self.name = name

    def hand_on(self, event: str, *arguments: Any, **keywords: Any) -> None:
        """Call the tracker's method of this event."""
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, event)(*arguments, **keywords)
        except Exception as error:  # of any kind: whatever goes wrong there is not worth a training
            self.tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            say_above_bars(f"--report_to {self.name} fails and is left out; training goes on: {reason}")


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(_Dispensable, _event, functools.partialmethod(_Dispensable.hand_on, _event))
