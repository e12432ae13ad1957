"""The rows that a report shows in full: the best, the worst, where runs differ, where a text repeats itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from novelgpt.settings.html_pages import visible
from predict.report.marks import MarkedText, MarkSpan, loops, overlaps, repeats, split_at_marks
from predict.report.metrics import format_number, is_number
from predict.report.runs import ReportRun

EXAMPLES = 3
MAX_CHARACTERS = 5_000
PROMPT_CHARACTERS = 1_500
REPEATING = 0.1
"""rep8_char from which a text may be shown as one that repeats itself."""


@dataclass(frozen=True)
class ExampleText:
    """One text of an example.

    Attributes:
        run: number of the run that wrote it; None for the reference.
        segments: the text with its marks, cut at `MAX_CHARACTERS`.
        left_out: characters not shown.
        facts: (name, value) pairs about it.
    """

    run: int | None
    segments: list[MarkedText]
    left_out: int
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """A row: its id, the end of its prompt, how many characters of the prompt precede that, and its texts."""

    id: str
    prompt: str
    prompt_left_out: int
    texts: list[ExampleText]


@dataclass(frozen=True)
class ExampleGroup:
    """Examples of one kind, with a heading in two languages; of one run, or of all (None)."""

    english: str
    chinese: str
    run: int | None
    examples: list[Example]


def choose_examples(runs: Sequence[ReportRun], matches: Sequence[Sequence[int] | None]) -> list[ExampleGroup]:
    """Groups of examples: runs that answer the rows of the first side by side, any other on its own.

    Args:
        runs: all.
        matches: for each run, the number of each row of the first run in it; None if it answers other rows.
    """
    together = {number: match for number, match in enumerate(matches) if match is not None}
    groups = _groups(runs, together, None)
    for run in runs:
        if run.number not in together:
            groups += _groups(runs, {run.number: range(len(run.rows))}, run.number)
    return groups


def _groups(runs: Sequence[ReportRun], together: dict[int, Sequence[int]], named: int | None) -> list[ExampleGroup]:
    """Groups of the rows that these runs share. together: number of a run -> its number of each row."""
    count = len(next(iter(together.values())))

    def values(name: str, row: int) -> list[float]:
        found = [runs[run].rows[numbers[row]].get(name) for run, numbers in together.items()]
        return [float(value) for value in found if is_number(value)]

    scored = [row for row in range(count) if len(values("rouge-l", row)) == len(together)]
    # Empty answers are counted elsewhere; there is nothing to see in them.
    scored = [row for row in scored if min(values("prediction_characters", row)) > 0] or scored
    by_score = sorted(scored, key=lambda row: (-sum(values("rouge-l", row)), row))

    def by_value(rows: Iterable[int], value: Callable[[int], float], least: float) -> list[int]:
        return [row for row in sorted(rows, key=lambda row: (-value(row), row)) if value(row) >= least]

    best = (len(by_score) + 1) // 2
    candidates = [
        ("Highest rouge-l", "得分最高", by_score[:best]),
        ("Lowest rouge-l", "得分最低", by_score[best:][::-1]),
    ]
    if len(together) > 1:
        spread = by_value(scored, lambda row: max(values("rouge-l", row)) - min(values("rouge-l", row)), 0.01)
        candidates.append(("The runs differ most", "各次运行差别最大", spread))
    repeating = by_value(range(count), lambda row: max(values("rep8_char", row)), REPEATING)
    candidates.append(("Most repetition", "重复最多", repeating))
    if not scored:
        candidates.append(("First rows", "前几条", list(range(count))))
    taken: set[int] = set()
    groups = []
    for english, chinese, rows in candidates:
        chosen = [row for row in rows if row not in taken][:EXAMPLES]
        taken.update(chosen)
        if chosen:
            examples = [_example(runs, {run: numbers[row] for run, numbers in together.items()}) for row in chosen]
            groups.append(ExampleGroup(english, chinese, named, examples))
    return groups


def _example(runs: Sequence[ReportRun], places: dict[int, int]) -> Example:
    """The texts of one row. places: number of a run -> number of the row in it."""
    entries = {run: next(runs[run].texts([number])) for run, number in places.items()}
    entry = next(iter(entries.values()))
    reference = entry.get("reference", "")
    texts = []
    if reference:
        marks = {"overlap": overlaps(reference[:MAX_CHARACTERS], [one["prediction"] for one in entries.values()])}
        texts.append(_text(None, reference, marks, [("characters 字数", f"{len(reference):,}")]))
    for run, one in entries.items():
        shown = one["prediction"][:MAX_CHARACTERS]
        marks = {
            "overlap": overlaps(shown, [reference]) if reference else [],
            "repeat": repeats(shown),
            "loop": loops(shown),
        }
        texts.append(_text(run, one["prediction"], marks, _facts(one, runs[run].rows[places[run]])))
    prompt = str(entry.get("prompt") or "")
    end = prompt[-PROMPT_CHARACTERS:]
    return Example(visible(str(entry.get("id", ""))), visible(end), len(prompt) - len(end), texts)


def _text(run: int | None, text: str, marks: dict[str, list[MarkSpan]], facts: list[tuple[str, str]]) -> ExampleText:
    shown = text[:MAX_CHARACTERS]
    segments = [MarkedText(visible(one.text), one.marks) for one in split_at_marks(shown, marks)]
    return ExampleText(run, segments, len(text) - len(shown), facts)


def _facts(entry: dict[str, Any], row: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known about an answer, as (name, value)."""
    reason = entry.get("finish_reason")
    ends = {"stop": "by itself 自然结束", "length": "cut off 截断"}
    facts = [("ended", ends.get(str(reason), visible(str(reason))))] if reason is not None else []
    facts.append(("characters 字数", f"{len(entry['prediction']):,}"))
    if is_number(entry.get("completion_tokens")):
        facts.append(("tokens", f"{entry['completion_tokens']:,}"))
    for name in ("rouge-l", "rep8_char"):
        if is_number(row.get(name)):
            facts.append((name, format_number(row[name], 4)))
    if row.get("looped"):
        facts.append(("loops from 循环起点", f"{row['first_loop_char']:,}"))
    return facts
