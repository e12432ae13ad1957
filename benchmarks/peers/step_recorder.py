"""What a trainer did and when, seen from inside its process: the same instrument for every contender.

Runs under each contender's own interpreter, so it imports nothing but torch and transformers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

IGNORE_INDEX = -100


class StepRecorder(TrainerCallback):
    """Writes to `result` when training ends: seconds, rows and tokens of the timed steps, losses, device memory.

    Args:
        result: the JSON file to write.
        warmup_steps: steps before the timed ones.
    """

    def __init__(self, result: Path, warmup_steps: int) -> None:
        self.result = result
        self.warmup_steps = warmup_steps
        self.batches: list[torch.Tensor] = []
        self.losses: dict[int, float] = {}
        self.begin = self.end = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Look at whatever the model is given from now on."""
        assert model is not None
        model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        self.begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the time; have the last step's loss logged on its own, and no other, as logs may cost time."""
        timed = state.global_step in (self.warmup_steps, state.max_steps)
        if timed and torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == self.warmup_steps:
            self.begin = time.perf_counter()
        if state.global_step == state.max_steps:
            self.end = time.perf_counter()
        if state.global_step >= state.max_steps - 1:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Keep the losses."""
        if logs is not None and "loss" in logs:
            self.losses[state.global_step] = float(logs["loss"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the result."""
        rows, tokens, trained, squares = torch.stack(self.batches[self.warmup_steps :]).sum(0).tolist()
        result = {
            "seconds": self.end - self.begin,
            "rows": rows,
            "tokens": tokens,
            "trained_tokens": trained,
            "squared_lengths": squares,
            "losses": self.losses,
            "device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        self.result.write_text(json.dumps(result), encoding="utf-8")

    def _see_batch(self, module: torch.nn.Module, arguments: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and inputs.get("labels") is not None:
            self.batches.append(count(inputs))


def count(inputs: dict[str, Any]) -> torch.Tensor:
    """[4] int64: rows, tokens without padding, trained tokens, sum of squared row lengths."""
    labels = inputs["labels"]
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None:
        lengths = mask.sum(1)
    else:
        # Padding has positions that stay at 0; rows have two tokens or more.
        following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
        tokens = ((positions > 0) | (following > 0)).flatten()
        starts = (positions == 0).flatten() & tokens
        lengths = torch.bincount(starts.cumsum(0)[tokens] - 1)
    trained = (labels[:, 1:] != IGNORE_INDEX).sum()
    return torch.stack([torch.tensor(len(lengths), device=labels.device), lengths.sum(), trained, (lengths**2).sum()])


def training_options(task: dict[str, Any]) -> dict[str, Any]:
    """The fields of transformers.TrainingArguments that all peers share, for a task (contest.py)."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": task["output_dir"],
        "max_steps": task["max_steps"],
        "per_device_train_batch_size": task["batch_size"],
        "gradient_accumulation_steps": 1,
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": task["precision"] == "bf16",
        "use_cpu": not cuda,
        "gradient_checkpointing": task["activation_checkpointing"],
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": task["seed"],
    }
