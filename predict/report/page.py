"""report.html: scores, pictures and examples of runs, as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from novelgpt.scoring.summary import Comparison, definitions
from novelgpt.settings.charts import Picture
from novelgpt.settings.html_pages import content_hash, page_templates, visible
from predict.report.examples import ExampleGroup
from predict.report.marks import SHORTEST_OVERLAP, SHORTEST_REPEAT
from predict.report.metrics import GROUPS, Metric, format_number, goodness, is_number, metrics_of, reference_value
from predict.report.runs import ReportRun

TEMPLATE = Path(__file__).with_name("template")
SIGNIFICANT = 0.05
"""p-values below it are called a difference."""
MAX_ROW_GROUPS = 12

_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


def make_page(
    runs: Sequence[ReportRun],
    comparisons: Mapping[int, Sequence[Comparison] | None],
    pictures: Mapping[str, Sequence[Picture]],
    groups: Sequence[ExampleGroup],
    labels_are_english: bool,
) -> str:
    """The page; the same arguments give the same text.

    Args:
        runs: in page order.
        comparisons: number of a run -> its comparison with the first, or None if it answers other rows.
        pictures: name of a section -> its pictures.
        groups: of examples.
        labels_are_english: the pictures have no Chinese labels, for lack of a font.
    """
    style = (TEMPLATE / "page.css").read_text(encoding="utf-8")
    metrics = metrics_of([run.scores for run in runs])
    texts = {name: _definition(runs, name) for name in metrics}
    tables = [
        {
            "name": visible(name),
            "rows": max(one.get("rows", 0) for one in scores),
            "score_groups": _score_table(scores, metrics),
        }
        for name, scores in _row_groups(runs)
    ]
    return page_templates(TEMPLATE).get_template("page.html").render(
        style=style,
        style_hash=content_hash(style),
        runs=runs,
        facts=[_facts(run.scores) for run in runs],
        score_groups=_score_table([run.scores for run in runs], metrics),
        row_groups=tables,
        has_references=any(reference_value(name, run.scores) is not None for name in metrics for run in runs),
        without_references=[run.name for run in runs if not run.scored],
        without_model=[run.name for run in runs if not is_number(run.scores.get("perplexity"))],
        without_losses=[run.name for run in runs if not run.losses],
        comparisons=[
            {"number": number, "comparable": found is not None, **_comparison_table(runs[0], found or [], metrics)}
            for number, found in comparisons.items()
        ],
        pictures=pictures,
        groups=groups,
        metrics=metrics.values(),
        definitions=texts,
        labels_are_english=labels_are_english,
        limits={"overlap": SHORTEST_OVERLAP, "repeat": SHORTEST_REPEAT, "significant": SIGNIFICANT},
    )  # fmt: skip


def _definition(runs: Sequence[ReportRun], name: str) -> str:
    found = [run.scores.get("definitions", {}).get(name) for run in runs]
    return next((visible(text) for text in found if isinstance(text, str)), definitions().get(name, ""))


def _facts(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(English, Chinese, value) of what is known about a run."""
    facts = [("Model", "模型", visible(str(scores["model"])))] if "model" in scores else []
    for name, english, chinese, digits in (
        ("rows", "Rows", "行数", 0),
        ("rows_without_reference", "Without a reference", "无参考答案", 0),
        ("empty_predictions", "Empty answers", "空回答", 0),
        ("seconds", "Seconds", "用时（秒）", 1),
        ("tokens_per_second", "Tokens per second", "每秒 token 数", 1),
    ):
        if is_number(scores.get(name)):
            facts.append((english, chinese, format_number(scores[name], digits)))
    settings = scores.get("generation") or {}
    chosen = [f"{name} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
    if chosen:
        facts.append(("Generation", "生成设置", visible(" · ".join(chosen))))
    return facts


def _row_groups(runs: Sequence[ReportRun]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name of each `score_group` and its scores in each run, {} where a run lacks it."""
    found = [run.scores.get("groups", {}) for run in runs]
    names = list(dict.fromkeys(name for groups in found for name in groups))
    return [(name, [groups.get(name, {}) for groups in found]) for name in names[:MAX_ROW_GROUPS]]


def _score_table(scores: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """The rows of a table of scores, by heading. scores: of each run, those of all rows or of a group of rows."""
    groups = []
    for group, (english, chinese) in GROUPS.items():
        rows = [
            _score_row(scores, metric)
            for metric in metrics.values()
            if metric.group == group and any(is_number(one.get(metric.name)) for one in scores)
        ]
        if rows:
            groups.append({"name": group, "english": english, "chinese": chinese, "rows": rows})
    return groups


def _score_row(scores: Sequence[Mapping[str, Any]], metric: Metric) -> dict[str, Any]:
    references = [reference_value(metric.name, one) for one in scores]
    good = [
        goodness(metric, one[metric.name], reference) if is_number(one.get(metric.name)) else None
        for one, reference in zip(scores, references, strict=True)
    ]
    known = [value for value in good if value is not None]
    # No star for a single run, or where all runs are equal.
    best = max(known) if len(known) > 1 and min(known) < max(known) else None
    cells: list[dict[str, Any] | None] = []
    for one, value in zip(scores, good, strict=True):
        if is_number(one.get(metric.name)):
            low, high = one.get("intervals", {}).get(metric.name, (math.nan, math.nan))
            known_ends = math.isfinite(low) and math.isfinite(high)
            ends = [format_number(end, metric.digits) for end in (low, high)] if known_ends else []
            cells.append(
                {
                    "raw": repr(one[metric.name]),
                    "text": format_number(one[metric.name], metric.digits),
                    "interval": " – ".join(ends),
                    "best": best is not None and value == best,
                }
            )
        else:
            cells.append(None)
    shown = dict.fromkeys(format_number(value, metric.digits) for value in references if value is not None)
    return {"metric": metric, "cells": cells, "reference": " / ".join(shown)}


def _comparison_table(first: ReportRun, found: Sequence[Comparison], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The rows of a comparison with the first run, and how many scores are better and worse."""
    by_name = {one.name: one for one in found if math.isfinite(one.first) and math.isfinite(one.second)}
    rows = []
    for metric in metrics.values():
        if metric.name not in by_name:
            continue
        one = by_name[metric.name]
        reference = reference_value(one.name, first.scores)
        before, after = (goodness(metric, value, reference) for value in (one.first, one.second))
        verdict = "same"
        if one.p_value < SIGNIFICANT:
            verdict = "differs" if before is None or after is None else "better" if after > before else "worse"
        known_ends = math.isfinite(one.low) and math.isfinite(one.high)
        ends = [_format_difference(end, metric.digits) for end in (one.low, one.high)] if known_ends else []
        rows.append(
            {
                "metric": metric,
                "first": format_number(one.first, metric.digits),
                "second": format_number(one.second, metric.digits),
                "difference": _format_difference(one.second - one.first, metric.digits),
                "interval": " to ".join(ends),
                "p": "<\N{NO-BREAK SPACE}0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}",
                "verdict": verdict,
            }
        )
    return {"rows": rows, **{word: sum(row["verdict"] == word for row in rows) for word in ("better", "worse")}}


def _format_difference(value: float, digits: int) -> str:
    """A difference with its sign, unless it is shown as 0."""
    text = format_number(value, digits)
    return text if text[0] == "\N{MINUS SIGN}" or not text.strip("0.,") else "+" + text
