"""What runs inside a training process of these tests: a pipeline, and a record of how far it has come.

The record is made from outside of the toolkit: from the interpreter's audit events (files made, renamed, removed) and
torch's hooks on every forward pass and optimizer step. The process stops itself at an event when asked to, so that it
can be killed exactly there.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

# Events of files: which of their arguments name paths.
CHANGES = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.remove": 1, "os.rmdir": 1, "shutil.rmtree": 1}
WRITING = os.O_WRONLY | os.O_RDWR
# Files of a run folder that are written all along.
GROWING = ("metrics.jsonl", "loss.", "logs", "run.")

Kind = Literal["begin", "train", "window", "epoch", "step", "evaluate", "save", "final"]
"""A change in the run folder before the first step; a forward pass of training; one with gradients already accumulated;
the first one after an evaluation; an optimizer step; a forward pass of evaluation; a change of a file or folder of a
checkpoint; a change beside the checkpoints."""


@dataclass(frozen=True)
class Stop:
    """The `count`-th event of a kind in one rank, before which that process stops itself."""

    kind: Kind
    count: int
    rank: int = 0


def train_here(stop: Stop | None, folder: Path, events: Path, pipeline: str, words: list[str]) -> None:
    """Run a pipeline as `python -m` does, into `folder`; write down the events."""
    record = _Record(folder, events, stop)
    sys.addaudithook(record.audit)
    register_module_forward_pre_hook(record.forward)
    register_optimizer_step_post_hook(record.step)
    importlib.import_module(f"{pipeline}.__main__").main(words)


class _Record:
    """Counts the events and writes each as a line `kind count what`."""

    def __init__(self, folder: Path, path: Path, stop: Stop | None) -> None:
        self.folder = folder
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.stop = stop
        self.counts: Counter[str] = Counter()
        self.accumulated = 0  # forward passes of training since the last optimizer step
        self.evaluated = False
        self.removed: Path | None = None  # the folder that shutil.rmtree removes, entry by entry, by bare names

    def happens(self, kind: Kind, what: str = "") -> None:
        self.counts[kind] += 1
        os.write(self.file, f"{kind} {self.counts[kind]} {what}\n".encode())
        if self.stop is not None and (kind, self.counts[kind]) == (self.stop.kind, self.stop.count):
            os.write(self.file, b"stopped\n")
            os.kill(os.getpid(), signal.SIGSTOP)

    def forward(self, module: Any, _: Any) -> None:
        if type(module).__name__.endswith("ForCausalLM"):
            self.passes("train" if module.training else "evaluate")

    def passes(self, kind: Kind) -> None:
        if kind == "train" and self.evaluated and self.counts["step"]:
            self.happens("epoch")
        if kind == "train" and self.accumulated:
            self.happens("window")
        self.accumulated += kind == "train"
        self.evaluated = kind == "evaluate"
        self.happens(kind)

    def step(self, *_: Any) -> None:
        self.accumulated = 0
        self.happens("step")

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING)):
            return
        named = [Path(os.fsdecode(path)) for path in arguments[: CHANGES[event]] if not isinstance(path, int)]
        inside = next((path for path in named if path.is_relative_to(self.folder)), None)
        if inside is not None:
            self.removed = inside if event == "shutil.rmtree" else None
        elif self.removed is not None and event in ("os.remove", "os.rmdir") and not named[0].is_absolute():
            inside = self.removed / named[0]
        if inside is not None:
            self.changes(event, inside.relative_to(self.folder))

    def changes(self, event: str, path: Path) -> None:
        if path.parts and "checkpoint-" in path.parts[0]:
            self.happens("save", f"{event} {path}")
        elif path.parts and not path.parts[0].startswith(GROWING) and self.counts["step"]:
            self.happens("final", f"{event} {path}")
        elif not self.counts["step"]:
            self.happens("begin", f"{event} {path}")


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    train_here(chosen and Stop(**chosen), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
