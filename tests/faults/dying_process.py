"""A rank that the launcher starts: a pipeline that is killed -9 in a step that was told, another one for each start.

python -m novelgpt.launch --processes 2 --max_restarts 3 tests.faults.dying_process PLAN pipeline --flag value …
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook


def train_and_die(plan: Path, pipeline: str, words: list[str]) -> None:
    """Run a pipeline as `python -m` does; die where the plan says so for this rank and this start.

    Args:
        plan: file of `{"RANK": [step of start 0, of start 1, …]}`, of predictions the forward pass in its place; rank
            and start are noted beside it.
        pipeline: to run.
        words: of its command line.
    """
    rank = os.environ.get("RANK", "0")
    starts = plan.with_suffix(f".{rank}")
    number = len(starts.read_bytes()) if starts.exists() else 0
    with starts.open("ab") as file:
        file.write(b".")
    last = dict(enumerate(json.loads(plan.read_text(encoding="utf-8")).get(rank, []))).get(number)
    passes = steps = 0
    stepped = True

    def count_pass(module: Any, _: Any) -> None:
        nonlocal passes, stepped
        if type(module).__name__.endswith("ForCausalLM"):
            passes, stepped = passes + 1, False
            die(pipeline == "predict" and passes == last)

    def count_step(*_: Any) -> None:
        nonlocal steps, stepped
        steps, stepped = steps + (not stepped), True  # ZeRO steps each group of weights by itself
        die(steps == last)

    def die(now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_pre_hook(count_pass)
    register_optimizer_step_post_hook(count_step)
    importlib.import_module(f"{pipeline}.__main__").main(words)


if __name__ == "__main__":
    train_and_die(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
