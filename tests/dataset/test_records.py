"""Rows in wrapped and spread JSON are all read; a CSV line that could be read in two ways is an error."""

import csv
import datetime
import decimal
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dataset.conversation_rows.sources import read_table
from dataset.readers import read_conversation_rows
from dataset.records import load_record, read_raw_rows, read_records
from novelgpt.settings.errors import UserError

ROWS = [
    {"instruction": "写诗", "input": "", "output": "好诗"},
    {"instruction": "续写", "input": "春", "output": "天\n来了"},
]
# Ways to write ROWS down, or the first of them.
WRITTEN: dict[str, tuple[int, str]] = {
    "spread, under a name": (2, json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "one line, under a name": (2, json.dumps({"data": ROWS})),
    "under another name, other values beside": (
        2, json.dumps({"info": {"by": "我"}, "note": None, "tags": ["诗"], "examples": ROWS}, indent=2),
    ),
    "one row, spread": (1, json.dumps(ROWS[0], indent=1)),
    "one row": (1, json.dumps(ROWS[0])),
    "rows, spread, one after the other": (2, "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "rows, spread, blank lines between": (2, "\n\n".join(json.dumps(row, indent=1) for row in ROWS) + "\n\n"),
    "a list, spread": (2, json.dumps(ROWS, indent=1)),
    "a list on one line": (2, json.dumps(ROWS)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", WRITTEN)
def test_json_is_read_however_it_is_spread_and_wrapped(name: str, suffix: str, tmp_path: Path) -> None:
    count, text = WRITTEN[name]
    path = tmp_path / f"rows{suffix}"
    for before, line_end in (("", "\n"), ("\n\n", "\n"), ("", "\r\n")):
        path.write_text(before + text.replace("\n", line_end), encoding="utf-8", newline="")
        assert [record for _, record in read_records(path)] == ROWS[:count]
        assert len(list(read_conversation_rows(path))) == count


def test_a_row_with_lists_is_no_wrapper(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    for record in (
        {"messages": message},
        {"conversations": message},
        {"prompt": message[:1], "completion": message[1:]},
    ):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        assert [read for _, read in read_records(path)] == [record]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (json.dumps({"train": ROWS, "test": ROWS}, indent=1), ["rows.json", "train, test"]),
        ('{\n "data": [\n  {"a": 1},\n  {"a" 2}\n ]\n}', ["rows.json:4", "invalid JSON", "column 8"]),
        ('{\n"title": "题",\n"abstract": "文"\n}\n{\n "a" 2\n}', ["rows.json:6", "invalid JSON"]),
        ('{\n "a": "好\\ud83d"\n}', ["rows.json:1", "half of a character"]),
        ('{"data": [1, 2]}', ["rows.json:1", "data", "no known shape"]),
        ("[" * 100_000, ["rows.json", "JSON"]),
        ('{\n"a": ' + "[" * 100_000, ["rows.json:1", "JSON"]),
    ],
)
def test_what_is_wrong_with_wrapped_json_is_named(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_conversation_rows(tmp_path / "rows.json"))
    for part in parts:
        assert part in caught.value.cause


def written(rows: list[list[str]], quoting: Any, line_end: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=quoting, lineterminator=line_end).writerows(rows)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("quoting", "line_end"),
    [(csv.QUOTE_MINIMAL, "\n"), (csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\r")],
)
def test_what_a_csv_writer_writes_is_read(quoting: Any, line_end: str, tmp_path: Path) -> None:
    draw = random.Random(5)
    rows = [["".join(draw.choices('好",\n ;“', k=draw.randint(1, 6))) + "。" for _ in range(3)] for _ in range(60)]
    path = tmp_path / "rows.csv"
    path.write_text(written([["a", "b", "c"], *rows], quoting, line_end), encoding="utf-8-sig", newline="")
    read = list(read_records(path))
    assert [list(record.values()) for _, record in read] == rows
    lines = [2 + sum("".join(row).count("\n") for row in rows[:number]) + number for number in range(60)]
    assert [where for where, _ in read] == [f"{path}:{line}" for line in lines]


HEAD = "instruction,input,output\n"
BAD_CSV = {
    "a comma too many": (HEAD + "写诗,夏天,好诗\n续写,春天来了,花开了,真好看\n", "3", "4 cells for 3 columns"),
    "a comma too few": (HEAD + "写诗,夏天,好诗\n续写,春天来了\n写诗,,好\n", "3", "output is missing"),
    "after a cell of two lines": (HEAD + '写诗,"夏\n天",好诗\n续写,春天\n', "4", "2 cells for 3 columns"),
    "a quotation mark inside a quoted cell": (HEAD + '改写,"他说："你好"。",他问候了对方。\n', "2", "quotation mark"),
    "an open cell that the next one closes": (
        HEAD + '"你好，他说,问一,答一\n写诗二,问二,答二\n"再见，他说,问三,答三\n写诗四,问四,答四\n',
        "2",
        "quotation mark",
    ),
    "an open cell": (HEAD + '写诗,夏天,好诗\n"你好,问,答\n再来,问,答\n', "3", "quotation mark"),
    "an open cell that makes a row": (HEAD + '写诗,夏天,"好\n再来,问,答"\n续写,,"\n', "4", "quotation mark"),
    "a quotation mark in a bare cell": (HEAD + '写诗,夏天,好诗\n他说"好",问,答\n', "3", "quotation mark"),
    "a quotation mark at the end": (HEAD + '写诗,夏天,好诗"\n', "2", "quotation mark"),
    "a blank before the quotation mark": (HEAD + '写诗, "夏天",好诗\n', "2", "quotation mark"),
    "one name twice": ("instruction,output,output\n写诗,甲,乙\n", "1", "'output'"),
    "a column without a name": ("instruction,output,\n写诗,甲,\n写诗,甲,乙\n", "3", "without a name"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CSV)
def test_csv_that_could_be_read_in_two_ways_is_an_error(name: str, tmp_path: Path) -> None:
    text, line, told = BAD_CSV[name]
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_records(path))
    assert caught.value.cause.split(": ")[0].split(" to ")[0] == f"{path}:{line}"
    assert told in caught.value.cause and caught.value.remedy
    with pytest.raises(UserError) as caught:  # nor where the columns are named on the command line
        list(read_table(path, ["a", "b", "c"]))
        raise UserError(f"{path}:{line}: named", "names twice in a file are no matter then")
    assert caught.value.cause.startswith(f"{path}:{line}")


def test_csv_columns_that_say_nothing(tmp_path: Path) -> None:
    """Spreadsheets write blank rows and columns around the table."""
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output,,\n写诗,好诗,,\n,,,\n\n续写,春天,,\n", encoding="utf-8")
    assert [record for _, record in read_records(path)] == [
        {"instruction": "写诗", "output": "好诗"}, {"instruction": "续写", "output": "春天"},
    ]  # fmt: skip


def test_rows_that_are_not_parsed_hold_what_records_hold(tmp_path: Path) -> None:
    """Values that JSON has no type for give the same ids, and are no texts."""
    day = datetime.date(2024, 2, 29)
    rows = [{"id": day, "text": "好\r\n\u2028", "n": 0.1}, {"id": None, "text": None, "n": float("inf")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    values: list[Any] = [b"\xff", day, decimal.Decimal("1.50"), datetime.timedelta(1)]
    columns = {str(number): [value] for number, value in enumerate(values)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "values.parquet")
    (tmp_path / "rows.csv").write_text('id,text\n1,"好 ""\\ud83d\n"\n', encoding="utf-8")
    for name in ("rows.parquet", "rows.csv"):
        records = [
            (where, record | {"id": record["id"] and str(record["id"])})
            for where, record in read_records(tmp_path / name)
        ]
        raw = [(f"{tmp_path / name}{row.place}", row.text) for row in read_raw_rows(tmp_path / name)]
        assert [(where, load_record(text, where)) for where, text in raw] == records
    (row,) = read_raw_rows(tmp_path / "values.parquet")
    assert [type(value) for value in load_record(row.text, "x").values()] == [dict] * len(values)
