"""How fast a CPU trains beside another busy program, and what that costs when it is alone.

    python benchmarks/busy_machine.py [--models tiny medium] [--rounds 4] [--seconds 2.5] [--json FILE]

Pretraining as the command runs it, of the small base and of a Qwen3 of 42 M random weights, in two processes a model:
one as it is (novelgpt/model/shared_cores.py), one with libgomp's default spin count set by hand, with which the toolkit
leaves all as libgomp has it. The processes take turns, alone and beside a program that needs one core; each has a while
to settle before it is timed. Speeds are medians over the rounds; one beside the program is compared with the faster of
the two alone. Anything else that runs on the machine spoils them. A model takes two or three minutes on 2 CPU cores.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers.trainer
from results import at_least, make_console, make_parser, show_results, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from novelgpt.model.tiny_random import build_tiny_random
from novelgpt.settings.small_bases import TINY_RANDOM

TINY, MEDIUM = "tiny", "medium"
SHIPPED, PLAIN = "this toolkit", "libgomp's default"
# libgomp's own number where none is set; whoever sets one decides for the toolkit, too.
VARIABLES: dict[str, dict[str, str]] = {SHIPPED: {}, PLAIN: {"GOMP_SPINCOUNT": "300000"}}
ALONE, BESIDE = "alone", "beside a busy program"
COLUMNS = ((ALONE, SHIPPED), (BESIDE, SHIPPED), (BESIDE, PLAIN))
WARMUP_STEPS = 5
SETTLING_SECONDS = 1.5
BLOCK_TOKENS = 256
ALONE_TARGET, BESIDE_TARGET = 0.95, 0.6


class Turns(TrainerCallback):
    """Trains when the other end of the pipe says so, for as long as it says, and tells the steps per second."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.steps = 0
        self.begin: float | None = None
        self.settled = self.end = self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Between two steps: note the time, or wait for the next turn."""
        now = time.perf_counter()
        if now < self.settled or self.steps < WARMUP_STEPS:
            self.steps += 1
            return
        if self.begin is None:
            # From here, as a step may take longer than settling.
            self.begin, self.end, self.steps = now, now + self.seconds, WARMUP_STEPS
        if now < self.end:
            self.steps += 1
            return
        # The first time, when nothing is timed, it says that all is ready.
        self.pipe.send((self.steps - WARMUP_STEPS) / (now - self.begin) if self.seconds else 0.0)
        self.seconds = self.pipe.recv()
        self.settled, self.begin = time.perf_counter() + SETTLING_SECONDS, None


def train(pipe: Connection, model: str, folder: str) -> None:
    """`python -m pretrain` in this process, until it is ended."""
    with Path(folder, "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    transformers.trainer.DEFAULT_CALLBACKS.append(Turns(pipe))
    sys.argv = ["pretrain", "--model", model, "--output_dir", f"{folder}/run", "--max_steps", "1000000"]
    sys.argv += ["--max_length", str(BLOCK_TOKENS), "--per_device_train_batch_size", "1", "--learning_rate", "1e-5"]
    sys.argv += ["--eval_strategy", "no", "--eval_on_start", "False", "--save_strategy", "no"]
    runpy.run_module("pretrain", run_name="__main__", alter_sys=True)


@dataclass
class Trainer:
    """A process that trains by turns."""

    process: Any
    pipe: Connection

    def steps_per_second(self, seconds: float) -> float:
        """Of a turn that is timed for so long."""
        self.pipe.send(seconds)
        return float(self.pipe.recv())


@contextmanager
def trainer(setting: str, model: str) -> Iterator[Trainer]:
    """A process under the variables of a setting, ready to train."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(kept | VARIABLES[setting] | {"HF_HUB_OFFLINE": "1"})
        # No daemon, as training starts processes of its own; it is ended below.
        process = context.Process(target=train, args=(theirs, model, folder))
        process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()
        try:
            try:
                ours.recv()
            except EOFError:
                sys.exit(f"training failed:\n{Path(folder, 'log.txt').read_text(errors='replace')[-2000:]}")
            yield Trainer(process, ours)
        finally:
            process.kill()
            process.join()


@contextmanager
def busy_program(wanted: bool) -> Iterator[None]:
    """A program that needs one core for as long as the body runs."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def make_medium_model(folder: Path) -> str:
    """A Qwen3 of 42 M random weights, with the tokenizer of the small base."""
    tokenizer_folder = folder / "tiny"
    build_tiny_random(tokenizer_folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1_536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4_096, tie_word_embeddings=True,
    )  # fmt: skip
    medium = folder / "medium"
    Qwen3ForCausalLM(config).save_pretrained(medium)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(medium)
    return str(medium)


def measure(model: str, rounds: int, seconds: float, console: Console) -> dict[tuple[str, str], list[float]]:
    """Steps per second by place and setting, a value a round."""
    rates: dict[tuple[str, str], list[float]] = {(place, name): [] for place in (ALONE, BESIDE) for name in VARIABLES}
    with trainer(SHIPPED, model) as shipped, trainer(PLAIN, model) as plain:
        for _ in range(rounds):
            for place in (ALONE, BESIDE):
                for name, one in ((SHIPPED, shipped), (PLAIN, plain)):
                    with busy_program(place == BESIDE):
                        rates[place, name].append(one.steps_per_second(seconds))
            line = ", ".join(f"{name} {place} {values[-1]:.2f}" for (place, name), values in rates.items())
            console.print(f"  steps/s: {line}", markup=False)
    return rates


def shares_of_quiet(rates: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], float]:
    """Of COLUMNS: alone over libgomp's default alone, beside the program over the faster of the two alone."""
    speeds = {key: statistics.median(values) for key, values in rates.items()}
    default = speeds[ALONE, PLAIN]
    fastest = max(default, speeds[ALONE, SHIPPED])
    return {(place, name): speeds[place, name] / (default if place == ALONE else fastest) for place, name in COLUMNS}


def main() -> None:
    """Measure, print the table and the targets."""
    parser = make_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=(TINY, MEDIUM), default=[TINY, MEDIUM])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.5, help="timed in each turn")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leave nothing running
    console = make_console()
    table = Table(title="Share of the quiet speed", title_justify="left", box=SIMPLE)
    for column in ("model", "threads", "tokens/s alone", *(f"{name}, {place}" for place, name in COLUMNS)):
        table.add_column(column, justify="left" if column == "model" else "right")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            console.print(f"{name}:")
            model = TINY_RANDOM if name == TINY else make_medium_model(Path(folder))
            rates = measure(model, arguments.rounds, arguments.seconds, console)
            shares = shares_of_quiet(rates)
            speed = statistics.median(rates[ALONE, PLAIN]) * BLOCK_TOKENS
            cores = len(os.sched_getaffinity(0))
            table.add_row(name, str(cores), f"{speed:,.0f}", *(f"{share:.2f}" for share in shares.values()))
            results += [
                at_least(f"{name}_alone_over_default", shares[ALONE, SHIPPED], "ratio of tokens/s", ALONE_TARGET),
                at_least(f"{name}_beside_over_alone", shares[BESIDE, SHIPPED], "ratio of tokens/s", BESIDE_TARGET),
            ]
    console.print(table)
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
