"""Memory of training a tokenizer on a corpus of any size: only its sample counts.

    python benchmarks/tokenizer_training.py [--gigabytes 10] [--kinds byte_bpe words] [--json FILE]

A corpus of that size, and one of a tenth, are written from the sample novels, line by line in random order. The same
command trains on both; the private memory of all its processes may be at most a tenth more on the larger one. The
corpora are written to a temporary folder (under $TMPDIR), 11 GB by default, and removed at the end.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# Processes that are started do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from private_memory import run_measured
from results import make_console, make_parser, result, show_results, write_results

from novelgpt.settings.paths import ROOT, SAMPLES

TARGET = 1.1
GIGABYTE = 10**9
LINES_AT_ONCE = 20_000
# The smaller corpus has so many times the characters of the sample: else samples of both would differ in size.
LEAST_CORPUS = 2
BYTES_PER_CHARACTER = 3
# Sizes that the sample novels, which repeat, are rich enough for.
VOCABULARY = {"byte_bpe": 2_000, "bpe": 2_000, "unigram": 1_500, "char": 1_000, "words": 2_000}


def write_corpus(path: Path, size: int) -> None:
    """Write lines of the sample novels in random order until a file has `size` bytes.

    Each line is put together from two, so that few are alike.
    """
    texts = [novel.read_text(encoding="utf-8") for novel in sorted((SAMPLES / "novels").glob("*.txt"))]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    draw, written = random.Random(1), 0
    with path.open("wb") as file:
        while written < size:
            pairs = zip(draw.choices(lines, k=LINES_AT_ONCE), draw.choices(lines, k=LINES_AT_ONCE), strict=True)
            block = "".join(f"{first}{second}\n" for first, second in pairs).encode()
            file.write(block[: size - written].rpartition(b"\n")[0] + b"\n")
            written += len(block)


def main() -> None:
    """Train on both corpora with each kind; then the targets."""
    parser = make_parser("Memory of training tokenizers on corpora of any size")
    parser.add_argument("--gigabytes", type=float, default=10, help="of the larger corpus [default: 10]")
    parser.add_argument("--sample_characters", type=int, default=3_000_000, help="[default: 3000000]")
    parser.add_argument("--kinds", nargs="+", choices=VOCABULARY, default=list(VOCABULARY))
    parser.add_argument("--folder", type=Path, help="where the corpora stay; default: a temporary one")
    arguments = parser.parse_args()
    least = 10 * LEAST_CORPUS * BYTES_PER_CHARACTER * arguments.sample_characters / GIGABYTE
    if arguments.gigabytes < least:
        parser.error(f"--gigabytes {arguments.gigabytes:g} is too small for that sample: take at least {least:g}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # leave no corpora and nothing running
    console, results, measured = make_console(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        corpora = {}
        for size in (arguments.gigabytes / 10, arguments.gigabytes):
            corpora[size] = folder / f"corpus-{size:g}.txt"
            write_corpus(corpora[size], int(size * GIGABYTE))
        for kind in arguments.kinds:
            peaks = []
            for size, corpus in corpora.items():
                out = folder / "tokenizer"
                shutil.rmtree(out, ignore_errors=True)
                command = [sys.executable, "-m", "dataset", "tokenizer", str(corpus), str(out), "--kind", kind]
                command += ["--vocab_size", str(VOCABULARY[kind])]
                command += ["--sample_characters", str(arguments.sample_characters)]
                usage = run_measured(command, folder, folder / "log.txt", {"PYTHONPATH": str(ROOT)})
                peaks.append(usage.tree)
                record = json.loads((out / "tokenizer_training.json").read_text(encoding="utf-8"))
                characters = record["sample"]["characters"]
                measured.append({"kind": kind, "corpus_bytes": corpus.stat().st_size, "sample_characters": characters,
                                 "private_bytes": usage.tree, "seconds": usage.seconds})  # fmt: skip
                console.print(
                    f"{kind}, {size:g} GB, {characters:,} characters drawn: {usage.tree / 1e6:,.0f} MB private, "
                    f"{usage.seconds:,.0f} s"
                )
            results.append(result(f"private memory of {kind}, all / a tenth", peaks[1] / peaks[0], "ratio", TARGET))
    show_results(results, console)
    write_results(results, arguments.json, measured=measured)


if __name__ == "__main__":
    main()
