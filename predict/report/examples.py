"""The rows that a report shows in full: the best, the worst, where runs differ, where a text repeats itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from predict.report.marks import Piece, loops, overlaps, repeats, split_at_marks
from predict.report.metrics import is_number, written
from predict.report.runs import Run

EXAMPLES = 3
MOST_CHARACTERS = 5_000
PROMPT_CHARACTERS = 1_500
REPEATING = 0.1
"""From which rep8_char a text may be shown as one that repeats itself."""

_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Text:
    """One text of an example. pieces: marked; left_out: characters not shown; facts: about it, in words."""

    run: int | None
    pieces: list[Piece]
    left_out: int
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """A row: its id, its prompt (its end, and how many characters stand before), its texts."""

    id: str
    prompt: str
    prompt_left_out: int
    texts: list[Text]


@dataclass(frozen=True)
class Group:
    """Examples of one kind, with a heading in two languages; of one run, or of all of them (None)."""

    english: str
    chinese: str
    run: int | None
    examples: list[Example]


def choose_examples(runs: Sequence[Run], matches: Sequence[Sequence[int] | None]) -> list[Group]:
    """Groups of examples: of the runs that answer the rows of the first side by side, of any other by itself.

    Args:
        runs: all.
        matches: for each run, the number of each row of the first run in it; None if it answers other rows.
    """
    together = {number: match for number, match in enumerate(matches) if match is not None}
    groups = _groups(runs, together, None)
    for number, run in enumerate(runs):
        if number not in together:
            groups += _groups(runs, {number: range(len(run.rows))}, number)
    return groups


def visible(text: str) -> str:
    """A text as a page can hold it: controls, halves of characters, and marks that turn lines around as their codes."""
    return "".join(
        f"\\u{{{ord(character):x}}}"
        if character in _TURNING or unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        else character
        for character in text
    )


def _groups(runs: Sequence[Run], together: dict[int, Sequence[int]], named: int | None) -> list[Group]:
    """Groups of the rows that these runs share. together: run -> its number of each row."""
    count = len(next(iter(together.values())))

    def values(name: str, row: int) -> list[float]:
        found = [runs[run].rows[numbers[row]].get(name) for run, numbers in together.items()]
        return [float(value) for value in found if is_number(value)]

    scored = [row for row in range(count) if len(values("rouge-l", row)) == len(together)]
    # Empty answers are counted elsewhere; there is nothing to see in them.
    scored = [row for row in scored if min(values("prediction_characters", row)) > 0] or scored
    by_score = sorted(scored, key=lambda row: (-sum(values("rouge-l", row)), row))
    taken: set[int] = set()
    groups: list[Group] = []

    def take(english: str, chinese: str, rows: Iterable[int]) -> None:
        chosen = [row for row in rows if row not in taken][:EXAMPLES]
        taken.update(chosen)
        if chosen:
            places = [{run: numbers[row] for run, numbers in together.items()} for row in chosen]
            groups.append(Group(english, chinese, named, [_example(runs, place) for place in places]))

    def spread(row: int) -> float:
        found = values("rouge-l", row)
        return max(found) - min(found)

    half = (len(by_score) + 1) // 2
    take("Highest rouge-l", "得分最高", by_score[:half])
    take("Lowest rouge-l", "得分最低", by_score[half:][::-1])
    if len(together) > 1:
        take("The runs differ most", "各运行差别最大", _largest(scored, spread, 0.01))
    take("Most repetition", "重复最多", _largest(range(count), lambda row: max(values("rep8_char", row)), REPEATING))
    if not scored:
        take("First rows", "前几条", range(count))
    return groups


def _largest(rows: Iterable[int], value: Callable[[int], float], least: float) -> list[int]:
    valued = [(-value(row), row) for row in rows]
    return [row for negative, row in sorted(valued) if -negative >= least]


def _example(runs: Sequence[Run], places: dict[int, int]) -> Example:
    """The texts of one row. places: run -> number of the row in it."""
    entries = {run: next(runs[run].texts([number])) for run, number in places.items()}
    entry = next(iter(entries.values()))
    reference = entry.get("reference", "")
    predictions = {run: one["prediction"] for run, one in entries.items()}
    texts = []
    if reference:
        shown = reference[:MOST_CHARACTERS]
        found = overlaps(shown, predictions.values())
        facts = [("characters 字", f"{len(reference):,}")]
        pieces = split_at_marks(shown, {"overlap": found})
        texts.append(Text(None, _visible(pieces), len(reference) - len(shown), facts))
    for run, prediction in predictions.items():
        shown = prediction[:MOST_CHARACTERS]
        marks = {
            "overlap": overlaps(shown, [reference]) if reference else [],
            "repeat": repeats(shown),
            "loop": loops(shown),
        }
        facts = _facts(entries[run], runs[run].rows[places[run]])
        texts.append(Text(run, _visible(split_at_marks(shown, marks)), len(prediction) - len(shown), facts))
    prompt = entry.get("prompt") or ""
    prompt = prompt if isinstance(prompt, str) else str(prompt)
    end = prompt[-PROMPT_CHARACTERS:]
    return Example(visible(str(entry.get("id", ""))), visible(end), len(prompt) - len(end), texts)


def _visible(pieces: list[Piece]) -> list[Piece]:
    return [Piece(visible(piece.text), piece.marks) for piece in pieces]


def _facts(entry: dict[str, Any], row: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of one answer, as (name, value)."""
    reason = entry.get("finish_reason")
    ends = {"stop": "by itself 自行结束", "length": "cut off 截断"}
    facts = [("ended", ends.get(str(reason), visible(str(reason))))] if reason is not None else []
    facts.append(("characters 字", f"{len(entry['prediction']):,}"))
    if is_number(entry.get("completion_tokens")):
        facts.append(("tokens 词元", f"{entry['completion_tokens']:,}"))
    for name in ("rouge-l", "rep8_char"):
        if is_number(row.get(name)):
            facts.append((name, written(row[name], 4)))
    if row.get("looped"):
        facts.append(("loops from 循环起点", f"{row['first_loop_char']:,}"))
    return facts
