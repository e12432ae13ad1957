"""The charts of a report: what each draws, from which scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from novelgpt.settings.charts import COLOURS, COUNTS, HUMAN, INK, LINES, MARKERS, Chart, ChartLabels
from predict.report.curves import GRAM, Curve, bin_width, means_by_length, repetition_by_position, sample
from predict.report.metrics import METRICS, is_number
from predict.report.runs import ReportRun

MAX_POINTS = 240
LABELS = (
    "与参考答案的相似度及置信区间词重合二元最长公共子序列（按）行数占比各行的困惑度回答字数长度关系在文中位置"
    "重复率随变化训练损失曲线评估步计次"
)
"""Letters of the Chinese labels below, which a font must have."""

PICTURES = (
    "scores", "rouge-1_histogram", "rouge-2_histogram", "rouge-l_histogram", "perplexity_histogram",
    "rouge-l_by_reference_length", "rouge-l_by_prediction_length", "repetition_by_position", "losses",
)  # fmt: skip
"""Names of all files that a report can have."""

_SIMILARITY = [name for name, metric in METRICS.items() if metric.group == "overlap" and name != "sacrebleu"]
_LARGEST_EXPONENT = 700.0
_BIN_WIDTHS = (0.002, 0.005, 0.01, 0.02, 0.025, 0.05)


def make_charts(runs: Sequence[ReportRun]) -> dict[str, list[Chart]]:
    """The charts of each section of the page; a chart without data is left out."""
    scored = [run for run in runs if run.scored]
    perplexities = [[math.exp(min(loss, _LARGEST_EXPONENT)) for loss in run.values("loss")] for run in runs]
    sections: dict[str, list[Chart | None]] = {
        "scores": [_scores_chart(scored)],
        "distributions": [
            *(
                _histogram_chart(metric, METRICS[metric].chinese, scored, [run.values(metric) for run in scored])
                for metric in ("rouge-1", "rouge-2", "rouge-l")
            ),
            _histogram_chart("perplexity", "各行的困惑度", runs, perplexities, logarithmic=True),
        ],
        "lengths": [
            _length_chart(scored, "reference", "reference", "参考答案"),
            _length_chart(scored, "prediction", "answer", "回答"),
        ],
        "repetition": [_repetition_chart(runs)],
        "losses": [_loss_chart(runs)],
    }
    charts = {section: [chart for chart in found if chart is not None] for section, found in sections.items()}
    for section in ("distributions", "lengths"):
        # Side by side, so of one height, also where a run has no data in one of them; a single one gets the full width.
        full = len(charts[section]) == 1
        charts[section] = [replace(chart, legend_rows=len(runs), full=full) for chart in charts[section]]
    return charts


def _scores_chart(runs: Sequence[ReportRun]) -> Chart | None:
    """Scores with their intervals, one line per score."""
    if not runs:
        return None
    metrics = [name for name in _SIMILARITY if any(is_number(run.scores.get(name)) for run in runs)]

    def draw(axes: Axes, labels: ChartLabels) -> None:
        step = 0.72 / len(runs)
        for run in runs:
            rows = [row for row, metric in enumerate(metrics) if is_number(run.scores.get(metric))]
            values = [run.scores[metrics[row]] for row in rows]
            ends = [
                run.scores.get("intervals", {}).get(metrics[row], (value, value))
                for row, value in zip(rows, values, strict=True)
            ]
            errors = [
                [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
                [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
            ]
            shift = (run.number - (len(runs) - 1) / 2) * step
            axes.errorbar(
                values, [row + shift for row in rows], xerr=errors, fmt=MARKERS[run.number], markersize=5,
                color=COLOURS[run.number], elinewidth=2, capsize=0, label=_run_label(run, labels),
            )  # fmt: skip
        axes.set_yticks(range(len(metrics)), metrics, color=INK)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=0.0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    return Chart(
        "scores",
        "Similarity to the reference, with 95 % intervals",
        "与参考答案的相似度及 95 % 置信区间",
        "The dot is the score, the line its 95 % interval; further right is better.",
        "圆点是分数，横线是 95 % 置信区间，越靠右越好。",
        draw,
        height=int(70 + len(metrics) * (18 + 10 * len(runs))),
        legend_rows=len(runs),
        full=True,
    )


def _histogram_chart(
    metric: str, chinese: str, runs: Sequence[ReportRun], values: Sequence[Sequence[float]], logarithmic: bool = False
) -> Chart | None:
    """Share of rows by value, with the medians; None where there are no values.

    Args:
        metric: the score.
        chinese: its name on the axis.
        runs: whose rows.
        values: of the rows of each run.
        logarithmic: whether the axis is.
    """
    shown = [(run, found) for run, found in zip(runs, values, strict=True) if found]
    if not shown:
        return None
    edges = _edges([value for _, found in shown for value in found], logarithmic, max(len(found) for _, found in shown))

    def draw(axes: Axes, labels: ChartLabels) -> None:
        for run, found in shown:
            colour = COLOURS[run.number]
            counts, _ = numpy.histogram(numpy.clip(found, edges[0], edges[-1]), edges)
            shares = counts / len(found)
            if len(shown) <= 3:  # more surfaces on top of each other would hide each other
                axes.stairs(shares, edges, fill=True, color=colour, alpha=0.28 if len(shown) == 1 else 0.12)
            axes.stairs(
                shares, edges, color=colour, linewidth=1.8, linestyle=LINES[run.number], baseline=None,
                label=_run_label(run, labels),
            )  # fmt: skip
            axes.axvline(float(numpy.median(found)), color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
        axes.set_ylabel(labels.both("share of rows", "行数占比"))
        axes.yaxis.set_major_formatter(_percent)
        axes.set_xlabel(labels.both(metric, chinese))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0.0)
        axes.grid(axis="y")
        if logarithmic:
            axes.set_xscale("log")
            wide = edges[-1] / edges[0]
            steps = (1.0,) if wide > 1e3 else (1.0, 2.0, 5.0) if wide > 8 else tuple(map(float, range(1, 10)))
            axes.xaxis.set_major_locator(LogLocator(subs=steps) if wide > 2 else MaxNLocator(5))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e6 else f"{x:.0e}"))
            axes.set_xlim(edges[0], edges[-1])

    return Chart(
        f"{metric}_histogram",
        f"{metric} of each row",
        chinese,
        "Share of rows by value; the dotted line is the median.",
        "各分数段的行数占比，虚线是中位数。",
        draw,
    )


def _length_chart(runs: Sequence[ReportRun], side: str, english: str, chinese: str) -> Chart | None:
    """rouge-l against the length of one side, "reference" or "prediction"; None where all lengths are equal."""
    rows = [[run.rows[number] for number in run.scored] for run in runs]
    lengths = [[row[f"{side}_characters"] for row in found] for found in rows]
    if len({length for found in lengths for length in found}) < 2:
        return None

    def draw(axes: Axes, labels: ChartLabels) -> None:
        for run, along, found in zip(runs, lengths, rows, strict=True):
            values = [row["rouge-l"] for row in found]
            every = slice(None, None, max(1, -(-len(values) * len(runs) // MAX_POINTS)))
            axes.plot(
                along[every], values[every], MARKERS[run.number], color=COLOURS[run.number], alpha=0.22,
                markersize=3.2, markeredgewidth=0,
            )  # fmt: skip
            _plot_means(axes, means_by_length(along, values), run, labels)
        axes.set_xlabel(labels.both(f"characters of the {english}", f"{chinese}字数"))
        axes.set_ylabel("rouge-l")
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_formatter(COUNTS)
        axes.grid()

    return Chart(
        f"rouge-l_by_{side}_length",
        f"rouge-l against the length of the {english}",
        f"rouge-l 与{chinese}长度的关系",
        "A faint point is a row; the line joins means of groups of rows, with 95 % intervals.",
        "浅色点是单行数据，折线是分组平均值及其 95 % 置信区间。",
        draw,
    )


def _repetition_chart(runs: Sequence[ReportRun]) -> Chart | None:
    """Repetition against the position in the text, of the predictions and of the references."""
    lengths = [run.values("prediction_characters") for run in runs]
    reference_lengths = runs[0].values("reference_characters")
    width = bin_width([length for found in [*lengths, reference_lengths] for length in found])
    note, chinese_note = "", ""
    curves = []
    for run, found in zip(runs, lengths, strict=True):
        numbers = sample(found)
        if len(numbers) < len(run.rows):
            note = f" A sample of {len(numbers):,} evenly spaced rows."
            chinese_note = f"等间隔抽取 {len(numbers):,} 行。"
        curves.append(repetition_by_position((entry["prediction"] for entry in run.texts(numbers)), width))
    if not any(len(curve.places) for curve in curves):
        return None
    numbers = [runs[0].scored[place] for place in sample(reference_lengths)]
    references = repetition_by_position((entry["reference"] for entry in runs[0].texts(numbers)), width)
    highest = max(curve.means.max() for curve in [*curves, references] if len(curve.means))

    def draw(axes: Axes, labels: ChartLabels) -> None:
        if len(references.places):
            low, high = references.means - references.errors, references.means + references.errors
            axes.fill_between(references.places, low, high, color=HUMAN, alpha=0.18, linewidth=0)
            axes.plot(
                references.places, references.means, color=HUMAN, linestyle=(0, (1.5, 1.5)), linewidth=2.2,
                marker="" if len(references.places) > 1 else "X", label=labels.both("references", "参考答案"),
            )  # fmt: skip
        for run, curve in zip(runs, curves, strict=True):
            _plot_means(axes, curve, run, labels)
        axes.set_xlabel(labels.both("characters from the start", "在文中的位置"))
        axes.set_ylabel(labels.both(f"{GRAM}-grams seen before", "重复率"))
        axes.yaxis.set_major_formatter(_percent)
        axes.xaxis.set_major_formatter(COUNTS)
        # A line along zero must be seen, and a share is at most one, whatever its interval.
        axes.set_ylim(-0.025 * highest, min(1.03, 1.25 * highest) if highest else 1.0)
        axes.set_xlim(left=0.0)
        axes.grid()

    return Chart(
        "repetition_by_position",
        "Repetition against the position in the text",
        "重复率随位置的变化",
        f"Share of the {GRAM}-grams of characters that start in each {width:,} characters that occur earlier in the "
        f"same text; the grey line is the references' share at that position.{note}",
        f"每 {width:,} 字中，前文已出现过的 {GRAM} 字片段所占比例；灰线为参考答案在相同位置的重复率。{chinese_note}",
        draw,
        height=360,
        legend_rows=len(runs) + bool(numbers),
        full=True,
    )


def _loss_chart(runs: Sequence[ReportRun]) -> Chart | None:
    """Training and evaluation loss; None where no run has any."""
    shown = [run for run in runs if any(key in entry for entry in run.losses for key in ("loss", "eval_loss"))]
    if not shown:
        return None

    def draw(axes: Axes, labels: ChartLabels) -> None:
        for run in shown:
            training = {"linewidth": 1.1, "alpha": 0.6}
            evaluation = {"linewidth": 1.9, "marker": MARKERS[run.number], "markersize": 4.5}
            for key, english, chinese, style in (
                ("loss", "train", "训练", training),
                ("eval_loss", "eval", "评估", evaluation),
            ):
                points = [(entry["step"], entry[key]) for entry in run.losses if is_number(entry.get(key))]
                if points:
                    points.sort(key=lambda point: point[0])  # an evaluation of the best weights comes last
                    label = f"{_run_label(run, labels)}: {labels.both(english, chinese)}"
                    axes.plot(*zip(*points, strict=True), color=COLOURS[run.number], label=label, **style)
        axes.set_xlabel(labels.both("step", "步数"))
        axes.set_ylabel(f"{labels.both('loss', '损失')} (nats/token)")
        axes.xaxis.set_major_formatter(COUNTS)
        axes.margins(x=0.02)
        axes.grid()

    return Chart(
        "losses",
        "Loss during training",
        "训练损失曲线",
        "Thin: training loss; with markers: evaluation loss.",
        "细线是训练损失，带标记的是评估损失。",
        draw,
        height=360,
        legend_rows=2 * len(shown),
        full=True,
    )


def _plot_means(axes: Axes, curve: Curve, run: ReportRun, labels: ChartLabels) -> None:
    axes.errorbar(
        curve.places, curve.means, yerr=numpy.nan_to_num(curve.errors), color=COLOURS[run.number],
        marker=MARKERS[run.number], markersize=4.5, linestyle=LINES[run.number], elinewidth=1.2, capsize=0,
        label=_run_label(run, labels),
    )  # fmt: skip


def _run_label(run: ReportRun, labels: ChartLabels) -> str:
    longest = 26 if labels.narrow else 30
    name = run.name if len(run.name) <= longest else "…" + run.name[1 - longest :]
    name = name if labels.font else name.replace("…", "...")
    return f"{run.letter}  {name}" if labels.can_write(name) else f"Run {run.letter}"


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.4g} %"


def _edges(values: Sequence[float], logarithmic: bool, rows: int) -> numpy.ndarray:
    """[bins + 1]; the more rows, the more bins; a logarithmic axis leaves out the outermost 0.5 % at either end."""
    bins = int(min(30, max(10, round(3 * rows ** (1 / 3)))))
    if not logarithmic:
        # Round ends; from 0 where the values come near it.
        low = min(values) if min(values) > max(values) / 2 else 0.0
        width = next((step for step in _BIN_WIDTHS if (max(values) - low) / step <= bins), 0.1)
        first, last = math.floor(low / width + 1e-9), math.floor(max(values) / width + 1e-9) + 1
        return numpy.arange(first, max(last, first + 4) + 1) * width
    low, high = (float(numpy.percentile(values, share)) for share in (0.5, 99.5))
    low, high = max(1.0, low / 1.05), min(max(high, 1.0) * 1.05, 1e30)
    return numpy.geomspace(low, max(high, low * 1.2), bins + 1)
