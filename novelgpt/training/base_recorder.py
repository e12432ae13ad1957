"""base.json beside every adapter that a run saves: the base it belongs to."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from novelgpt.model.fingerprint import base_folder, weights_fingerprint, write_base_record
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import say


class BaseRecorder(TrainerCallback):
    """Writes base.json into each folder of adapter weights: checkpoints and, at the end, the run folder.

    The base is hashed once, by the first process, in a background thread that starts with training and ends with the
    process. Runs that train all weights have no base to record.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.base: str | None = None
        if isinstance(model, PeftModel):
            self.base = str(model.peft_config[model.active_adapter].base_model_name_or_path)
        self.fingerprint: Future[str] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start hashing."""
        if self.base is not None and state.is_world_process_zero:
            self._start(self.base)

    def record(self, folder: Path) -> None:
        """Write base.json into the folder of an adapter; called by the first process only.

        A base that can no longer be hashed (its folder was moved) causes a warning: the adapter itself is sound.
        """
        if self.base is None:
            return
        fingerprint = self.fingerprint or self._start(self.base)
        try:
            write_base_record(folder, self.base, fingerprint.result())
        except (UserError, OSError) as error:
            say(f"{folder} gets no base.json: {error}", style="yellow", stderr=True)

    def _start(self, base: str) -> Future[str]:
        self.fingerprint = future = Future[str]()
        threading.Thread(target=_fingerprint_into, args=(future, base), name="base-fingerprint", daemon=True).start()
        return future


def _fingerprint_into(future: Future[str], base: str) -> None:
    try:
        future.set_result(weights_fingerprint(base_folder(base), threads=1))
    except Exception as error:  # for the thread that asks for the result
        future.set_exception(error)
