"""Peak memory and time of the chunked loss against the plain one, by vocabulary and length.

    python benchmarks/loss_memory.py [--vocabularies N …] [--lengths N …] [--precisions …] [--trained …] [--json FILE]

Both turn hidden states into the loss and the gradients of hidden states and of the head's weights (held in fp32):

* plain: all logits, then the loss function of transformers (`ForCausalLMLoss`: float(), torch's cross_entropy);
* chunked: a model after `novelgpt.model.loss.attach_chunked_loss`.

Each runs in its own process, a few steps. Memory is the highest resident size of the process over that from which it
started, the head's gradient included, with the memory allocator as shipped (on a GPU: what was allocated). Time is the
median of the steps; where there is enough memory, steps are also taken with an allocator that keeps freed blocks, as
scripts/launch.sh sets it, and the faster median counts, for each loss its own.

Without options, it is every vocabulary at one length and every length at the largest vocabulary, with all positions
trained; and every vocabulary at that one length with half of them trained, as in fine-tuning on answers. Cases whose
plain loss does not fit into the free memory are computed, not run. Gradients that differ by more than rounding end the
run with an error. torch's own linear_cross_entropy is tried, too, where torch has it.

A run of all takes about a quarter of an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import psutil
import torch
from results import make_console, make_parser, result, show_results, write_results
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from novelgpt.model.loss import attach_chunked_loss
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.training.throughput import peak_memory

# Baichuan2 has 125,696 tokens, Qwen 151,936.
VOCABULARIES = [32_000, 64_000, 125_696, 151_936]
LENGTHS = [512, 1_024, 2_048, 4_096]
WIDTH = 1_024
# Half of the positions are trained in turns of a question and an answer of so many tokens.
TURN = 128
STEPS = 3
# After two steps, no further one is begun when they have taken so long.
SECONDS_OF_STEPS = 15.0
SECONDS_OF_TORCH = 30.0
SHARE_OF_FREE_MEMORY = 0.6
# What the plain loss holds of each logit at its peak, in fp32: log-probabilities and two gradients.
BYTES_A_LOGIT = 12
# With freed blocks kept, those of the plain loss come to lie in each other's way: it takes several times what it needs.
SCATTER = 5
MEMORY_TARGET, GROWTH_TARGET, TIME_TARGET, HALF_TIME_TARGET = 0.25, 1.5, 1.0, 0.6
GROWTH_LENGTHS = (1_024, 4_096)
# Largest relative difference of a row of a gradient: bf16 holds 8 bits, and sums of chunks are rounded elsewhere.
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2}
# M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's mallopt: hand nothing back, and take large blocks from the heap, too.
KEEP_FREED_BLOCKS = {-1: -1, -4: 0}


@dataclass(frozen=True)
class Case:
    """What both losses are given."""

    vocabulary: int
    length: int
    precision: str
    trained: str
    width: int
    device: str

    @property
    def name(self) -> str:
        """For people and for --json."""
        return f"{self.vocabulary}x{self.length}_{self.trained}_{self.precision}"


@dataclass
class Figures:
    """Of one loss in one case.

    Attributes:
        memory: bytes at the peak.
        loss: nats a trained token.
        seconds_as_shipped: median of the steps with the allocator as it is.
        seconds_with_blocks_kept: median of the steps with an allocator that keeps freed blocks, where that was tried.
        difference: of the gradients from those of the plain loss.
    """

    memory: float
    loss: float
    seconds_as_shipped: float
    seconds_with_blocks_kept: float | None
    difference: float | None = None

    @property
    def seconds(self) -> float:
        """Of a step, with the allocator that suits the loss better."""
        return min(self.seconds_as_shipped, self.seconds_with_blocks_kept or self.seconds_as_shipped)


@dataclass
class Comparison:
    """Both losses in one case; None where one was not run."""

    case: Case
    plain: Figures | None
    chunked: Figures

    def ratio(self, figure: str) -> float | None:
        """Of the chunked loss's figure to the plain one's."""
        return None if self.plain is None else getattr(self.chunked, figure) / getattr(self.plain, figure)


class HeadOnly(nn.Module):
    """A model that is nothing but its head: hidden states stand in for what a decoder would make."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.head = nn.Linear(case.width, case.vocabulary, bias=False, device=case.device)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def get_decoder(self) -> Callable[[torch.Tensor], SimpleNamespace]:
        """A decoder that hands over its input."""
        return lambda hidden: SimpleNamespace(last_hidden_state=hidden)

    def forward(self, hidden: torch.Tensor) -> SimpleNamespace:
        """Logits."""
        return SimpleNamespace(logits=self.head(hidden))


def plain_loss(case: Case, model: HeadOnly) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """What a model of transformers does with labels."""

    def loss(hidden: torch.Tensor, labels: torch.Tensor, trained: int) -> torch.Tensor:
        return ForCausalLMLoss(model(hidden).logits, labels, case.vocabulary, num_items_in_batch=trained)

    return loss


def chunked_loss(case: Case, model: HeadOnly) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """What a model does with labels after attach_chunked_loss."""
    attach_chunked_loss(model)

    def loss(hidden: torch.Tensor, labels: torch.Tensor, trained: int) -> torch.Tensor:
        return model(hidden, labels=labels, num_items_in_batch=trained).loss

    return loss


def torch_loss(case: Case, model: HeadOnly) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """torch's own loss in chunks, with its own choice of their size."""
    options = nn.LinearCrossEntropyOptions()

    def loss(hidden: torch.Tensor, labels: torch.Tensor, trained: int) -> torch.Tensor:
        return functional.linear_cross_entropy(hidden[0, :-1], model.head.weight, labels[0, 1:], options=options)

    return loss


def make_labels(case: Case) -> torch.Tensor:
    """[1, length] random tokens, all trained, or the answers of turns."""
    labels = torch.randint(case.vocabulary, (1, case.length))
    if case.trained == "half":
        labels[0, torch.arange(case.length) // TURN % 2 == 0] = IGNORE_INDEX
    return labels.to(case.device)


def resident(device: str) -> int:
    """Bytes held now: of the GPU where there is one, else of the process."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def measure(case: Case, kind: str, folder: Path, keep_blocks: bool) -> Figures:
    """Run one loss for a few steps, in the process in which this is called.

    Args:
        case: what to run on; the numbers are the same for each kind.
        kind: "plain", "chunked" or "torch".
        folder: where "plain" leaves its gradients and the others find them.
        keep_blocks: whether to time it with an allocator that keeps freed blocks, too.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = HeadOnly(case)
    hidden = torch.randn(1, case.length, case.width).to(case.device).requires_grad_()
    labels = make_labels(case)
    trained = int((labels[:, 1:] != IGNORE_INDEX).sum())
    compute = {"plain": plain_loss, "chunked": chunked_loss, "torch": torch_loss}[kind](case, model)

    def step() -> float:
        hidden.grad = model.head.weight.grad = None
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = compute(hidden, labels, trained)
        loss.backward()
        return loss.item()  # which waits for the device

    before = resident(case.device)
    loss = step()  # finds kernels, and on a GPU memory
    seconds = median_seconds(step)
    memory = peak_memory(torch.device(case.device)) - before
    figures = Figures(memory, loss, seconds, None)
    if keep_blocks:
        keep_freed_blocks()
        step()  # finds memory
        figures.seconds_with_blocks_kept = median_seconds(step)
    assert hidden.grad is not None
    gradients = {"hidden": hidden.grad[0], "head": model.head.weight.grad}
    files = {name: folder / f"{name}.npy" for name in gradients}
    if kind == "plain":
        for name, gradient in gradients.items():
            numpy.save(files[name], gradient.cpu().numpy())
    elif all(file.exists() for file in files.values()):
        figures.difference = max(
            largest_difference(gradient, numpy.load(files[name], mmap_mode="r")) for name, gradient in gradients.items()
        )
    return figures


def keep_freed_blocks() -> bool:
    """From now on, in this process, as scripts/launch.sh does it for a whole one; False where there is no such way."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) for setting in KEEP_FREED_BLOCKS.items())


def median_seconds(step: Callable[[], object], steps: int = STEPS) -> float:
    """Of so many steps, or of two if they are long."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < steps and sum(seconds) < SECONDS_OF_STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def largest_difference(gradient: torch.Tensor, expected: numpy.ndarray) -> float:
    """Largest |a - b| / |b| of the rows (2-norms): small rows, those of tokens that no target is, count as large ones.

    Args:
        gradient: [rows, width].
        expected: [rows, width].
    """
    largest = 0.0
    for begin in range(0, len(expected), 4096):
        part = torch.from_numpy(numpy.array(expected[begin : begin + 4096]))
        apart = (gradient[begin : begin + 4096].cpu() - part).norm(dim=1)
        size = part.norm(dim=1)
        # Rows that are to be zero (untrained positions) must be so exactly.
        relative = torch.where(size > 0, apart / size, torch.where(apart > 0, torch.inf, 0.0))
        largest = max(largest, float(relative.max()))
    return largest


def in_fresh_process(function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
    """What `function` returns in a process of its own; None where that takes more than `limit` seconds.

    Processes are forked from one that has only imported this file, so that none sees what another has used.
    """
    # A process whose parent has looked at the GPU cannot use it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return None
        return receiver.recv()
    except EOFError:
        process.join()
        sys.exit(f"the process of {function.__name__}{arguments} ended with exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def free_memory(device: str) -> int:
    """Bytes that could be had now."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def needed_memory(case: Case) -> int:
    """Bytes of the plain loss at its peak: its logits and what is made of them, and the head's gradient."""
    logits, weights = case.length * case.vocabulary, case.vocabulary * case.width
    return logits * BYTES_A_LOGIT + weights * (4 if case.precision == "fp32" else 6)


def can_keep_blocks(case: Case) -> bool:
    """Whether both losses can be timed with an allocator that keeps freed blocks."""
    if case.device == "cuda" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    return SCATTER * needed_memory(case) < SHARE_OF_FREE_MEMORY * free_memory(case.device)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("Memory and time of the chunked loss, against the plain one")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES, metavar="N")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N", help="tokens of the one row")
    parser.add_argument("--precisions", nargs="+", choices=list(ROUNDING), default=list(ROUNDING))
    parser.add_argument("--trained", nargs="+", choices=["all", "half"], default=["all", "half"])
    parser.add_argument("--width", type=int, default=WIDTH, help="of the hidden states")
    parser.add_argument("--no_torch", action="store_true", help="leave torch's linear_cross_entropy out")
    return parser.parse_args()


def planned_cases(arguments: argparse.Namespace, device: str) -> list[Case]:
    """Every vocabulary at the middle length, with either share trained; every length at the largest vocabulary."""
    vocabularies, lengths = sorted(arguments.vocabularies), sorted(arguments.lengths)
    middle = lengths[len(lengths) // 2]
    cases = []
    for precision in arguments.precisions:
        for trained in arguments.trained:
            pairs = [(vocabulary, middle) for vocabulary in vocabularies]
            if trained == "all":
                pairs += [(vocabularies[-1], length) for length in lengths if length != middle]
            cases += [Case(*pair, precision, trained, arguments.width, device) for pair in sorted(pairs)]
    return cases


def compare(case: Case, console: Console) -> Comparison:
    """Run both losses, the plain one where it fits."""
    with tempfile.TemporaryDirectory() as folder:
        plain = None
        needed, keep_blocks = needed_memory(case), can_keep_blocks(case)
        if needed > SHARE_OF_FREE_MEMORY * free_memory(case.device):
            console.print(f"{case.name}: the plain loss would need {needed / 1e9:.1f} GB, and is not run")
        else:
            plain = in_fresh_process(measure, case, "plain", Path(folder), keep_blocks)
        return Comparison(case, plain, in_fresh_process(measure, case, "chunked", Path(folder), keep_blocks))


def cells(comparison: Comparison) -> list[str]:
    """A line of the table."""
    case, plain, chunked = comparison.case, comparison.plain, comparison.chunked
    texts = [f"{case.vocabulary:,}", f"{case.length:,}", case.precision, case.trained]
    for figure, unit in (("memory", 1e9), ("seconds", 1.0)):
        ratio = comparison.ratio(figure)
        if plain is not None:
            texts.append(f"{getattr(plain, figure) / unit:.3f}")
        else:
            texts.append(f"({needed_memory(case) / unit:.1f})" if figure == "memory" else "-")
        texts += [f"{getattr(chunked, figure) / unit:.3f}", "-" if ratio is None else f"{ratio:.3f}"]
    return [*texts, "-" if chunked.difference is None else f"{chunked.difference:.1e}"]


def show_table(comparisons: list[Comparison], console: Console) -> None:
    """All cases."""
    table = Table(title="Loss and gradients: peak memory, time of a step", title_justify="left")
    for column in ("vocabulary", "tokens", "in", "trained", "plain GB", "chunked GB", "ratio",
                   "plain s", "chunked s", "ratio", "gradients"):  # fmt: skip
        table.add_column(column, justify="right")
    for comparison in comparisons:
        table.add_row(*cells(comparison))
    console.print(table)


def try_torch(comparisons: list[Comparison], console: Console) -> None:
    """torch's loss in chunks, at the shortest length of the smallest and of the largest vocabulary."""
    if not hasattr(functional, "linear_cross_entropy"):
        console.print("this torch has no linear_cross_entropy")
        return
    known = [item for item in comparisons if item.plain is not None and item.case.trained == "all"]
    known.sort(key=lambda item: (item.case.vocabulary, item.case.length))
    for precision in ROUNDING:
        alike = [item for item in known if item.case.precision == precision]
        largest = [item for item in alike if item.case.vocabulary == alike[-1].case.vocabulary]
        for item in {item.case: item for item in alike[:1] + largest[:1]}.values():
            assert item.plain is not None
            with tempfile.TemporaryDirectory() as folder:
                torchs = in_fresh_process(measure, item.case, "torch", Path(folder), False, limit=SECONDS_OF_TORCH)
            words = f"torch's linear_cross_entropy, {item.case.name}: "
            if torchs is None:
                words += (
                    f"not three steps in {SECONDS_OF_TORCH:.0f} s, where plain takes {item.plain.seconds:.1f} s for one"
                )
            else:
                words += f"{torchs.memory / 1e9:.3f} GB ({torchs.memory / item.plain.memory:.2f} of plain), "
                words += f"{torchs.seconds:.2f} s a step ({torchs.seconds / item.plain.seconds:.1f} of plain)"
            console.print(words)


def results_of(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """The claims that these cases decide."""
    results = []
    for precision in ROUNDING:
        alike = [comparison for comparison in comparisons if comparison.case.precision == precision]
        compared = [comparison for comparison in alike if comparison.plain is not None]
        whole, half = ([item for item in compared if item.case.trained == trained] for trained in ("all", "half"))
        if whole:
            largest = max(whole, key=lambda item: item.case.vocabulary * item.case.length)
            name = f"loss_peak_memory_over_plain_{largest.case.name}"
            results.append(result(name, largest.ratio("memory"), "ratio of bytes", MEMORY_TARGET))
        results += growth_of(alike)
        for group, trained, target in ((whole, "all", TIME_TARGET), (half, "half", HALF_TIME_TARGET)):
            if group:
                ratio = statistics.median(item.ratio("seconds") for item in group)
                name = f"loss_time_over_plain_{trained}_{precision}_median_of_{len(group)}_cases"
                results.append(result(name, ratio, "ratio of times", target))
        differences = [item.chunked.difference for item in compared if item.chunked.difference is not None]
        if differences:
            name = f"loss_gradients_differ_{precision}"
            results.append(result(name, max(differences), "largest relative difference", ROUNDING[precision]))
    return results


def growth_of(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """How much more the chunked loss takes for four times the tokens, at the largest vocabulary."""
    whole = [item for item in comparisons if item.case.trained == "all"]
    largest = max((item.case.vocabulary for item in whole), default=0)
    by_length = {item.case.length: item for item in whole if item.case.vocabulary == largest}
    if not set(GROWTH_LENGTHS) <= by_length.keys():
        return []
    short, long = (by_length[length] for length in GROWTH_LENGTHS)
    name = f"loss_peak_memory_growth_{GROWTH_LENGTHS[0]}_to_{long.case.name}"
    return [result(name, long.chunked.memory / short.chunked.memory, "ratio of bytes", GROWTH_TARGET)]


def main() -> None:
    """Run all cases, a line each; then the table and the targets."""
    arguments = read_arguments()
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]  # "as shipped" it shall be
    console = make_console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(f"width {arguments.width:,}, {device}, {free_memory(device) / 1e9:.1f} GB of memory free")
    comparisons = []
    for case in planned_cases(arguments, device):
        comparisons.append(compare(case, console))
        console.print(f"{case.name}: {', '.join(cells(comparisons[-1])[4:])}", markup=False)
    show_table(comparisons, console)
    if not arguments.no_torch:
        try_torch(comparisons, console)
    results = results_of(comparisons)
    show_results(results, console)
    write_results(results, arguments.json, cases=[asdict(comparison) for comparison in comparisons])
    if any(not entry["holds"] for entry in results if entry["name"].startswith("loss_gradients_differ")):
        sys.exit("loss_memory: the gradients differ by more than rounding, so times and memory mean nothing")


if __name__ == "__main__":
    main()
