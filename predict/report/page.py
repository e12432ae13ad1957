"""report.html: the scores of runs, their pictures and examples, as one page that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from novelgpt.scoring.summary import Comparison, definitions
from novelgpt.settings.html_pages import content_hash, page_templates
from predict.report.examples import Group, visible
from predict.report.figures import Picture
from predict.report.marks import SHORTEST_OVERLAP, SHORTEST_REPEAT
from predict.report.metrics import (
    GROUPS,
    Metric,
    goodness,
    is_number,
    metric_named,
    metrics_of,
    reference_value,
    written,
)
from predict.report.runs import Run

TEMPLATE = Path(__file__).with_name("template")
CERTAIN = 0.05
"""p-values below it are called a difference."""
MOST_ROW_GROUPS = 12

_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


def make_page(
    runs: Sequence[Run],
    comparisons: Sequence[tuple[int, list[Comparison] | None]],
    pictures: Sequence[tuple[str, list[Picture]]],
    groups: Sequence[Group],
    labels_are_english: bool,
) -> str:
    """The page; the same arguments give the same text.

    Args:
        runs: in the order of the page.
        comparisons: (number of a run, its comparison with the first, or None if it answers other rows).
        pictures: (name of a section, its pictures).
        groups: of examples.
        labels_are_english: the pictures have no Chinese labels, for want of a font.
    """
    style = (TEMPLATE / "page.css").read_text(encoding="utf-8")
    environment = page_templates(TEMPLATE)
    metrics = metrics_of([run.scores for run in runs])
    return environment.get_template("page.html").render(
        style=style,
        style_hash=content_hash(style),
        runs=[_describe_run(number, run) for number, run in enumerate(runs)],
        score_groups=_score_groups([run.scores for run in runs], metrics, runs),
        row_groups=_row_groups(runs, metrics),
        has_references=any(reference_value(metric.name, run.scores) is not None for metric in metrics for run in runs),
        without_references=[visible(run.name) for run in runs if not run.scored],
        without_model=[visible(run.name) for run in runs if not is_number(run.scores.get("perplexity"))],
        without_losses=[visible(run.name) for run in runs if not run.losses],
        comparisons=[_describe_comparison(runs, number, found) for number, found in comparisons],
        pictures=dict(pictures),
        groups=groups,
        definitions=_definitions(runs, metrics),
        labels_are_english=labels_are_english,
        limits={"overlap": SHORTEST_OVERLAP, "repeat": SHORTEST_REPEAT, "certain": CERTAIN},
    )


def interval(low: float, high: float, digits: int, signs: bool = False) -> str:
    """Both ends, or "" where they are not known."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    ends = [signed(end, digits) if signs else written(end, digits) for end in (low, high)]
    return f"{ends[0]} – {ends[1]}" if not signs else f"{ends[0]} to {ends[1]}"


def signed(value: float, digits: int) -> str:
    """A difference, with its sign unless it is written as 0."""
    text = written(value, digits)
    return text if text[0] == "\N{MINUS SIGN}" or not text.strip("0.,") else "+" + text


def _describe_run(number: int, run: Run) -> dict[str, Any]:
    scores = run.scores
    settings = scores.get("generation")
    settings = settings if isinstance(settings, dict) else {}
    facts = [("Model", "模型", visible(str(scores["model"])))] if "model" in scores else []
    for name, english, chinese, digits in (
        ("rows", "Rows", "行数", 0),
        ("rows_without_reference", "Without a reference", "无参考答案", 0),
        ("empty_predictions", "Empty answers", "空回答", 0),
        ("seconds", "Seconds", "用时（秒）", 1),
        ("tokens_per_second", "Tokens a second", "每秒词元数", 1),
    ):
        if is_number(scores.get(name)):
            facts.append((english, chinese, written(scores[name], digits)))
    chosen = [f"{name} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
    if chosen:
        facts.append(("Generation", "生成设置", visible(" · ".join(chosen))))
    return {"letter": chr(ord("A") + number), "number": number, "name": visible(run.name), "facts": facts}


def _row_groups(runs: Sequence[Run], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Tables of the groups that rows say they belong to, each as the one of all rows."""
    found = [run.scores["groups"] if isinstance(run.scores.get("groups"), dict) else {} for run in runs]
    names = list(dict.fromkeys(name for groups in found for name in groups))
    tables = []
    for name in names[:MOST_ROW_GROUPS]:
        scores = [groups.get(name, {}) for groups in found]
        rows = max(one.get("rows", 0) for one in scores)
        tables.append({"name": visible(name), "rows": rows, "score_groups": _score_groups(scores, metrics, runs)})
    return tables


def _score_groups(
    scores: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], runs: Sequence[Run]
) -> list[dict[str, Any]]:
    """The rows of a table of scores, by heading. scores: of each run, those of all rows or of a group of them."""
    groups = []
    for group, (english, chinese) in GROUPS.items():
        present = [
            metric
            for metric in metrics
            if metric.group == group and any(is_number(one.get(metric.name)) for one in scores)
        ]
        rows = [{**_score_row(scores, metric), "definition": _definition(runs, metric.name)} for metric in present]
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
    # One run is no contest, nor are runs that are all alike.
    best = max(known) if len(known) > 1 and min(known) < max(known) else None
    cells: list[dict[str, Any] | None] = []
    for one, value in zip(scores, good, strict=True):
        if not is_number(one.get(metric.name)):
            cells.append(None)
            continue
        low, high = one.get("intervals", {}).get(metric.name, (math.nan, math.nan))
        cells.append(
            {
                "raw": repr(one[metric.name]),
                "text": written(one[metric.name], metric.digits),
                "interval": interval(low, high, metric.digits),
                "best": best is not None and value == best,
            }
        )
    told = dict.fromkeys(written(value, metric.digits) for value in references if value is not None)
    return {
        "metric": metric,
        "cells": cells,
        "reference": " / ".join(told),
    }


def _describe_comparison(runs: Sequence[Run], number: int, found: Sequence[Comparison] | None) -> dict[str, Any]:
    rows = []
    order = {metric.name: place for place, metric in enumerate(metrics_of([run.scores for run in runs]))}
    shown = [one for one in found or () if one.name in order and math.isfinite(one.first) and math.isfinite(one.second)]
    for one in sorted(shown, key=lambda one: order[one.name]):
        metric = metric_named(one.name)
        reference = reference_value(one.name, runs[0].scores)
        before, after = (goodness(metric, value, reference) for value in (one.first, one.second))
        verdict = "same"
        if one.p_value < CERTAIN:
            verdict = "differs" if before is None or after is None else "better" if after > before else "worse"
        rows.append(
            {
                "metric": metric,
                "definition": _definition(runs, one.name),
                "first": written(one.first, metric.digits),
                "second": written(one.second, metric.digits),
                "difference": signed(one.second - one.first, metric.digits),
                "interval": interval(one.low, one.high, metric.digits, signs=True),
                "p": "<\N{NO-BREAK SPACE}0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}",
                "verdict": verdict,
            }
        )
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("better", "worse")}
    return {"number": number, "comparable": found is not None, "rows": rows, "counts": counts}


def _definitions(runs: Sequence[Run], metrics: Sequence[Metric]) -> list[tuple[Metric, str]]:
    return [(metric, _definition(runs, metric.name)) for metric in metrics]


def _definition(runs: Sequence[Run], name: str) -> str:
    for run in runs:
        text = run.scores.get("definitions", {}).get(name)
        if isinstance(text, str):
            return visible(text)
    return definitions().get(name, "")
