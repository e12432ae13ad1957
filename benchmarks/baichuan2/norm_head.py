"""Evaluation losses of one batch under every version of Baichuan2's NormHead, on DeepSpeed's ZeRO-2 and ZeRO-3.

    python benchmarks/baichuan2/norm_head.py [--json FILE]

The original code normalises the head's rows in training, and in evaluation overwrites the weight by its normalised
rows, once, to save time. Its three published versions differ in how:

* v0 (2023-09-06) makes a new parameter, which the optimizer does not know;
* v1 (2023-09-08) writes into the weight's data, and never again;
* v2 (2023-09-12) writes again after each training step.

Under ZeRO-3 a weight is whole only while its module runs: what is written into it is gone afterwards. The same batch
is evaluated three times, then after a training step of rate 0 three times more: six equal numbers are right. Each case
runs in a process of its own with real DeepSpeed, bf16, and head rows of norm 1.7.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import make_console, make_parser, result, show_results, write_results
from small_model import Source, evaluation_loss, make_model

VERSIONS = ["v0", "v1", "v2", "native"]
STAGES = [2, 3]
ROW_NORM = 1.7
# Largest difference between two evaluations of one batch, in nats.
SAME = 1e-6


class OverwritingHead(nn.Linear):
    """The three versions, as their behaviour is described above."""

    def __init__(self, weight: torch.Tensor, version: str) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.weight = nn.Parameter(weight.detach().clone())
        self.version = version
        self.overwrite = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, with the weight changed on the way."""
        if self.training:
            self.overwrite = self.overwrite or self.version == "v2"
            return functional.linear(hidden, functional.normalize(self.weight))
        if self.overwrite:
            self.overwrite = False
            if self.version == "v0":
                self.weight = nn.Parameter(functional.normalize(self.weight))
            else:
                self.weight.data = functional.normalize(self.weight)
        return functional.linear(hidden, self.weight)


def run(version: str, stage: int) -> dict[str, Any]:
    """Six evaluations of one batch, or what DeepSpeed says; in a process of its own."""
    import deepspeed  # slow to import, and of no use to the process that starts the others

    model = make_model().to(torch.bfloat16)
    with torch.no_grad():
        weight = functional.normalize(model.lm_head.weight.float()) * ROW_NORM
        model.lm_head.weight.copy_(weight)
    if version != "native":
        model.lm_head = OverwritingHead(model.lm_head.weight, version)
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    settings = {"train_micro_batch_size_per_gpu": 16, "bf16": {"enabled": True}, "zero_optimization": zero,
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    rows = Source(seed=2).rows()
    losses: list[float] = []
    try:
        for round_of_three in range(2):
            if round_of_three:
                engine.train()
                engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
                engine.step()
            losses += [evaluation_loss(engine, rows) for _ in range(3)]
    except (RuntimeError, AttributeError) as error:
        return {"losses": losses, "failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"losses": losses, "failure": None}


def in_own_process(version: str, stage: int) -> dict[str, Any]:
    """What `run` returns there; DeepSpeed's settings are those of a single rank on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    words = [sys.executable, __file__, "--one", version, str(stage)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"losses"')]
    if not lines:
        raise SystemExit(f"{version} under ZeRO-{stage}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


def main() -> None:
    """A line for each version and stage."""
    parser = make_parser("Baichuan2's NormHead under ZeRO")
    parser.add_argument("--one", nargs=2, metavar=("VERSION", "STAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("\n" + json.dumps(run(arguments.one[0], int(arguments.one[1]))))
        return
    console = make_console()
    table = Table("NormHead", "ZeRO", "evaluations 1 to 3", "and after a step of rate 0")
    results = []
    for version in VERSIONS:
        for stage in STAGES:
            outcome = in_own_process(version, stage)
            losses = outcome["losses"]
            shown = [" ".join(f"{loss:.4f}" for loss in losses[begin : begin + 3]) for begin in (0, 3)]
            shown[-1] = f"{shown[-1]} {outcome['failure'] or ''}".strip()
            table.add_row(version, str(stage), *shown)
            if version == "native":
                spread = max(losses) - min(losses)
                results.append(result(f"native_norm_head_evaluations_differ_zero_{stage}", spread, "nats", SAME))
    console.print(table)
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
