"""How cost grows with the width of a model, the length of rows and the amount of data.

    python benchmarks/scaling.py [--only width length data evaluation] [--json FILE]

Each cost is measured over a range of sizes and fitted with size^exponent (least squares on logarithms); the targets say
that none grows faster than it must:

* width: forward and backward pass of all layers, of models of one depth, a token (2: products of width x width);
* length: a whole step of a row that is one document (time: up to 2, attention; memory: 1), and of packs of 256-token
  documents (1, whatever the length of the pack), which is also compared with one document of the pack's length;
* data: reading, tokenising and packing conversations and a novel (1), and the packing of rows alone (n log n);
* evaluation: peak memory over ten times the rows.

Each size runs in its own process; times are medians of repeated runs. Times of models are those with an allocator that
keeps freed blocks, as scripts/launch.sh sets it. The whole takes about 5 minutes on 2 CPU cores.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Processes that are forked do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch
from loss_memory import in_fresh_process, keep_freed_blocks, median_seconds, resident
from results import make_console, make_parser, result, show_results, write_results
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from dataset.conversations import read_conversations
from dataset.corpus import read_corpus
from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.model.tiny_random import build_tiny_random
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, CorpusArguments, ModelArguments, TrainArguments
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.collator import Collator
from novelgpt.text.packing import best_fit
from novelgpt.training.throughput import peak_memory
from novelgpt.training.trainer import NovelTrainer

PARTS = ("width", "length", "data", "evaluation")
LAYERS = 4
VOCABULARY = 1_000
WIDTHS = (128, 256, 512, 1_024)
WIDTH_TOKENS = 1_024
LENGTHS = (256, 512, 1_024, 2_048, 4_096, 8_192)
LENGTH_WIDTH = 256
PACKS = (1_024, 2_048, 4_096, 8_192)
DOCUMENT = 256
DATA_FACTORS = (1, 2, 4, 8)
# What factor 1 stands for.
CONVERSATIONS, NOVEL_CHARACTERS = 500, 250_000
ROW_COUNTS = (10_000, 100_000, 1_000_000)
CAPACITY = 2_048
EVALUATION_ROWS = (40, 400)
EVALUATION_VOCABULARY, EVALUATION_WIDTH, EVALUATION_TOKENS = 32_000, 128, 256
STEPS = 5
# For sizes at which overheads still show, exponents are too small; the widest models are fitted alone.
WIDE = 256
WIDTH_TARGET = LENGTH_TIME_TARGET = 2.1
LINEAR_TARGET, SORTING_TARGET = 1.1, 1.2
# In a pack of 8,192 tokens, layers of width 256 make 1/2.5 of the products that they make in one document.
PACK_TARGET = 0.6
EVALUATION_TARGET = 1.05


@dataclass
class Cost:
    """Of one size: seconds, and bytes at the peak over those before."""

    seconds: float
    memory: float


def device_name() -> str:
    """Where models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(width: int, vocabulary: int = VOCABULARY, layers: int = LAYERS) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights."""
    torch.manual_seed(0)
    heads = width // 64
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, tie_word_embeddings=True,
        use_cache=False, attn_implementation=PACKED_ATTENTION,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(device_name())


def make_row(documents: Sequence[int], vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """A row of documents of these lengths, all tokens trained."""
    ids = torch.randint(vocabulary, (sum(documents),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in documents])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def make_batch(documents: Sequence[int]) -> dict[str, Any]:
    """One row, as the collator hands it to the model."""
    batch = Collator(pad_token_id=0)([make_row(documents)])
    return {name: value.to(device_name()) if torch.is_tensor(value) else value for name, value in batch.items()}


def width_seconds(width: int) -> float:
    """Seconds of a forward and backward pass of the layers, a token."""
    model = make_model(width)
    batch = make_batch([DOCUMENT] * (WIDTH_TOKENS // DOCUMENT))
    del batch["labels"]

    def step() -> None:
        with autocast():
            hidden = model.get_decoder()(**batch).last_hidden_state
        hidden.float().square().mean().backward()
        wait()

    keep_freed_blocks()
    step()
    return median_seconds(step, STEPS) / WIDTH_TOKENS


def step_cost(documents: Sequence[int]) -> Cost:
    """Of a training step without the optimizer's part, which does not depend on the row."""
    model = make_model(LENGTH_WIDTH)
    attach_chunked_loss(model)

    def step(batch: dict[str, Any]) -> None:
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        wait()

    step(make_batch([16]))  # makes the gradients of weights, which stay
    batch = make_batch(documents)
    before = resident(device_name())
    for _ in range(2):
        step(batch)
    memory = peak_memory(torch.device(device_name())) - before
    keep_freed_blocks()
    step(batch)
    return Cost(median_seconds(lambda: step(batch), STEPS), memory)


def autocast() -> torch.autocast:
    """bf16 on GPUs, fp32 on CPUs, as training has it by default."""
    return torch.autocast(device_name(), torch.bfloat16, enabled=device_name() == "cuda")


def wait() -> None:
    """Until the device has done what it was given."""
    if device_name() == "cuda":
        torch.cuda.synchronize()


def read_cost(kind: str, file: Path, tokenizer_folder: Path) -> Cost:
    """Of the rows of a file, from bytes to packs."""
    tokenizer = load_tokenizer(ModelArguments(str(tokenizer_folder)))
    reader, arguments = {
        "conversations": (read_conversations, ConversationArguments(train_files=[str(file)])),
        "novel": (read_corpus, CorpusArguments(train_files=[str(file)])),
    }[kind]
    tokenizer("字" * 1000)

    def read() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            reader(arguments, tokenizer)

    before = resident("cpu")
    seconds = median_seconds(read, STEPS)
    return Cost(seconds, peak_memory(torch.device("cpu")) - before)


def best_fit_seconds(rows: int) -> float:
    """Of packing rows of random lengths, most of them short."""
    lengths = numpy.random.default_rng(0).lognormal(5.7, 0.8, rows).clip(1, CAPACITY).astype(int).tolist()
    return median_seconds(lambda: best_fit(lengths, CAPACITY), STEPS)


class SameRow(Dataset[dict[str, Any]]):
    """One row, many times, so that the data take no memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.row = make_row([EVALUATION_TOKENS], EVALUATION_VOCABULARY)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row."""
        return self.row


def evaluation_memory(rows: int) -> int:
    """Bytes at the peak of a process that evaluates."""
    model = make_model(EVALUATION_WIDTH, EVALUATION_VOCABULARY, layers=2)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = NovelTrainer(
            model=model,
            args=TrainArguments(output_dir=folder, disable_tqdm=True),
            eval_dataset=SameRow(rows),
            data_collator=Collator(pad_token_id=0),
        )
        trainer.evaluate()
    return peak_memory(torch.device(device_name()))


def write_conversations(file: Path, rows: int) -> None:
    """Rows of a title and an abstract, the sentences drawn from the samples."""
    generator = random.Random(0)
    lines = (SAMPLES / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    papers = [json.loads(line) for line in lines]
    sentences = [sentence for paper in papers for sentence in re.findall("[^。]+。", paper["abstract"])]
    with file.open("w", encoding="utf-8") as output:
        for _ in range(rows):
            abstract = "".join(generator.choices(sentences, k=generator.randint(2, 8)))
            row = {"title": generator.choice(papers)["title"], "abstract": abstract}
            output.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_novel(file: Path, characters: int) -> None:
    """One book, its paragraphs drawn from a sample."""
    generator = random.Random(0)
    text = (SAMPLES / "novels" / "deng_ta_xia_de_xin.txt").read_text(encoding="utf-8")
    paragraphs = [line for line in text.splitlines() if line.strip()]
    with file.open("w", encoding="utf-8") as output:
        written = 0
        while written < characters:
            paragraph = generator.choice(paragraphs)
            output.write(paragraph + "\n")
            written += len(paragraph)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the power of size that fits costs best."""
    return float(numpy.polyfit(numpy.log(sizes), numpy.log(costs), 1)[0])


def show(title: str, name: str, sizes: Sequence[int], columns: dict[str, list[float]], console: Console) -> None:
    """A line a size; beside each cost the exponent that leads to it from the line above, and below the fitted one."""
    table = Table(title=title, title_justify="left")
    table.add_column(name, justify="right")
    for column in columns:
        table.add_column(column, justify="right")
        table.add_column("exponent", justify="right")
    for row, size in enumerate(sizes):
        line = [f"{size:,}"]
        for costs in columns.values():
            local = exponent(sizes[row - 1 : row + 1], costs[row - 1 : row + 1]) if row else None
            line += [f"{costs[row]:,.4g}", "" if local is None else f"{local:.2f}"]
        table.add_row(*line, end_section=row + 1 == len(sizes))
    table.add_row("fitted", *itertools.chain(*(["", f"{exponent(sizes, costs):.2f}"] for costs in columns.values())))
    console.print(table)


def study_width(console: Console) -> list[dict[str, Any]]:
    """Cost of the layers against their width."""
    costs = [in_fresh_process(width_seconds, width) * 1e6 for width in WIDTHS]
    show(f"Width: {LAYERS} layers, {WIDTH_TOKENS:,} tokens", "width", WIDTHS, {"µs a token": costs}, console)
    wide = [place for place, width in enumerate(WIDTHS) if width >= WIDE]
    fitted = exponent([WIDTHS[place] for place in wide], [costs[place] for place in wide])
    name = f"scaling_time_with_width_{WIDE}_to_{WIDTHS[-1]}"
    return [result(name, fitted, "exponent", WIDTH_TARGET)]


def study_length(console: Console) -> list[dict[str, Any]]:
    """Cost of a step against the length of its row."""
    whole = [in_fresh_process(step_cost, [length]) for length in LENGTHS]
    packed = [in_fresh_process(step_cost, [DOCUMENT] * (length // DOCUMENT)) for length in PACKS]
    results = []
    for name, title, sizes, costs, time_target in (
        ("document", "one document a row", LENGTHS, whole, LENGTH_TIME_TARGET),
        ("pack", f"packs of {DOCUMENT}-token documents", PACKS, packed, LINEAR_TARGET),
    ):
        seconds, memory = [cost.seconds for cost in costs], [cost.memory / 1e6 for cost in costs]
        columns = {"seconds a step": seconds, "MB of activations": memory}
        show(f"Length: {title}, width {LENGTH_WIDTH}", "tokens", sizes, columns, console)
        results += [
            result(f"scaling_time_with_{name}_length", exponent(sizes, seconds), "exponent", time_target),
            result(f"scaling_memory_with_{name}_length", exponent(sizes, memory), "exponent", LINEAR_TARGET),
        ]
    ratio = packed[-1].seconds / whole[LENGTHS.index(PACKS[-1])].seconds
    return [*results, result(f"scaling_time_of_pack_over_document_{PACKS[-1]}", ratio, "ratio of times", PACK_TARGET)]


def study_data(console: Console) -> list[dict[str, Any]]:
    """Cost of preparing rows against how many there are."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            build_tiny_random(folder / "base")
        for kind, unit, once, write in (
            ("conversations", "rows", CONVERSATIONS, write_conversations),
            ("novel", "characters", NOVEL_CHARACTERS, write_novel),
        ):
            sizes = [once * factor for factor in DATA_FACTORS]
            file = folder / {"conversations": "rows.jsonl", "novel": "novel.txt"}[kind]
            costs = []
            for size in sizes:
                write(file, size)
                costs.append(in_fresh_process(read_cost, kind, file, folder / "base"))
            seconds, memory = [cost.seconds for cost in costs], [cost.memory / 1e6 for cost in costs]
            title = f"Data: reading, tokenising and packing {'conversations' if kind == 'conversations' else 'a novel'}"
            show(title, unit, sizes, {"seconds": seconds, "MB": memory}, console)
            results += [
                result(f"scaling_time_with_{kind}", exponent(sizes, seconds), "exponent", LINEAR_TARGET),
                result(f"scaling_memory_with_{kind}", exponent(sizes, memory), "exponent", LINEAR_TARGET),
            ]
    seconds = [in_fresh_process(best_fit_seconds, rows) for rows in ROW_COUNTS]
    show(f"Packing alone, packs of {CAPACITY:,} tokens", "rows", ROW_COUNTS, {"seconds": seconds}, console)
    return [*results, result("scaling_time_of_best_fit", exponent(ROW_COUNTS, seconds), "exponent", SORTING_TARGET)]


def study_evaluation(console: Console) -> list[dict[str, Any]]:
    """Memory of evaluations of a few rows and of ten times as many."""
    few, many = (in_fresh_process(evaluation_memory, rows) for rows in EVALUATION_ROWS)
    logits = EVALUATION_TOKENS * EVALUATION_VOCABULARY * 4
    console.print(
        f"Evaluation: {few / 1e6:,.1f} MB at the peak over {EVALUATION_ROWS[0]} rows, {many / 1e6:,.1f} MB over "
        f"{EVALUATION_ROWS[1]}: {(many - few) / (EVALUATION_ROWS[1] - EVALUATION_ROWS[0]) / 1e6:,.4f} MB for a further "
        f"row, whose logits take {logits / 1e6:,.1f} MB"
    )
    return [result("scaling_evaluation_memory_of_10_times_the_rows", many / few, "ratio of bytes", EVALUATION_TARGET)]


def main() -> None:
    """Run the parts asked for, a table each; then the targets."""
    parser = make_parser("Growth of cost with width, length and data")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]  # memory is measured with the allocator as shipped
    console = make_console()
    studies = dict(zip(PARTS, (study_width, study_length, study_data, study_evaluation), strict=True))
    results = [entry for part in PARTS if part in arguments.only for entry in studies[part](console)]
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
