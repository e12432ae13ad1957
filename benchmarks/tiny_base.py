"""A small base on texts that no training has seen: bits per character, and whether what it writes can be read.

    python benchmarks/tiny_base.py --model FOLDER --held_out PREPARED [--documents NAME=FILE …]
        [--compare NAME=FOLDER …] [--json FILE]

PREPARED is a folder of `dataset novels` with held-out works. All models are evaluated in bits per character on each of
them, and on further files of held-out text rows, each row a document; in blocks of as many characters on average,
whatever their tokenizers. Then the model continues the openings of 100 held-out chapters, as `python -m predict` does:
sampled (temperature 0.8, top-p 0.8) and greedily, 500 characters each. Targets are for the sampled ones: at most 5 %
loop by the rule of novelgpt/scoring/repetition.py, and no character is undecodable. Greedy ones of so small a model
loop nearly always; their rate is reported.

A model of 3 M weights takes about 8 minutes on 2 CPU cores for 2 M characters; --characters limits them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Processes that are started do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from held_out_bits import Work, bits_of_works, load, read_documents, read_works, weights_of
from results import make_console, make_parser, result, show_results, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from novelgpt.model.card import CARD
from novelgpt.model.hub import locate
from novelgpt.scoring.repetition import first_loop
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import exit_on_user_error
from novelgpt.settings.terminal import visible
from novelgpt.text.token_bytes import BROKEN
from predict.__main__ import main as predict_main
from predict.continuations import main as continuations_main

CONTINUATIONS, CHARACTERS, PROMPT_CHARACTERS = 100, 500, 300
SAMPLED = ("--do_sample", "--temperature", "0.8", "--top_p", "0.8", "--top_k", "0")
LOOP_TARGET = 0.05
# In blocks of so many characters, every model sees as much of the text before, whatever its tokens.
BLOCK_CHARACTERS = 700
# Of a byte-level tokenizer, a character takes at most three tokens, and most take fewer than one.
TOKENS = 900
SHOWN = 10


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("Bits per character on held-out works, and continuations of their chapters")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--held_out", type=Path, required=True, metavar="PREPARED", help="folder of `dataset novels`")
    parser.add_argument("--documents", nargs="+", default=[], type=named_path, metavar="NAME=FILE",
                        help="further held-out text rows, each a document, for bits per character alone")  # fmt: skip
    parser.add_argument("--compare", nargs="+", default=[], type=named_path, metavar="NAME=FOLDER",
                        help="further models, for bits per character alone")  # fmt: skip
    parser.add_argument("--characters", type=int, default=0, help="of each work or file; default: all")
    parser.add_argument("--continuations", type=int, default=CONTINUATIONS, metavar="N", help="0 leaves them out")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of openings, and of the sampling")
    arguments = parser.parse_args(argv)
    for option, names in (
        ("--compare", [arguments.model.resolve().name, *(name for name, _ in arguments.compare)]),
        ("--documents", [name for name, _ in arguments.documents]),
    ):
        if repeated := {name for name in names if names.count(name) > 1}:
            parser.error(f"{option}: two are named {', '.join(sorted(repeated))}")
    return arguments


def named_path(entry: str) -> tuple[str, Path]:
    """NAME and PATH of NAME=PATH."""
    name, _, path = entry.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{entry} is not NAME=PATH")
    return name, Path(path)


def study_bits(models: dict[str, Path], works: list[Work], console: Console) -> dict[str, dict[str, Any]]:
    """Weights, and bits per character on each work, by model."""
    found = {}
    for name, folder in models.items():
        start = time.perf_counter()
        loaded = load(folder)
        # As many characters as a block holds are as many tokens as the tokenizer makes of them.
        sample = "".join("".join(work.documents)[:20_000] for work in works)
        tokens = len(loaded.tokenizer(sample, verbose=False)["input_ids"])
        context = max(2, round(BLOCK_CHARACTERS * tokens / len(sample)))
        found[name] = bits_of_works(loaded, works, context)
        found[name] |= {
            "weights": weights_of(loaded.model.config),
            "context": context,
            "seconds": time.perf_counter() - start,
        }
        console.print(f"{name}: {found[name]['all']:.4f} bits per character in {found[name]['seconds']:,.0f} s")
    return found


def show_bits(found: dict[str, dict[str, Any]], works: list[Work], console: Console) -> None:
    """A row a work, a column a model."""
    table = Table(title="Bits per character on held-out texts", title_justify="left", box=SIMPLE)
    table.add_column("")
    table.add_column("characters", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    for work in works:
        table.add_row(work.name, f"{work.characters:,}", *(f"{one['works'][work.name]:.3f}" for one in found.values()))
    total = sum(work.characters for work in works)
    table.add_row("all characters", f"{total:,}", *(f"{one['all']:.3f}" for one in found.values()))
    for label, read in (
        ("nats per token", lambda one: f"{one['loss']:.3f}"),
        ("characters per token", lambda one: f"{one['characters_a_token']:.2f}"),
        ("weights", lambda one: f"{one['weights']['all'] / 1e6:,.2f} M"),
        ("without embeddings", lambda one: f"{(one['weights']['all'] - one['weights']['embeddings']) / 1e6:,.2f} M"),
        ("tokens per block", lambda one: f"{one['context']:,}"),
    ):
        table.add_row(label, "", *map(read, found.values()))
    console.print(table)


def openings(held_out: Path, count: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of `predict.continuations`: openings of held-out chapters, of each work in turn until there are enough."""
    path = folder / "openings.jsonl"
    quietly(continuations_main, str(held_out), str(path), "--lengths", str(CHARACTERS), "--prompt_characters",
        str(PROMPT_CHARACTERS), "--per_book", str(count), "--seed", str(seed))  # fmt: skip
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
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
    """What the model writes after each opening, as `read_continuations`."""
    quietly(predict_main, "--model", str(model), "--data_files", str(rows), "--output_dir", str(out),
        "--max_new_tokens", str(TOKENS), "--batch_size", "25", "--seed", str(seed), *words)  # fmt: skip
    return read_continuations(out / "predictions.jsonl")


def read_continuations(predictions: Path) -> list[dict[str, Any]]:
    """{"id", "opening", "text", "loops", "broken", "ended"} of each prediction.

    `text` is the first CHARACTERS, or all where there are fewer, `broken` how many of them cannot be decoded, `ended`
    whether the model ended it before.
    """
    found = []
    for line in predictions.read_bytes().splitlines():  # as text, U+2028 and others would end lines, too
        row = json.loads(line)
        text = row["prediction"][:CHARACTERS]
        loops = first_loop(text) is not None
        ended = row["finish_reason"] != "length" and len(text) < CHARACTERS
        opening = row["prompt"][-1]["content"] if isinstance(row["prompt"], list) else row["prompt"]
        found.append({"id": row["id"], "opening": opening, "text": text, "loops": loops, "broken": text.count(BROKEN),
                      "ended": ended})  # fmt: skip
    return found


def share(found: list[dict[str, Any]], name: str) -> float:
    """Of continuations."""
    return sum(bool(one[name]) for one in found) / len(found)


def study_continuations(
    arguments: argparse.Namespace, model_folder: Path, console: Console
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The results of sampled continuations, and all that was written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = len(openings(arguments.held_out, arguments.continuations, arguments.seed, folder))
        rows = folder / "openings.jsonl"
        model = folder / "model"  # links: prediction writes its scores into a model's card
        shutil.copytree(model_folder, model, copy_function=os.symlink)
        (model / CARD).unlink(missing_ok=True)
        sampled = continuations(model, rows, folder / "sampled", arguments.seed, *SAMPLED)
        greedy = continuations(model, rows, folder / "greedy", arguments.seed)
    for one in sampled[:: max(1, count // SHOWN)][:SHOWN]:
        console.print(visible(f"\n{one['id']}\n…{one['opening'][-60:]}→{one['text'][:200]}"), markup=False)
    console.print(
        f"\n{count} openings; greedy ones: {share(greedy, 'loops'):.0%} loop; ended before {CHARACTERS} characters: "
        f"{share(sampled, 'ended'):.0%} of the sampled, {share(greedy, 'ended'):.0%} of the greedy ones"
    )
    broken = sum(one["broken"] for one in sampled)
    results = [
        result("share of sampled continuations that loop", share(sampled, "loops"), "share", LOOP_TARGET),
        result("undecodable characters in sampled continuations", broken, "characters", 0),
    ]
    return results, {"sampled": sampled, "greedy": greedy, "greedy_loops": share(greedy, "loops")}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Both studies, then the targets."""
    arguments = read_arguments(argv)
    folder = Path(locate(ModelArguments(str(arguments.model)))).resolve()
    console = make_console()
    works = read_works(arguments.held_out, arguments.characters)
    works += [read_documents(name, file, arguments.characters) for name, file in arguments.documents]
    name = arguments.model.resolve().name
    models = {name: folder} | dict(arguments.compare)
    found = study_bits(models, works, console)
    show_bits(found, works, console)
    results: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    if arguments.continuations:
        results, written = study_continuations(arguments, folder, console)
        show_results(results, console)
    characters = {work.name: work.characters for work in works}
    write_results(results, arguments.json, model=name, characters=characters, bits=found,
                  continuations=written, seed=arguments.seed)  # fmt: skip


if __name__ == "__main__":
    main()
