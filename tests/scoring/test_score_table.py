"""Columns of scores on disk are those of the rows in memory, in whatever order rows bring up their scores."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest

from novelgpt.scoring.row_scores import RowScores
from novelgpt.scoring.score_table import BLOCK_ROWS, ScoreColumns, ScoreTable, table_of
from novelgpt.scoring.summary import ROWS_SUMMED_AT_ONCE, compare_rows, summarise_columns, summarise_rows


def made_rows(count: int) -> list[RowScores]:
    """Rows that lack some scores; one score is new in the second block, and one in the third."""
    draw = random.Random(3)
    rows: list[RowScores] = []
    for number in range(count):
        row: RowScores = {"id": str(number), "length": draw.randrange(50)}
        row |= {"loop": draw.random()} if draw.random() < 0.2 else {}
        if draw.random() < 0.7:
            row = {"rouge": draw.random(), **row, "reference_characters": draw.randrange(99)}
            row["sacrebleu_statistics"] = [draw.randrange(9) for _ in range(10)]
            row |= {"reference_nats": draw.random(), "loss": 0.5} if draw.random() < 0.5 else {}
        row |= {"stopped": 1.0} if number > BLOCK_ROWS + 7 else {}
        row |= {"match": draw.random()} if number > 2 * BLOCK_ROWS and number % 3 else {}
        rows.append(row)
    return rows


def columns_in_memory(rows: list[RowScores]) -> dict[str, list[float]]:
    names = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, (int, float)) and name != "loss"
    )
    columns: dict[str, list[float]] = {}
    for name in names:
        columns |= {
            name: [row.get(name, 0.0) for row in rows],
            f"rows_with_{name}": [float(name in row) for row in rows],
        }
    if "reference_nats" in names:
        characters = [row.get("reference_characters", 0) * float("reference_nats" in row) for row in rows]
        columns["modelled_reference_characters"] = characters
    counts = [row.get("sacrebleu_statistics", [0] * 10) for row in rows]
    if any(map(any, counts)):
        columns |= {f"sacrebleu_statistics_{place}": [row[place] for row in counts] for place in range(10)}
    return columns


def same(found: ScoreColumns, rows: list[RowScores]) -> bool:
    expected = columns_in_memory(rows)
    return list(found.places) == list(expected) and all(
        found.values[found.places[name]].tolist() == values for name, values in expected.items()
    )


def test_columns_are_those_of_the_rows_and_leave_no_file(tmp_path: Path) -> None:
    rows = made_rows(2 * BLOCK_ROWS + 900)
    table = ScoreTable(tmp_path)
    for row in rows:
        table.append(row)
    assert same(table.columns(), rows)
    draw = numpy.random.default_rng(4)
    for share in (0.5, 0.001):  # of rows of a group, in whatever blocks they are
        chosen = numpy.flatnonzero(draw.random(len(rows)) < share)
        assert same(table.columns(chosen), [rows[number] for number in chosen])
    bare = numpy.array([number for number, row in enumerate(rows) if "rouge" not in row])
    assert same(table.columns(bare), [rows[number] for number in bare])
    for row in rows[:BLOCK_ROWS]:  # and more can be appended
        table.append(row)
    assert same(table.columns(), rows + rows[:BLOCK_ROWS])
    assert list(tmp_path.iterdir()) == []


def sums_by_definition(values: numpy.ndarray) -> tuple[float, numpy.ndarray]:
    """The sum, row by row, and those of 2,000 samples with the seed 42."""
    total = 0.0
    for value in values.tolist():
        total += value
    generator = numpy.random.default_rng(42)
    counts = (
        numpy.bincount(generator.integers(0, len(values), len(values)), minlength=len(values)) for _ in range(2000)
    )
    columns = numpy.array([values, numpy.ones(len(values))]).T  # of the score, and which rows have it
    return total, numpy.array([one @ columns for one in counts])[:, 0]


@pytest.mark.parametrize("count", [3, BLOCK_ROWS + 1, ROWS_SUMMED_AT_ONCE + 5])
def test_means_and_intervals_are_those_of_the_definition(count: int) -> None:
    values = numpy.random.default_rng(count).random(count)
    means, intervals = summarise_rows({"score": value} for value in values.tolist())
    total, sums = sums_by_definition(values)
    assert means == {"score": total / count}
    expected = numpy.percentile(sums / count, [2.5, 97.5])
    # Only where rows are many, sums round differently.
    assert intervals["score"] == pytest.approx(
        expected.tolist(), rel=1e-14 if count > ROWS_SUMMED_AT_ONCE else 0, abs=0
    )


@pytest.mark.long
def test_comparisons_of_many_rows_are_those_of_the_definition() -> None:
    count = ROWS_SUMMED_AT_ONCE + 3
    draw = numpy.random.default_rng(8)
    first = draw.integers(0, 9, count).astype(float)  # whose sums are exact in any order
    second = first + draw.integers(-1, 2, count)
    sides = [[{"score": value} for value in side.tolist()] for side in (first, second)]
    (found,) = compare_rows(*sides)
    generator = numpy.random.default_rng(42)
    counts = [numpy.bincount(generator.integers(0, count, count), minlength=count) for _ in range(2000)]
    differences = numpy.array([one @ second / count - one @ first / count for one in counts])
    moved = numpy.array([generator.integers(0, 2, count) @ (second - first) for _ in range(5000)])
    chance = (second.sum() - moved) / count - (first.sum() + moved) / count
    as_large = numpy.count_nonzero(numpy.abs(chance) >= abs(second.mean() - first.mean()) * (1 - 1e-9))
    assert (found.first, found.second) == (first.mean(), second.mean())
    assert [found.low, found.high] == numpy.percentile(differences, [2.5, 97.5]).tolist()
    assert found.p_value == (1 + as_large) / 5001


def test_no_rows_have_no_columns() -> None:
    empty: list[dict[str, Any]] = []
    assert table_of(empty).columns().rows == 0
    with pytest.raises(ValueError, match="no rows"):
        summarise_columns(table_of(empty).columns())
