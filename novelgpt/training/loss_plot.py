"""loss.png: the curves of one run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.charts import figure_png
from novelgpt.settings.fonts import lettering


def draw_losses(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw training and evaluation loss against steps; the file is whole at any moment.

    Args:
        history: log entries with "step" and "loss" or "eval_loss" (nats per token). An entry with "saved_step" names
            the step whose weights the run ends with: its loss is marked, in place of the last.
        path: of the PNG; the title is its folder's name.

    Returns:
        Whether the machine's fonts have all letters of the title.
    """
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    saved = next((entry["saved_step"] for entry in reversed(history) if "saved_step" in entry), None)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        # As entries may come from JSON, which has no word for numbers that are not finite; they are gaps.
        points = [(entry["step"], math.nan if entry[key] is None else entry[key]) for entry in history if key in entry]
        if points:
            closing, mark = points[-1], ""
            if key == "eval_loss" and closing[0] == saved:
                mark = f", saved (step {saved})"
            points.sort(key=lambda point: point[0])  # the saved weights come last, whichever step they are of
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style if len(points) > 1 else "o", label=label, markersize=4, linewidth=1.5)
            axes.annotate(f"{closing[1]:.3f}{mark}", closing, textcoords="offset points", xytext=(6, -3))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    name = lettering(path.resolve().parent.name)
    axes.set_title(name.text, fontfamily=list(name.families), parse_math=False)
    axes.grid(alpha=0.3)
    axes.margins(x=0.08)
    if axes.lines:
        axes.legend()
    atomic_write(path, figure_png(figure))
    return name.complete
