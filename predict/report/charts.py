"""The charts of a report: what they draw, of which numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from predict.report.curves import GRAM, Curve
from predict.report.figures import HUMAN, INK, RUN_COLOURS, RUN_LINES, RUN_MARKERS, Chart, Look

MOST_POINTS = 240
LABELS = (
    "与参考答案的相似度及置信区间词重合二元最长公共序列行数占比每条的困惑度回答字数长度关系原文在文中的位置"
    "重复率随变化训练损失曲线评测步每个词元奈特"
)
"""Letters of the Chinese labels below, which a font must have."""

PICTURES = (
    "scores", "rouge-1_histogram", "rouge-2_histogram", "rouge-l_histogram", "perplexity_histogram",
    "rouge-l_by_reference_length", "rouge-l_by_prediction_length", "repetition_by_position", "losses",
)  # fmt: skip
"""Names of the files that a report may have."""


class Named(NamedTuple):
    """Something of one run: the run's name, its number (colour, marker and line), and the thing."""

    name: str
    number: int
    content: Any


def scores_chart(metrics: Sequence[str], runs: Sequence[Named]) -> Chart:
    """Values with their intervals, a line a score. content: {metric: (value, low, high)}."""

    def draw(axes: Axes, look: Look) -> None:
        step = 0.72 / max(1, len(runs))
        for run in runs:
            shift = (run.number - (len(runs) - 1) / 2) * step
            rows = [place for place, metric in enumerate(metrics) if metric in run.content]
            found = [run.content[metrics[row]] for row in rows]
            values = [value for value, _, _ in found]
            errors = [[max(0.0, v - low) for v, low, _ in found], [max(0.0, high - v) for v, _, high in found]]
            axes.errorbar(
                values, [row + shift for row in rows], xerr=errors, fmt=RUN_MARKERS[run.number], markersize=5,
                color=RUN_COLOURS[run.number], elinewidth=2, capsize=0, label=_run_label(run, look),
            )  # fmt: skip
        axes.set_yticks(range(len(metrics)), metrics, color=INK)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=0.0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    return Chart(
        "scores",
        "Likeness to the reference, with 95 % intervals",
        "与参考答案的相似度及 95 % 置信区间",
        "A dot is the score, the line its 95 % interval; right is better.",
        "圆点是分数，横线是 95 % 置信区间，越靠右越好。",
        draw,
        height=int(70 + len(metrics) * (18 + 10 * len(runs))),
        legend_rows=len(runs),
        full=True,
    )


def histogram_chart(
    metric: str, runs: Sequence[Named], english: str, chinese: str, logarithmic: bool = False
) -> Chart | None:
    """Share of rows by value, with the medians. content: values of rows; None where there are none."""
    values = [value for run in runs for value in run.content if math.isfinite(value)]
    if not values:
        return None
    edges = _edges(values, logarithmic, max(len(run.content) for run in runs))

    def draw(axes: Axes, look: Look) -> None:
        for run in runs:
            if not len(run.content):
                continue
            colour = RUN_COLOURS[run.number]
            counts, _ = numpy.histogram(numpy.clip(run.content, edges[0], edges[-1]), edges)
            shares = counts / len(run.content)
            if len(runs) <= 3:  # more surfaces, one above the other, would hide each other
                axes.stairs(shares, edges, fill=True, color=colour, alpha=0.28 if len(runs) == 1 else 0.12)
            axes.stairs(
                shares, edges, color=colour, linewidth=1.8, linestyle=RUN_LINES[run.number], baseline=None,
                label=_run_label(run, look),
            )  # fmt: skip
            axes.axvline(float(numpy.median(run.content)), color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
        axes.set_ylabel(look.label("share of rows", "行数占比"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axes.set_xlabel(look.label(english, chinese))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0.0)
        axes.grid(axis="y")
        if logarithmic:
            _logarithmic(axes, edges)

    return Chart(
        f"{metric}_histogram",
        f"{english} of each row",
        chinese,
        "Share of rows by value; the dotted line is the median.",
        "各分数段的行数占比，虚线是中位数。",
        draw,
        legend_rows=len(runs),
    )


def length_chart(metric: str, runs: Sequence[Named], side: str) -> Chart | None:
    """A score against length; None where all lengths are one. content: (lengths, values, Curve of means).

    Args:
        metric: the score.
        runs: what to draw.
        side: "reference" or "prediction", whose length it is.
    """
    if len({length for run in runs for length in run.content[0]}) < 2:
        return None
    english, chinese = {"reference": ("reference", "参考答案"), "prediction": ("answer", "回答")}[side]

    def draw(axes: Axes, look: Look) -> None:
        for run in runs:
            lengths, values, curve = run.content
            colour = RUN_COLOURS[run.number]
            shown = range(0, len(lengths), max(1, -(-len(lengths) * len(runs) // MOST_POINTS)))
            axes.plot(
                [lengths[row] for row in shown], [values[row] for row in shown], RUN_MARKERS[run.number],
                color=colour, alpha=0.22, markersize=3.2, markeredgewidth=0,
            )  # fmt: skip
            _plot_means(axes, curve, run.number, _run_label(run, look))
        axes.set_xlabel(look.label(f"characters of the {english}", f"{chinese}字数"))
        axes.set_ylabel(metric)
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid()

    return Chart(
        f"{metric}_by_{side}_length",
        f"{metric} against the length of the {english}",
        f"与{chinese}长度的关系",
        "A faint point is a row; the line joins means of groups of rows, with 95 % intervals.",
        "浅色点是单条数据，折线是分组平均值及其 95 % 置信区间。",
        draw,
        legend_rows=len(runs),
    )


def repetition_chart(runs: Sequence[Named], human: Curve | None, width: int, read: tuple[str, str]) -> Chart:
    """Repetition against position. content: Curve.

    Args:
        runs: what to draw.
        human: that of the references.
        width: characters of a bin.
        read: a sentence about the rows that were read, in both languages; "" where all were.
    """

    def draw(axes: Axes, look: Look) -> None:
        if human is not None and len(human.places):
            axes.fill_between(
                human.places, human.means - human.errors, human.means + human.errors, color=HUMAN, alpha=0.18,
                linewidth=0,
            )  # fmt: skip
            axes.plot(
                human.places, human.means, color=HUMAN, linestyle=(0, (1.5, 1.5)), linewidth=2.2,
                marker="" if len(human.places) > 1 else "X", label=look.label("references", "原文"),
            )  # fmt: skip
        for run in runs:
            _plot_means(axes, run.content, run.number, _run_label(run, look))
        axes.set_xlabel(look.label("characters from the beginning", "在文中的位置"))
        axes.set_ylabel(look.label(f"{GRAM}-grams seen before", "重复率"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        curves = [run.content for run in runs] + [human] * (human is not None)
        highest = max(curve.means.max() for curve in curves if len(curve.means))
        # A line along zero must be seen, and a share is no more than one, whatever its interval.
        axes.set_ylim(-0.025 * highest, min(1.03, 1.25 * highest) if highest else 1.0)
        axes.set_xlim(left=0.0)
        axes.grid()

    return Chart(
        "repetition_by_position",
        "Repetition against the position in the text",
        "重复率随位置的变化",
        f"Share of the {GRAM}-grams of characters beginning in each {width:,} characters that stood earlier in the "
        f"same text; the grey line is what the references have at that place.{read[0]}",
        f"每 {width:,} 字中，前文已出现过的 {GRAM} 字片段所占比例；灰线为参考答案在相同位置的重复率。{read[1]}",
        draw,
        height=360,
        legend_rows=len(runs) + (human is not None),
        full=True,
    )


def loss_chart(runs: Sequence[Named]) -> Chart | None:
    """Training and evaluation loss. content: log entries; None where no run has any."""
    found = [run for run in runs if any(key in entry for entry in run.content for key in ("loss", "eval_loss"))]
    if not found:
        return None

    def draw(axes: Axes, look: Look) -> None:
        for run in found:
            colour = RUN_COLOURS[run.number]
            for key, english, chinese in (("loss", "train", "训练"), ("eval_loss", "eval", "评测")):
                points = [(entry["step"], entry[key]) for entry in run.content if _finite(entry.get(key))]
                points.sort(key=lambda point: point[0])  # an evaluation of the best weights comes last
                if not points:
                    continue
                steps, losses = zip(*points, strict=True)
                label = f"{_run_label(run, look)}: {look.label(english, chinese)}"
                if key == "loss":
                    axes.plot(steps, losses, color=colour, linewidth=1.1, alpha=0.6, label=label)
                else:
                    marker = RUN_MARKERS[run.number]
                    axes.plot(steps, losses, f"{marker}-", color=colour, markersize=4.5, linewidth=1.9, label=label)
        axes.set_xlabel(look.label("step", "步"))
        axes.set_ylabel(look.label("nats a token", "每个词元奈特"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.02)
        axes.grid()

    return Chart(
        "losses",
        "Loss during training",
        "训练损失曲线",
        "Thin: training loss; with markers: loss of the evaluation rows.",
        "细线是训练损失，带标记的是评测损失。",
        draw,
        height=360,
        legend_rows=2 * len(found),
        full=True,
    )


def _plot_means(axes: Axes, curve: Curve, number: int, label: str) -> None:
    errors = numpy.nan_to_num(curve.errors)
    axes.errorbar(
        curve.places, curve.means, yerr=errors, color=RUN_COLOURS[number], marker=RUN_MARKERS[number], markersize=4.5,
        linestyle=RUN_LINES[number], elinewidth=1.2, capsize=0, label=label,
    )  # fmt: skip


def _run_label(run: Named, look: Look) -> str:
    letter = chr(ord("A") + run.number)
    longest = 26 if look.narrow else 30
    name = run.name if len(run.name) <= longest else "…" + run.name[1 - longest :]
    name = name if look.font else name.replace("…", "...")
    return f"{letter}  {name}" if look.can_write(name) else f"Run {letter}"


_BIN_WIDTHS = (0.002, 0.005, 0.01, 0.02, 0.025, 0.05)


def _edges(values: Sequence[float], logarithmic: bool, rows: int) -> numpy.ndarray:
    """[bins + 1]; the more rows, the more bins; on a logarithmic axis without the outermost half per cent."""
    bins = int(min(30, max(10, round(3 * rows ** (1 / 3)))))
    if not logarithmic:
        # Round ends, from 0 where the values come near it.
        low = min(values) if min(values) > max(values) / 2 else 0.0
        width = next((step for step in _BIN_WIDTHS if (max(values) - low) / step <= bins), 0.1)
        first, last = math.floor(low / width + 1e-9), math.floor(max(values) / width + 1e-9) + 1
        return numpy.arange(first, max(last, first + 4) + 1) * width
    low, high = (float(numpy.percentile(values, share)) for share in (0.5, 99.5))
    low, high = max(1.0, low / 1.05), min(max(high, 1.0) * 1.05, 1e30)
    return numpy.geomspace(low, max(high, low * 1.2), bins + 1)


def _logarithmic(axes: Axes, edges: numpy.ndarray) -> None:
    axes.set_xscale("log")
    wide = edges[-1] / edges[0]
    steps = (1.0,) if wide > 1e3 else (1.0, 2.0, 5.0) if wide > 8 else tuple(float(step) for step in range(1, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=steps) if wide > 2 else MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"))
    axes.set_xlim(edges[0], edges[-1])


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
