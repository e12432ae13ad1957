"""What runs inside a training process of these tests: a pipeline, and a record of how far it has come.

The record is made from outside of the toolkit: from the interpreter's audit events (files made, renamed, removed) and
torch's hooks on every forward pass and optimizer step. The process stops itself at an event when asked to, so that it
can be killed exactly there.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

# What multiprocessing's fork server imports once for all processes: most of the time of a start.
PRELOADED = [
    "pretrain.__main__", "finetune.__main__", "finetune_lora.__main__", "deepspeed", "matplotlib.pyplot",
    "tensorboard", "PIL.PngImagePlugin", "tests.faults.training_process",
]  # fmt: skip
# Events of files: which of their arguments name paths.
CHANGES = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.remove": 1, "os.rmdir": 1, "shutil.rmtree": 1}
WRITING = os.O_WRONLY | os.O_RDWR
# Files of a run folder that are written all along.
GROWING = ("metrics.jsonl", "loss.png", "logs", "run.json")

Kind = Literal["train", "window", "epoch", "step", "evaluate", "save", "final"]
"""Events: a forward pass of training; one with gradients already accumulated; the first one after an evaluation; an
optimizer step; a forward pass of evaluation; a change of a file or folder of a checkpoint; one beside the checkpoints."""


@dataclass(frozen=True)
class Stop:
    """The `count`-th event of a kind in one rank, before which that process stops itself."""

    kind: Kind
    count: int
    rank: int = 0


def train_here(pipeline: str, words: list[str], folder: Path, log: Path, variables: dict[str, str], stop: Stop | None
               ) -> None:  # fmt: skip
    """Run a pipeline as `python -m` does. Events go to `log` with the ending .events, what is printed goes to `log`."""
    os.setsid()
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    record = _Record(folder, log.with_suffix(".events"), stop)
    sys.addaudithook(record.audit)
    torch.set_num_threads(1)
    register_module_forward_pre_hook(record.forward)
    register_optimizer_step_post_hook(record.step)
    importlib.import_module(f"{pipeline}.__main__").main(words)


class _Record:
    """Counts the events and writes each as a line `kind count what`."""

    def __init__(self, folder: Path, path: Path, stop: Stop | None) -> None:
        self.folder = os.fspath(folder)
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.stop = stop
        self.counts: Counter[str] = Counter()
        self.accumulated = 0  # forward passes of training since the last optimizer step
        self.evaluated = False
        self.removed: str | None = None  # the folder that shutil.rmtree removes, entry by entry, by bare names

    def happens(self, kind: Kind, what: str = "") -> None:
        self.counts[kind] += 1
        os.write(self.file, f"{kind} {self.counts[kind]} {what}\n".encode())
        if self.stop is not None and (kind, self.counts[kind]) == (self.stop.kind, self.stop.count):
            os.write(self.file, b"stopped\n")
            os.kill(os.getpid(), signal.SIGSTOP)

    def forward(self, module: Any, inputs: Any) -> None:
        if type(module).__name__ == "Embedding" and module.training and type(inputs[0]) is torch.Tensor:
            os.write(self.file, f"rows {zlib.crc32(inputs[0].numpy().tobytes())}\n".encode())
        if not type(module).__name__.endswith("ForCausalLM"):
            return
        if not module.training:
            self.evaluated = True
            return self.happens("evaluate")
        if self.evaluated and self.counts["step"]:
            self.happens("epoch")
        self.evaluated = False
        if self.accumulated:
            self.happens("window")
        self.accumulated += 1
        return self.happens("train")

    def step(self, *_: Any) -> None:
        self.accumulated = 0
        self.happens("step")

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING)):
            return
        for path in arguments[: CHANGES[event]]:
            if isinstance(path, int):
                continue
            name = os.fsdecode(path)
            inside = name.startswith(self.folder + os.sep)
            if inside:
                self.removed = name if event == "shutil.rmtree" else None
                self.changes(event, name[len(self.folder) + 1 :])
                return
            if self.removed is not None and not os.path.isabs(name) and event in ("os.remove", "os.rmdir"):
                self.changes(event, f"{self.removed[len(self.folder) + 1 :]}{os.sep}{name}")
                return

    def changes(self, event: str, name: str) -> None:
        first = name.split(os.sep)[0]
        if "checkpoint-" in first:
            self.happens("save", f"{event} {name}")
        elif first not in GROWING and not name.startswith("run.json") and self.counts["step"]:
            self.happens("final", f"{event} {name}")
