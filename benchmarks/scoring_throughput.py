"""Time and memory to score many pairs of long texts with every text metric.

    python benchmarks/scoring_throughput.py [--pairs 1000] [--characters 4000] [--json FILE]

Pairs are drawn from the sample novels, their sentences in random order, so that no two texts are alike and the texts of
a pair share words as answers and references do. Time is from the texts to scores with 95 % intervals, processes and
dictionaries included. Memory is the largest sum of resident memory of all processes, sampled, beside the same for a
quarter of the pairs. rouge_chinese's time is measured on one pair and multiplied.
"""

from __future__ import annotations

import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from results import make_console, make_parser, result, show_results, write_results

from novelgpt.scoring.row_scores import ScoredRow, score_rows
from novelgpt.scoring.segmentation import segment
from novelgpt.scoring.summary import summarise_rows

SECONDS = 60.0
NOVELS = Path(__file__).resolve().parents[1] / "dataset" / "samples" / "novels"


def make_rows(pairs: int, characters: int, seed: int = 1) -> list[ScoredRow]:
    """Predictions and references of so many characters."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(NOVELS.glob("*.txt")))
    sentences = [sentence for sentence in re.split(r"(?<=[。！？”\n])", text) if sentence.strip()]
    generator = random.Random(seed)

    def draw() -> str:
        drawn = "".join(generator.choices(sentences, k=characters // 8))
        return drawn[:characters]

    return [ScoredRow(draw(), draw()) for _ in range(pairs)]


def peak_of_processes(stop: threading.Event, peak: list[float]) -> None:
    """Keep the largest sum of resident memory of this process and its children, in bytes, in `peak`."""
    own = psutil.Process()
    while not stop.wait(0.05):
        total = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total)


def measure(rows: list[ScoredRow], workers: int) -> tuple[float, float]:
    """(seconds, bytes above what is held before)."""
    before = psutil.Process().memory_info().rss
    stop, peak = threading.Event(), [float(before)]
    watcher = threading.Thread(target=peak_of_processes, args=(stop, peak))
    watcher.start()
    begin = time.perf_counter()
    summarise_rows(list(score_rows(rows, workers)))
    seconds = time.perf_counter() - begin
    stop.set()
    watcher.join()
    return seconds, peak[0] - before


def seconds_of_rouge_chinese(row: ScoredRow) -> float:
    """One pair, in a process of its own: the package takes a gigabyte."""
    code = (
        "import sys, time, rouge_chinese\n"
        "sides = sys.stdin.read().split('\\x00')\n"
        "begin = time.perf_counter()\n"
        "rouge_chinese.Rouge().get_scores(*sides)\n"
        "print(time.perf_counter() - begin)\n"
    )
    sides = "\0".join(segment(text) for text in (row.prediction, row.reference))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=sides, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Measure, print the table."""
    parser = make_parser("time and memory to score long texts")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--characters", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    console = make_console()
    rows = make_rows(arguments.pairs, arguments.characters)
    quarter_seconds, quarter_memory = measure(rows[: len(rows) // 4], arguments.workers)
    seconds, memory = measure(rows, arguments.workers)
    package = statistics.median(seconds_of_rouge_chinese(rows[number]) for number in range(3)) * len(rows)
    console.print(
        f"{len(rows):,} pairs of {arguments.characters:,} characters, {arguments.workers} processes: {seconds:.1f} s, "
        f"{memory / 2**20:.0f} MiB; a quarter of them {quarter_seconds:.1f} s, {quarter_memory / 2**20:.0f} MiB\n"
        f"rouge_chinese alone would take {package / 60:.0f} minutes for its three of the scores, in one process\n"
    )
    results = [
        result(f"seconds for {len(rows):,} pairs, every text metric", seconds, "s", SECONDS),
        result("time against rouge_chinese alone", seconds / package, "ratio", 1 / 60),
        result("memory, all pairs / a quarter of them", memory / quarter_memory, "ratio", 1.25),
    ]
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
