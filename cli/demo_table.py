"""The last step of the demo: the figures of its runs, in summary.json and one table."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD

from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.console import make_console, number_table
from novelgpt.settings.remedies import environment_program
from novelgpt.settings.terminal import say

MODELS = {
    "base": "base",
    "pretrain": "pretrained",
    "finetune": "full SFT",
    "finetune_lora": "LoRA SFT",
}
SCORES = ("rouge-1", "rouge-2", "rouge-l")


def write_summary(demo: Path) -> None:
    """Write summary.json into the folder of a demo whose runs have ended, and print its table.

    The base is not trained: its seconds and tokens per second are those of answering.
    """
    runs = {name: _read(demo / name / "run.json")["results"] for name in MODELS if name != "base"}
    summary: dict[str, dict[str, float]] = {}
    for name in MODELS:
        scores = _read(demo / name / ("scores.json" if name == "base" else "predict/scores.json"))
        figures = {"eval_loss": scores["loss"], "perplexity": scores["perplexity"]}
        figures |= {metric: scores[metric] for metric in SCORES}
        figures["seconds"] = scores["seconds"] if name == "base" else runs[name]["train_runtime"]
        figures["tokens_per_second"] = runs.get(name, scores)["tokens_per_second"]
        summary[name] = figures
    before, after = (runs["pretrain"][name] for name in ("start_eval_perplexity", "eval_perplexity"))
    summary["base"]["heldout_book_perplexity"] = before
    summary["pretrain"]["heldout_book_perplexity"] = after
    atomic_write(demo / "summary.json", json.dumps(summary, indent=2) + "\n")
    headings = ("model", "eval loss", "perplexity", *SCORES, "seconds", "tokens/s")
    table = number_table("Held-out title -> abstract pairs", *headings)
    table.box, table.show_edge, table.pad_edge, table.padding = SIMPLE_HEAD, False, False, (0, 1, 0, 0)
    for name, label in MODELS.items():
        figures = summary[name]
        table.add_row(
            label,
            f"{figures['eval_loss']:.3f}",
            f"{figures['perplexity']:.1f}",
            *(f"{100 * figures[metric]:.2f}" for metric in SCORES),
            f"{figures['seconds']:.0f}",
            f"{figures['tokens_per_second']:,.0f}",
        )
    make_console(soft_wrap=True).print(table)
    say(
        f"Held-out book: perplexity {before:.1f} -> {after:.1f} by pretraining, {before / after:.1f} times lower.",
        "Loss in nats per token, ROUGE in %; seconds and tokens/s of training (base: of answering).",
        f"  curves        {demo}/*/loss.png",
        f"  predictions   {demo}/base/predictions.jsonl, {demo}/*/predict/predictions.jsonl",
        f"  figures       {demo}/summary.json",
        f"  all curves    {environment_program('tensorboard')} --logdir {shlex.quote(str(demo))}",
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
