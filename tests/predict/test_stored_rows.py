"""Rows on disk are the rows that were given, and rows without an id get the names they would get in memory."""

import json
import random
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dataset.sources import find_row_sources
from novelgpt.settings.errors import UserError
from predict.predictions import PredictionFile
from predict.rows import read_prompt_rows
from predict.stored_rows import IdIndex, StoredRows

TEXTS = ["", "雨", "a\nb\r\n\u2028", "\ud800 half", "🙂" * 3000, '"\\"']


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Files of this process take so many bytes, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_values_are_read_as_they_were_in_any_order_and_leave_no_file(tmp_path: Path) -> None:
    values = [[number, TEXTS[number % len(TEXTS)], {"n": None}] for number in range(100)]
    rows = StoredRows(tmp_path / "yet" / "to be made")
    for value in values:
        rows.append(value)
    rows.finish()
    assert len(rows) == 100 and [rows[number] for number in range(99, -1, -1)] == values[::-1]
    # Others may read elsewhere in the middle of it.
    assert [(value, rows[99 - value[0]]) for value in rows] == list(zip(values, values[::-1], strict=True))
    assert list(tmp_path.iterdir()) == []


def test_an_index_finds_every_row_of_an_id_and_no_other() -> None:
    draw = random.Random(5)
    ids = [draw.choice([None, str(draw.randrange(300)), "\ud800"]) for _ in range(1000)]
    index = IdIndex(ids, ids.__getitem__)
    for name in (*filter(None, set(ids)), "", "300"):
        assert index.numbers(name) == [number for number, one in enumerate(ids) if one == name]
    named = [one or "" for one in ids]
    assert IdIndex(named, named.__getitem__).distinct() == len(set(named))
    # Where hashes are equal, ids decide.
    assert IdIndex(["a"] * 3, ["a", "b", "a"].__getitem__).numbers("a") == [0, 2]
    assert IdIndex(["a"] * 3, ["a", "b", "a"].__getitem__).distinct() == 2


def named(given: list[tuple[str | None, str]]) -> list[str]:
    """Of rows (own id, made id), the ids as one would give them with all of them in memory."""
    taken = {name for name, _ in given if name}
    expected = []
    for name, made in given:
        if name is None:
            names = [made, *(f"{made}~{number}" for number in range(2, 9))]
            name = next(one for one in names if one not in taken)
            taken.add(name)
        expected.append(name)
    return expected


def test_questions_without_an_id_are_told_apart(tmp_path: Path) -> None:
    """Made of file and row; where a row has that name, or an earlier one was given it, with the next free number."""
    draw = random.Random(6)
    files, given = [], []
    for folder in "abc":
        rows = [{"prompt": "问", "completion": "答"} for _ in range(40)]
        for row in rows:
            if draw.random() < 0.5:
                row["id"] = f"rows-{draw.randrange(40)}" + draw.choice(["", "~2", "~3", "~4"])
        files.append(str(write(tmp_path / folder / "rows.jsonl", rows)))
        given += [(row.get("id"), f"rows-{number}") for number, row in enumerate(rows)]
    expected = named(given)
    found = [row.id for row in read_prompt_rows(find_row_sources(files), None, None, near=tmp_path)]
    assert found == expected and Counter(name.count("~") for name in found)[1] > 20
    assert [row.id for row in read_prompt_rows(find_row_sources(files[:2]), None, 50)] == named(given[:50])


def test_predictions_without_an_id_are_told_apart(tmp_path: Path) -> None:
    draw = random.Random(7)
    ids = [draw.choice([None, str(draw.randrange(200)), f"{draw.randrange(200)}~"]) for _ in range(200)]
    rows = [{"id": name, "prediction": "甲", "reference": "乙"} for name in ids]
    expected = []
    for number, name in enumerate(ids):
        if name is None:
            name = str(number)
            while name in ids:
                name += "~"
        expected.append(name)
    predictions = PredictionFile(write(tmp_path / "p.jsonl", rows), tmp_path)
    assert [one.id for one in predictions] == list(predictions.ids()) == expected
    assert [predictions[number].id for number in range(200)] == expected
    assert all(number in predictions.index().numbers(name) for number, name in enumerate(expected))
    assert {name.count("~") for name in expected} == {0, 1, 2}


def test_what_a_disk_cannot_take_is_told(tmp_path: Path) -> None:
    rows = StoredRows(tmp_path)
    with pytest.raises(UserError, match="a temporary copy of the rows cannot be written into"), full_after(1 << 20):
        for _ in range(40):
            rows.append("雨" * 100_000)
        rows.finish()
