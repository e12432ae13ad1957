"""Training speed and memory side by side: this toolkit, the plain Trainer, TRL's SFTTrainer and LLaMA-Factory.

    python benchmarks/train_throughput.py [--trl_python PYTHON] [--llamafactory_python PYTHON] [--json FILE]

All train the same rows and the same random weights (held in fp32) with fused AdamW at a constant rate, each in its own
process through the tool's own entry; benchmarks/peers/ holds what runs there. A step is 8 padded rows or one pack.
Without a GPU, all run in fp32 and, where the CPU is fast in it, bf16, and twice: with the memory allocator as shipped,
and with a glibc that keeps freed blocks.

Packers put rows of like length together, so eight packs may hold a fifth more or fewer rows than eight others. Speed
therefore counts the tokens of the timed steps, without padding: rows/s are these tokens over the seconds and over the
mean tokens of a row. The rows really in the steps stand beside it. Peak memory is the largest resident size of the
process, its start and end included, or what was allocated on the GPU.

A run of all takes about an hour on 2 CPU cores; --only and --allocators choose a part.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.contest import ALLOCATORS, OURS, PIP_LINES, ROOT, SHAPES, SMALL, Contest, Run, Setting
from results import TABLE_WIDTH, make_parser, show_results, write_results
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

SPEED_TARGET, MEMORY_TARGET, CEILING_TARGET, CURVE_TARGET = 3.0, 0.3, 0.6, 0.01
SMOOTHED_STEPS = 10
# Dense bf16 products with fp32 sums, in TFLOP/s, as the data sheets state; the first name that fits counts.
GPU_PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "H20": 148, "A100": 312,
             "A800": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}  # fmt: skip
COLUMNS = ["rows/s", "of best peer", "rows timed", "tokens a row", "trained", "peak GB", "last loss", "of ceiling"]


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("Training speed and memory, this toolkit against its peers")
    parser.add_argument("--model_size", choices=SHAPES, default=SMALL, help="1.5b and 3b are for a GPU")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="one with ChatML's marks; default: the small base's")
    parser.add_argument("--rows", type=Path, metavar="FILE", default=ROOT / "dataset/samples/papers/train.jsonl")
    parser.add_argument("--max_length", type=int, default=1024, help="rows with more tokens are left out")
    parser.add_argument("--pack_length", type=int, help="tokens of a pack; default: 2048, and 4096 for 1.5b and 3b")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup_steps", type=int, default=2, help="steps before them")
    parser.add_argument(
        "--curve_steps", type=int, default=0, help="also compare our bf16 and fp32 losses, N steps each"
    )
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="runs with one of these in their names: trl 'packed bf16'"
    )
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--llamafactory_python", default=sys.executable, help="interpreter that has llamafactory")
    parser.add_argument("--work_folder", type=Path, help="where the model lies meanwhile; default: the system's")
    return parser.parse_args()


def cells(run: Run, best: Run | None, contest: Contest) -> list[str]:
    """The figures of a run for people, in the order of COLUMNS."""
    figures = run.figures
    if figures is None:
        return ["-"] * len(COLUMNS)
    speed = contest.rows_per_second(run)
    last_step = max(figures["losses"], key=int)
    return [
        f"{speed:.2f}",
        f"{speed / contest.rows_per_second(best):.2f}" if best else "",
        f"{figures['rows']} in {figures['seconds']:.1f} s",
        f"{figures['tokens'] / figures['rows']:.1f}",
        f"{figures['trained_tokens'] / figures['rows']:.1f}",
        f"{figures['memory'] / 1e9:.2f}",
        f"{figures['losses'][last_step]:.4f}",
        f"{contest.useful_flops(run) / contest.ceiling:.1%}",
    ]


def describe(contest: Contest, console: Console) -> None:
    """Say what is compared, and on what."""
    facts = contest.facts
    console.print(
        f"{facts['weights'] / 1e6:,.1f} M weights, of which {facts['layer_weights'] / 1e6:,.1f} M in layers and "
        f"{facts['head_weights'] / 1e6:,.1f} M in the head; {facts['rows']:,} rows of {facts['tokens_per_row']:.1f} "
        f"tokens, {facts['trained_per_row']:.1f} of them trained; left out, as longer or not of one answer: "
        f"{facts['left_out']:,} rows"
    )
    ceilings = ", ".join(f"{name} {flops / 1e12:.3f}" for name, flops in contest.ceilings.items())
    console.print(f"{facts['device'] or 'CPU'}; fastest matrix products, in TFLOP/s: {ceilings}")
    if "bf16" not in contest.ceilings:
        console.print("bf16 is left out: this CPU has no fast instructions for it")
    for tool, versions in contest.tools.items():
        words = ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
        console.print(f"{tool}: {words or 'not installed: ' + PIP_LINES.get(tool, '')}", highlight=False)


def show_table(runs: list[Run], best: Run | None, contest: Contest, console: Console) -> None:
    """All runs against the best peer, and why some have no figures."""
    table = Table(title="Training", title_justify="left", box=SIMPLE)
    for number, column in enumerate(["run", *COLUMNS]):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for run in runs:
        table.add_row(run.name, *cells(run, best, contest))
    console.print(table)
    for run in runs:
        if run.failure:
            console.print(f"{run.name}: {run.failure}", markup=False, highlight=False)


def result(name: str, value: float, unit: str, target: float, at_least: bool) -> dict[str, Any]:
    """One entry of --json."""
    holds = value >= target if at_least else value <= target
    words = f"{'>=' if at_least else '<='} {target}"
    return {"name": name, "value": value, "unit": unit, "target": words, "holds": holds}


def results_of(runs: list[Run], best: Run | None, contest: Contest) -> list[dict[str, Any]]:
    """The claims that these runs decide, on our best run and the best peer."""
    ours = fastest([run for run in runs if run.tool == OURS], contest)
    if ours is None or ours.figures is None:
        return []
    share = contest.useful_flops(ours) / contest.ceiling
    results = [result("train_share_of_ceiling", share, "share", CEILING_TARGET, at_least=True)]
    if best is not None and best.figures is not None:
        speed = contest.rows_per_second(ours) / contest.rows_per_second(best)
        memory = ours.figures["memory"] / best.figures["memory"]
        results += [
            result("train_rows_per_second_over_best_peer", speed, "ratio of rows/s", SPEED_TARGET, at_least=True),
            result("train_peak_memory_over_best_peer", memory, "ratio of bytes", MEMORY_TARGET, at_least=False),
        ]
    return results


def fastest(runs: list[Run], contest: Contest) -> Run | None:
    """The run of most rows/s; None where none has figures."""
    return max((run for run in runs if run.figures is not None), key=contest.rows_per_second, default=None)


def show_utilisation(runs: list[Run], contest: Contest, console: Console) -> None:
    """On a known GPU, how our best run uses what the data sheet promises."""
    ours = fastest([run for run in runs if run.tool == OURS], contest)
    device = contest.facts["device"] or ""
    peak = next((peak * 1e12 for name, peak in GPU_PEAKS.items() if name in device), None)
    if ours is None or ours.figures is None or peak is None:
        return
    weights = contest.facts["layer_weights"] + contest.facts["head_weights"]
    rate = ours.figures["tokens"] / ours.figures["seconds"]
    console.print(
        f"{ours.name}: {6 * weights * rate / peak:.1%} model-FLOPs utilisation (6 x {weights / 1e9:.2f} G weights x "
        f"{rate:,.0f} tokens/s, of the data sheet's {peak / 1e12:,.0f} TFLOP/s); as useful work, with the head at "
        f"trained tokens alone: {contest.useful_flops(ours) / peak:.1%}"
    )


def compare_curves(contest: Contest, steps: int, console: Console) -> list[dict[str, Any]]:
    """Train ours in fp32 and bf16 over the same packs: the largest relative difference of the smoothed losses."""
    if "bf16" not in contest.ceilings:
        return []
    curves = []
    for precision in ("fp32", "bf16"):
        run = Run(OURS, packing=True, precision=precision, allocator="kept")
        contest.train(run, 0, steps)
        if run.figures is None:
            console.print(f"loss curve in {precision}: {run.failure}", markup=False)
            return []
        losses = [loss for _, loss in sorted(run.figures["losses"].items(), key=lambda entry: int(entry[0]))]
        ends = range(min(SMOOTHED_STEPS, len(losses)), len(losses) + 1)
        curves.append([sum(losses[max(0, end - SMOOTHED_STEPS) : end]) / min(SMOOTHED_STEPS, end) for end in ends])
        console.print(f"loss curve in {precision}: {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    difference = max(abs(low - full) / full for full, low in zip(*curves, strict=True))
    name = f"train_loss_curve_bf16_against_fp32_{steps}_steps"
    return [result(name, difference, "largest relative difference", CURVE_TARGET, at_least=False)]


def main() -> None:
    """Run all, a line each; then the table, and the targets."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    console = Console(soft_wrap=True, width=max(Console().width, TABLE_WIDTH))
    with tempfile.TemporaryDirectory(dir=arguments.work_folder) as folder:
        setting = Setting(
            folder=Path(folder).absolute(),
            model_size=arguments.model_size,
            tokenizer=arguments.tokenizer,
            rows=arguments.rows,
            max_length=arguments.max_length,
            pack_length=arguments.pack_length or (2048 if arguments.model_size == SMALL else 4096),
            trl_python=arguments.trl_python,
            llamafactory_python=arguments.llamafactory_python,
        )
        contest = Contest(setting)
        describe(contest, console)
        only = [word.lower() for word in arguments.only or [""]]
        runs = [
            run for run in contest.planned_runs(arguments.allocators) if any(word in run.name.lower() for word in only)
        ]
        for run in runs:
            contest.train(run, arguments.warmup_steps, arguments.steps)
            words = [
                f"{text} {column}" for text, column in zip(cells(run, None, contest), COLUMNS, strict=True) if text
            ]
            console.print(f"{run.name:<34}{run.failure or ', '.join(words)}", markup=False, highlight=False)
        best = fastest([run for run in runs if run.tool != OURS], contest)
        show_table(runs, best, contest, console)
        show_utilisation(runs, contest, console)
        results = results_of(runs, best, contest)
        if arguments.curve_steps:
            results += compare_curves(contest, arguments.curve_steps, console)
    if best is not None:
        console.print(f"best peer of those that ran: {best.name}")
    show_results(results, console)
    measured = [
        {"name": run.name, "rows_per_second": contest.rows_per_second(run) or None, "failure": run.failure or None}
        | (run.figures or {})
        for run in runs
    ]
    write_results(results, arguments.json, runs=measured, ceilings=contest.ceilings)


if __name__ == "__main__":
    main()
