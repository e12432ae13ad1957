"""Preparing tokens against the tokenizers library alone, and what a training pays at its start.

    python benchmarks/tokenize_throughput.py [--only speed start memory] [--tokenizer FOLDER] [--json FILE]

* speed: tokens/s of `python -m dataset tokens`, from files to files, over those of the tokenizers library on the same
  text in memory, until the numbers of its tokens are there, cut in the way of several that suits it best; they take
  turns. In one process, without imports and without the look at the tokenizer that the command begins with. Also shown:
  the library when it keeps the numbers to itself, as it does until it is asked for them.
* start: seconds of `read_corpus` on prepared tokens, of any number, until training has its blocks.
* memory: peak of the command's process over ten times the text.

Without --tokenizer, that of the tiny-random base; without --text, a text drawn from the samples.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Processes that are forked do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch
from loss_memory import in_fresh_process
from results import at_least, make_console, make_parser, result, show_results, write_results
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dataset.corpus import read_corpus
from dataset.decode import decode_text
from dataset.tokens_command import Tokenization
from novelgpt.model.tiny_random import build_tiny_random
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import CorpusArguments, ModelArguments
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.chunks import ChunkEncoder, DocumentCutter
from novelgpt.text.token_files import KIND, MANIFEST, SHARDS, STARTS, TOKENS, VERSION, describe_tokenizer
from novelgpt.training.throughput import peak_memory

PARTS = ("speed", "start", "memory")
TURNS = 5
FILE_MEGABYTES = 4.0
LIBRARY_BATCH = 250_000
SHARD_TOKENS, DOCUMENT_TOKENS = 20_000_000, 100_000
SPEED_TARGET, START_TARGET, MEMORY_TARGET = 0.9, 30, 1.1


WITHOUT_NUMBERS = "chunks, without the numbers"


def write_books(folder: Path, megabytes: float, fresh: bool = False) -> list[Path]:
    """Files of UTF-8 that are so long together.

    Args:
        folder: made.
        megabytes: of all files.
        fresh: characters follow each other as they do somewhere in the samples, so that phrases are new, as in real
            books, and no cache knows them. Else paragraphs come again and again, which is quicker to write.
    """
    draw = random.Random(0)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((SAMPLES / "novels").glob("*.txt")))
    paragraphs = [line for line in text.splitlines() if line.strip()]
    followers: dict[str, list[str]] = {}
    for one, next_one in itertools.pairwise(text):
        followers.setdefault(one, []).append(next_one)
    folder.mkdir()
    paths: list[Path] = []
    left = megabytes * 1e6
    while left > 0:
        paths.append(folder / f"{len(paths):05d}.txt")
        until = max(0.0, left - FILE_MEGABYTES * 1e6)
        with paths[-1].open("w", encoding="utf-8") as file:
            while left > until:
                line = f"{draw.choice(paragraphs)}{draw.randrange(1000)}\n"
                if fresh:
                    line = "　　"
                    while not line.endswith("\n"):
                        line += draw.choice(followers[line[-1]])
                file.write(line)
                left -= len(line.encode())
    return paths


def make_run(out: Path, tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    """The command behind its command line, into a new folder."""
    (out / SHARDS).mkdir(parents=True)
    return Tokenization(out, tokenizer, "model", "text", quiet=True)


def run_command(run: Tokenization, paths: list[Path]) -> int:
    """The number of tokens."""
    manifest = run.run([str(path) for path in paths])
    return int(manifest["splits"]["train"]["tokens"])


def library_ways(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[], int]]:
    """Ways to have the library alone encode texts that are in memory: each gives the number of tokens."""
    backend = tokenizer.backend_tokenizer

    def encode(chunks: list[str], numbers: bool = True) -> int:
        count = 0
        batch: list[str] = []
        characters = 0
        for number, chunk in enumerate(chunks, start=1):
            batch.append(chunk)
            characters += len(chunk)
            if characters >= LIBRARY_BATCH or number == len(chunks):
                encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
                count += sum(len(one.ids) if numbers else len(one) for one in encoded)
                batch, characters = [], 0
        return count

    chunks: list[str] = []
    for text in texts:
        row = {"text": text, "source": ""}
        chunks += [chunk.text for chunk in DocumentCutter(in_chunks=True).cut([row], whole_files=True)]
    lines = [f"{line}\n" for text in texts for line in text.split("\n")]
    return {
        "lines": lambda: encode(lines),
        "chunks": lambda: encode(chunks),
        "books": lambda: encode(texts),
        WITHOUT_NUMBERS: lambda: encode(chunks, numbers=False),
    }


def study_speed(model: Path, paths: list[Path], console: Console) -> list[dict[str, Any]]:
    """The command and the library in turns."""
    tokenizer = load_tokenizer(ModelArguments(str(model)))
    ways = library_ways([decode_text(path.read_bytes(), str(path)) for path in paths], tokenizer)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(TURNS):
            begin = time.perf_counter()
            ready = make_run(Path(name) / str(turn), tokenizer)
            once = time.perf_counter() - begin
            for way, encode in ({"command": lambda ready=ready: run_command(ready, paths)} | ways).items():
                begin = time.perf_counter()
                tokens = encode()
                speeds.setdefault(way, []).append(tokens / (time.perf_counter() - begin))
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    for way, value in medians.items():
        console.print(f"  {'' if way == 'command' else 'library, by '}{way}: {value / 1e6:,.3f} M tokens/s")
    console.print(f"  before its first text, the command looks at the tokenizer for {once:.2f} s")
    command = medians.pop("command")
    console.print(f"  the command over the library without numbers: {command / medians.pop(WITHOUT_NUMBERS):.2f}")
    return [at_least("tokenize_speed_over_the_library", command / max(medians.values()), "ratio", SPEED_TARGET)]


def write_tokens(folder: Path, tokens: int, model: Path) -> None:
    """A prepared folder of random tokens."""
    tokenizer = load_tokenizer(ModelArguments(str(model)))
    described = describe_tokenizer(ChunkEncoder(tokenizer), str(model))
    draw = numpy.random.default_rng(0)
    shards = []
    for begin in range(0, tokens, SHARD_TOKENS):
        shard = folder / SHARDS / f"{begin:020d}"
        shard.mkdir(parents=True)
        count = min(SHARD_TOKENS, tokens - begin)
        draw.integers(len(tokenizer), size=count, dtype=numpy.uint32).astype(described["dtype"]).tofile(shard / TOKENS)
        starts = numpy.arange(0, count, DOCUMENT_TOKENS, dtype=numpy.int64)
        numpy.save(shard / STARTS, starts)
        shards.append({"name": shard.name, "tokens": count, "documents": len(starts)})
    manifest = {"kind": KIND, "version": VERSION, "tokenizer": described, "splits": {"train": {"shards": shards}}}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def start_seconds(folder: Path, model: Path) -> float:
    """Of reading prepared tokens, with a tokenizer that is loaded."""
    tokenizer = load_tokenizer(ModelArguments(str(model)))
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        read_corpus(CorpusArguments(train_files=[str(folder)]), tokenizer)
    return time.perf_counter() - begin


def study_start(model: Path, tokens: int, console: Console) -> list[dict[str, Any]]:
    """In a process that has not seen the tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tokens"
        in_fresh_process(write_tokens, folder, tokens, model)
        seconds = in_fresh_process(start_seconds, folder, model)
    console.print(f"  start from {tokens:,} prepared tokens: {seconds:.2f} s")
    return [result(f"start_from_{tokens}_tokens", seconds, "seconds", START_TARGET)]


def command_memory(paths: list[Path], out: Path, model: Path) -> int:
    """Bytes at the peak of a process that runs the command."""
    run_command(make_run(out, load_tokenizer(ModelArguments(str(model)))), paths)
    return peak_memory(torch.device("cpu"))


def study_memory(model: Path, gigabytes: list[float], console: Console) -> list[dict[str, Any]]:
    """Of little text and of much."""
    peaks = []
    for size in gigabytes:
        with tempfile.TemporaryDirectory() as name:
            paths = write_books(Path(name) / "books", size * 1000)
            peaks.append(in_fresh_process(command_memory, paths, Path(name) / "out", model))
        console.print(f"  {size:g} GB of text: {peaks[-1] / 1e6:,.0f} MB at the peak")
    ratio = peaks[-1] / peaks[0]
    return [result(f"tokenize_memory_of_{gigabytes[-1]:g}_over_{gigabytes[0]:g}_GB", ratio, "ratio", MEMORY_TARGET)]


def main() -> None:
    """Run the parts asked for, then show the targets."""
    parser = make_parser("Speed, start and memory of prepared tokens")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokenizer", type=Path, help="folder of a fast tokenizer [default: the tiny-random base's]")
    parser.add_argument("--text", nargs="+", type=Path, help="files for the speed [default: drawn from the samples]")
    parser.add_argument("--megabytes", type=float, default=24, help="of the drawn text for the speed")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="prepared tokens to start from")
    parser.add_argument("--gigabytes", nargs=2, type=float, default=[0.1, 1.0], help="of text for the memory")
    arguments = parser.parse_args()
    console = make_console()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        model = arguments.tokenizer or Path(name) / "base"
        if not arguments.tokenizer:
            with contextlib.redirect_stdout(io.StringIO()):
                build_tiny_random(model)
        if "speed" in arguments.only:
            paths = arguments.text or write_books(Path(name) / "books", arguments.megabytes, fresh=True)
            results += study_speed(model, paths, console)
        if "start" in arguments.only:
            results += study_start(model, arguments.tokens, console)
        if "memory" in arguments.only:
            results += study_memory(model, arguments.gigabytes, console)
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
