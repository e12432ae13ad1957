"""A small base on works that no training has seen: bits a character, and whether what it writes can be read.

    python benchmarks/tiny_base.py --model FOLDER --held_out PREPARED [--compare NAME=FOLDER …] [--json FILE]

PREPARED is a folder of `dataset novels` with held-out works. All models are asked for bits a character of each of them,
in blocks of as many characters on average, whatever their tokenizers. Then the model continues the openings of 100
held-out chapters, as `python -m predict` does: drawn (temperature 0.8, top-p 0.8) and greedily, 500 characters each.
Targets are for the drawn ones: at most 5 % loop by the rule of novelgpt/scoring/repetition.py, and no character is
broken. Greedy ones of so small a model loop nearly always; their rate is reported.

A model of 3 M weights takes about 8 minutes on 2 CPU cores for 2 M characters; --characters limits them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Processes that are started do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from held_out_bits import Work, bits_of_works, load, read_works, weights_of
from results import make_console, make_parser, result, show_results, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from novelgpt.scoring.repetition import first_loop
from novelgpt.settings.terminal import visible
from predict.__main__ import main as predict_main
from predict.continuations import main as continuations_main

CONTINUATIONS, CHARACTERS, PROMPT_CHARACTERS = 100, 500, 300
DRAWN = ("--do_sample", "--temperature", "0.8", "--top_p", "0.8", "--top_k", "0")
LOOP_TARGET = 0.05
BROKEN = "\ufffd"
# In blocks of so many characters, every model sees as much of the text before, whatever its tokens.
BLOCK_CHARACTERS = 700
# A character of a byte-level tokenizer takes three tokens at most, and most take fewer than one.
TOKENS = 900
SHOWN = 10


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("Bits a character on held-out works, and continuations of their chapters")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--held_out", type=Path, required=True, metavar="PREPARED", help="folder of `dataset novels`")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME=FOLDER", help="further models, for their bits"
    )
    parser.add_argument("--characters", type=int, default=0, help="of each work; default: all")
    parser.add_argument("--continuations", type=int, default=CONTINUATIONS, metavar="N", help="0 leaves them out")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of openings, and of what is drawn")
    arguments = parser.parse_args()
    if any(not all(entry.partition("=")) for entry in arguments.compare):
        parser.error("--compare takes NAME=FOLDER")
    return arguments


def study_bits(models: dict[str, Path], works: list[Work], console: Console) -> dict[str, dict[str, Any]]:
    """Weights, and bits a character on each work, by model."""
    found = {}
    for name, folder in models.items():
        start = time.perf_counter()
        loaded = load(folder)
        # As many characters as a block holds are as many tokens as the tokenizer makes of them.
        sample = "".join(work.text[:20_000] for work in works)
        tokens = len(loaded.tokenizer(sample, verbose=False)["input_ids"])
        context = max(2, round(BLOCK_CHARACTERS * tokens / len(sample)))
        found[name] = bits_of_works(loaded, works, context)
        found[name] |= {
            "weights": weights_of(loaded.model.config),
            "context": context,
            "seconds": time.perf_counter() - start,
        }
        console.print(f"{name}: {found[name]['all']:.4f} bits a character in {found[name]['seconds']:,.0f} s")
    return found


def show_bits(found: dict[str, dict[str, Any]], works: list[Work], console: Console) -> None:
    """A row a work, a column a model."""
    table = Table(title="Bits a character on works that were held out", title_justify="left", box=SIMPLE)
    table.add_column("")
    table.add_column("characters", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    for work in works:
        table.add_row(work.name, f"{len(work.text):,}", *(f"{one['works'][work.name]:.3f}" for one in found.values()))
    total = sum(len(work.text) for work in works)
    table.add_row("all characters", f"{total:,}", *(f"{one['all']:.3f}" for one in found.values()))
    for label, read in (
        ("nats a token", lambda one: f"{one['loss']:.3f}"),
        ("characters a token", lambda one: f"{one['characters_a_token']:.2f}"),
        ("weights", lambda one: f"{one['weights']['all'] / 1e6:,.2f} M"),
        ("without embeddings", lambda one: f"{(one['weights']['all'] - one['weights']['embeddings']) / 1e6:,.2f} M"),
        ("tokens of a block", lambda one: f"{one['context']:,}"),
    ):
        table.add_row(label, "", *map(read, found.values()))
    console.print(table)


def openings(held_out: Path, count: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of `predict.continuations`: openings of held-out chapters, of each work in turn until there are enough."""
    path = folder / "openings.jsonl"
    quietly(continuations_main, str(held_out), str(path), "--lengths", str(CHARACTERS), "--prompt_characters",
        str(PROMPT_CHARACTERS), "--per_book", str(count), "--seed", str(seed))  # fmt: skip
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    books = [list(of_book) for _, of_book in itertools.groupby(rows, key=lambda row: row["book"])]
    taken = [row for turn in itertools.zip_longest(*books) for row in turn if row is not None][:count]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in taken), encoding="utf-8")
    return taken


def quietly(command: Callable[[list[str]], None], *words: str) -> None:
    """A command of the toolkit in this process, without what it says."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            command(list(words))
        except SystemExit as stop:
            if stop.code:
                said.write(f"{command.__module__} ended with status {stop.code}")
                raise SystemExit(said.getvalue()) from stop


def continuations(model: Path, rows: Path, out: Path, seed: int, *words: str) -> list[dict[str, Any]]:
    """What the model writes: {"id", "opening", "text", "loops", "broken", "ended"} of each row.

    `text` is cut to CHARACTERS; `ended` whether the model ended it before.
    """
    quietly(predict_main, "--model", str(model), "--data_files", str(rows), "--output_dir", str(out),
        "--max_new_tokens", str(TOKENS), "--batch_size", "25", "--seed", str(seed), *words)  # fmt: skip
    found = []
    for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["prediction"]
        if row["finish_reason"] == "length":
            text = text.rstrip(BROKEN)  # the last character may be cut, and it is beyond those that count
        text = text[:CHARACTERS]
        loops = first_loop(text) is not None
        ended = len(text) < CHARACTERS
        opening = row["prompt"][-1]["content"] if isinstance(row["prompt"], list) else row["prompt"]
        found.append({"id": row["id"], "opening": opening, "text": text, "loops": loops, "broken": text.count(BROKEN),
                      "ended": ended})  # fmt: skip
    return found


def share(found: list[dict[str, Any]], name: str) -> float:
    """Of continuations."""
    return sum(bool(one[name]) for one in found) / len(found)


def study_continuations(arguments: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The results of drawn continuations, and all that was written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = len(openings(arguments.held_out, arguments.continuations, arguments.seed, folder))
        rows = folder / "openings.jsonl"
        drawn = continuations(arguments.model, rows, folder / "drawn", arguments.seed, *DRAWN)
        greedy = continuations(arguments.model, rows, folder / "greedy", arguments.seed)
    for one in drawn[:: max(1, count // SHOWN)][:SHOWN]:
        console.print(visible(f"\n{one['id']}\n…{one['opening'][-60:]}→{one['text'][:200]}"), markup=False)
    console.print(
        f"\n{count} openings; greedy ones: {share(greedy, 'loops'):.0%} loop; ended before {CHARACTERS} characters: "
        f"{share(drawn, 'ended'):.0%} of the drawn, {share(greedy, 'ended'):.0%} of the greedy ones"
    )
    results = [
        result("share of drawn continuations that loop", share(drawn, "loops"), "share", LOOP_TARGET),
        result("broken characters in drawn continuations", sum(one["broken"] for one in drawn), "characters", 0),
    ]
    return results, {"drawn": drawn, "greedy": greedy, "greedy_loops": share(greedy, "loops")}


def main() -> None:
    """Both studies, then the targets."""
    arguments = read_arguments()
    console = make_console()
    works = read_works(arguments.held_out, arguments.characters)
    models = {arguments.model.name: arguments.model}
    for entry in arguments.compare:
        name, _, folder = entry.partition("=")
        models[name] = Path(folder)
    found = study_bits(models, works, console)
    show_bits(found, works, console)
    results: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    if arguments.continuations:
        results, written = study_continuations(arguments, console)
        show_results(results, console)
    characters = {work.name: len(work.text) for work in works}
    write_results(results, arguments.json, model=arguments.model.name, characters=characters, bits=found,
                  continuations=written, seed=arguments.seed)  # fmt: skip


if __name__ == "__main__":
    main()
