"""Preparing novels: speed, memory, and growth with size.

    python benchmarks/prepare_throughput.py [--only speed memory growth hashing] [--folder FOLDER] [--json FILE]

* speed: from GBK files to clean chapters (decode, clean, chapters, quality) in 2 processes, in MB/s of the files; and
  what each step costs, in CPU seconds for a million characters, fingerprints and writing included;
* memory: the largest sum of the resident sizes of all processes of `python -m dataset novels`, at two sizes of input;
* growth: its time over sizes of input, fitted with size^exponent;
* hashing: what the step that looks for changes can read, in MB/s.

The text is that of the GBK novels under --folder, or of the samples. It is made as long as is needed by copies in which
half of the pairs of neighbours in the order of frequency are swapped: every copy has the statistics of the original,
and no two share more than a few of their sequences of five characters, so nothing is a duplicate. Without options, the
inputs are 0.1 and 1 GB; the whole takes some 10 minutes on 2 CPU cores and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Processes that are started do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import psutil
from results import at_least, make_console, make_parser, result, show_results, write_results
from rich.console import Console
from rich.table import Table

from dataset.decode import decode_text, decode_tolerant
from dataset.novels.artefacts import ArtefactWriter
from dataset.novels.books import prepare_book
from dataset.novels.chapters.chapters import split_chapters
from dataset.novels.cleaning.cleaning import clean, load_rules
from dataset.novels.cleaning.quality import judge
from dataset.novels.duplicates.shingles import fingerprint
from dataset.novels.engines.workers import map_files
from dataset.novels.manifest import hash_files
from dataset.novels.records import RawBook
from dataset.novels.sources.sources import read_books
from novelgpt.settings.paths import ROOT, SAMPLES

PARTS = ("speed", "memory", "growth", "hashing")
WORKERS = 2
REPEATS = 3
SPEED_TARGET, HASHING_TARGET = 20.0, 500.0
MEMORY_TARGET, GROWTH_TARGET = 1.15, 1.1
SAMPLING_SECONDS = 0.05
# Numbers and marks by which headings are found stay as they are, and so do the ends of quotations.
KEPT = set("第章回节節卷部集篇楔子序番外尾声正文上中下零〇一二三四五六七八九十百千万两廿")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("Preparing novels and tokenising them")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="of GBK novels, *.gbk.txt; default: text made from the samples")
    parser.add_argument("--speed_mb", type=int, default=100, help="of input for speed and hashing")
    parser.add_argument("--memory_mb", type=int, nargs=2, default=[100, 1000], metavar=("SMALL", "LARGE"))
    parser.add_argument("--growth_mb", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--work_folder", type=Path, help="where the inputs lie meanwhile; default: the system's")
    return parser.parse_args()


def source_texts(folder: Path | None) -> list[str]:
    """Novels to make the inputs from."""
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*.gbk.txt"))
        if not paths:
            raise SystemExit(f"{folder} holds no *.gbk.txt")
    else:
        paths = sorted((SAMPLES / "novels").glob("*.txt"))
    texts = [decode_text(path.read_bytes(), str(path)) for path in paths]
    while sum(map(len, texts)) < 500_000:  # the samples are short, books are not
        texts = [text + "\n" + swap_characters(text, seed) for seed, text in enumerate(texts)]
    return texts


def swap_characters(text: str, seed: int) -> str:
    """The same text in other characters: of neighbours in the order of frequency, half of the pairs are swapped."""
    generator = random.Random(seed)
    counts = Counter(text)
    ranked = [character for character, _ in counts.most_common() if "一" <= character <= "鿿" and character not in KEPT]
    swapped = {}
    for first, second in zip(ranked[::2], ranked[1::2], strict=False):
        if generator.random() < 0.5:
            swapped |= {ord(first): second, ord(second): first}
    return text.translate(swapped)


def write_novels(folder: Path, texts: Sequence[str], megabytes: float) -> list[Path]:
    """GBK files of about so many MB together, of which none resembles another."""
    folder.mkdir(parents=True)
    paths: list[Path] = []
    written, seed = 0, 0
    while written < megabytes * 1e6:
        for place, text in enumerate(texts):
            path = folder / f"novel-{seed:04d}-{place:02d}.txt"
            path.write_bytes((swap_characters(text, seed * 100 + place) if seed else text).encode("gb18030"))
            written += path.stat().st_size
            paths.append(path)
            if written >= megabytes * 1e6:
                break
        seed += 1
    return paths


@functools.cache
def _rules() -> Any:
    return load_rules()


def make_chapters(path: Path) -> Path:
    """What is timed: a file to its chapters, all in memory."""
    for book in read_books(path, path.parent):
        prepare_book(book, _rules(), simplify=False)
    return path


def study_speed(arguments: argparse.Namespace, work: Path, texts: list[str], console: Console) -> list[dict[str, Any]]:
    """MB/s of two processes, and what each step costs."""
    paths = write_novels(work / "speed", texts, arguments.speed_mb)
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    rates = [speed_of_processes(paths) for _ in range(REPEATS)]
    show_steps(paths[: max(3, len(texts))], work / "steps", console)
    console.print(
        f"Speed: {megabytes:,.0f} MB of GBK, {WORKERS} processes: {', '.join(f'{r:.1f}' for r in rates)} MB/s"
    )
    return [at_least("prepare_mb_per_second_of_2_processes", statistics.median(rates), "MB/s", SPEED_TARGET)]


def speed_of_processes(paths: Sequence[Path]) -> float:
    """MB/s from the moment when every process has done a file: starting them is part of a run, not of its speed."""
    megabytes, start = 0.0, 0.0
    for finished, (path, _) in enumerate(map_files(make_chapters, paths, WORKERS), start=1):
        if finished > WORKERS:
            megabytes += path.stat().st_size / 1e6
        else:
            start = time.perf_counter()
    return megabytes / (time.perf_counter() - start)


def show_steps(paths: Sequence[Path], work: Path, console: Console) -> None:
    """CPU seconds of each step for a million characters, in one process."""
    seconds: Counter[str] = Counter()
    characters = size = 0

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = function()
        seconds[name] += time.process_time() - start
        return value

    make_chapters(paths[0])  # fills the caches
    fingerprint(["山"])
    work.mkdir()
    with ArtefactWriter(work) as writer:
        for path in paths:
            data = timed("read", path.read_bytes)
            text, encoding, bad = timed("decode", lambda data=data, path=path: decode_tolerant(data, path.name))
            cleaned = timed("clean", lambda text=text: clean(text, _rules()))
            split = timed("chapters", lambda cleaned=cleaned: split_chapters(cleaned.lines))
            chapters = [chapter.text for chapter in split.chapters]
            timed("quality", lambda chapters=chapters: judge("\n".join(chapters)))
            timed("fingerprints", lambda chapters=chapters: fingerprint(chapters))
            book = prepare_book(RawBook(path.stem, path.name, text, encoding, bad), _rules(), simplify=False)
            timed("write", lambda book=book, bad=bad: writer.add(book, bad))
            characters += len(text)
            size += len(data)
    seconds["write"] -= seconds["fingerprints"]  # they are made there, too
    table = Table(title=f"Steps: {len(paths)} files, {characters:,} characters, one process", title_justify="left")
    for column in ("step", "CPU s for a million characters", "MB/s of GBK"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, value in seconds.items():
        table.add_row(name, f"{value / characters * 1e6:.3f}", f"{size / max(value, 1e-9) / 1e6:,.1f}")
    timed_steps = ("read", "decode", "clean", "chapters", "quality")
    total = sum(seconds[name] for name in timed_steps)
    table.add_row("decode to quality", f"{total / characters * 1e6:.3f}", f"{size / total / 1e6:,.1f}")
    console.print(table)


def run_command(raw: Path, out: Path) -> tuple[float, int]:
    """Seconds of a run of the command, and the largest sum of the resident sizes of its processes, in bytes."""
    command = [sys.executable, "-m", "dataset", "novels", str(raw), str(out), "--workers", str(WORKERS)]
    start = time.perf_counter()
    with (out.parent / f"{out.name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(resident_sizes(process.pid)))
            time.sleep(SAMPLING_SECONDS)
    if process.returncode != 0:
        raise SystemExit((out.parent / f"{out.name}.log").read_text(encoding="utf-8"))
    return time.perf_counter() - start, peak


def resident_sizes(pid: int) -> Iterator[int]:
    """Of a process and all that it has started, in bytes."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            yield process.memory_info().rss
        except psutil.NoSuchProcess:
            continue


def study_memory(arguments: argparse.Namespace, work: Path, texts: list[str], console: Console) -> list[dict[str, Any]]:
    """Peak memory of the command at two sizes."""
    peaks = []
    for megabytes in arguments.memory_mb:
        write_novels(work / f"memory-{megabytes}", texts, megabytes)
        seconds, peak = run_command(work / f"memory-{megabytes}", work / f"memory-{megabytes}-out")
        peaks.append(peak)
        console.print(f"Memory: {megabytes:,} MB of GBK: {peak / 1e6:,.0f} MB at the peak, {seconds:,.1f} s")
    return [result("prepare_memory_of_large_over_small_input", peaks[1] / peaks[0], "ratio of bytes", MEMORY_TARGET)]


def study_growth(arguments: argparse.Namespace, work: Path, texts: list[str], console: Console) -> list[dict[str, Any]]:
    """Time of the command over sizes."""
    sizes, times = arguments.growth_mb, []
    for megabytes in sizes:
        write_novels(work / f"growth-{megabytes}", texts, megabytes)
        seconds, _ = run_command(work / f"growth-{megabytes}", work / f"growth-{megabytes}-out")
        times.append(seconds)
        console.print(f"Growth: {megabytes:,} MB of GBK: {seconds:,.1f} s, {megabytes / seconds:,.1f} MB/s in all")
    exponent = float(numpy.polyfit(numpy.log(sizes), numpy.log(times), 1)[0])
    return [result("prepare_time_with_size", exponent, "exponent", GROWTH_TARGET)]


def study_hashing(
    arguments: argparse.Namespace, work: Path, texts: list[str], console: Console
) -> list[dict[str, Any]]:
    """MB/s of the hashes of files that are in the system's cache."""
    paths = write_novels(work / "hashing", texts, arguments.speed_mb)
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        list(hash_files(paths, WORKERS))
        rates.append(megabytes / (time.perf_counter() - start))
    console.print(f"Hashing: {', '.join(f'{rate:,.0f}' for rate in rates)} MB/s")
    return [at_least("prepare_hashing_mb_per_second", statistics.median(rates), "MB/s", HASHING_TARGET)]


def main() -> None:
    """Run the parts asked for; then the targets."""
    arguments = read_arguments()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    console = make_console()
    texts = source_texts(arguments.folder)
    studies = dict(zip(PARTS, (study_speed, study_memory, study_growth, study_hashing), strict=True))
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.work_folder) as work:
        for part in PARTS:
            if part in arguments.only:
                results += studies[part](arguments, Path(work), texts, console)
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
