"""What the demo promises: that it takes at most four minutes on 2 CPU cores, and that each training is worth its time.

    python benchmarks/demo.py [--folder FOLDER] [--json FILE]

Runs `python -m cli.demo` as a process of its own, installation not included. With --folder, its results stay there.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Tests import this file, and do not get its folder by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import at_least, make_console, make_parser, result, show_results, write_results

from novelgpt.settings.hardware import usable_cores

ROOT = Path(__file__).resolve().parents[1]
SECONDS, STOPPED, LOOPED = 240, 0.9, 0.1
TUNED = ("finetune", "finetune_lora")


def run_demo(folder: Path) -> tuple[float, float]:
    """Seconds of the whole process, and the largest resident memory of one of its processes in GB."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "cli.demo", str(folder)], env=environment, cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


def judge(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of summary.json beside their targets.

    Of a paired difference, the end of its 95 % interval that is closer to no difference counts.
    """
    bits = [summary[name]["heldout_book_bits_per_character"] for name in ("base", "pretrain")]
    results = [result("pretraining: bits per character of a held-out book, after / before", bits[1] / bits[0], "", 1)]
    for one in summary["comparisons"]:
        name = f"{one['of']} - {one['with']}: {one['name']}, worse end of the interval"
        if one["name"] == "loss":
            results.append(result(name, one["high"], "nats per token", 0))
        else:
            results.append(at_least(name, one["low"], "", 0))
    for name in TUNED:
        results.append(at_least(f"{name}: share of answers that stop", summary[name]["stopped"], "", STOPPED))
        results.append(result(f"{name}: share of answers that loop", summary[name]["looped"], "", LOOPED))
    return results


def main() -> None:
    """Run the demo, then compare with the targets."""
    parser = make_parser("Seconds, memory and scores of the demo")
    parser.add_argument("--folder", type=Path, help="where the demo's results stay [default: nowhere]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary) / "demo").absolute()
        seconds, gigabytes = run_demo(folder)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    results = [result(f"seconds of the demo on {usable_cores()} cores", seconds, "s", SECONDS), *judge(summary)]
    console = make_console()
    console.print(f"\nlargest process: {gigabytes:.2f} GB")
    show_results(results, console)
    write_results(results, arguments.json, gigabytes=gigabytes)


if __name__ == "__main__":
    main()
