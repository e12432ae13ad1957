"""Rows of JSON come out one by one, the same wherever the text is cut; errors are those of the whole text."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataset.json_values import read_json_values
from dataset.records import load_record, read_raw_rows, read_records
from dataset.text_files import open_text
from novelgpt.settings.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ROWS: list[dict[str, Any]] = [
    {"instruction": '写"诗"\\', "n": [1, -2.5e-10, float("inf"), 12345678901234567890123, None, True]},
    {},
    {"messages": [{"role": "user", "content": "他说：{[,]}\n𠮷"}, {"深": {"deep": [[], [{}]]}}]},
]
LISTS = {
    "spread": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "on one line": json.dumps(ROWS),
    "compact": json.dumps(ROWS, ensure_ascii=False, separators=(",", ":")),
    "blanks": "\n \n" + json.dumps(ROWS, indent="\t", separators=(" \n, ", " : ")) + "\n\u3000\n",
    "under a name": json.dumps({"version": "1,\"[{", "data": ROWS, "note": {"by": [1, 2]}}, indent=2),
    "on one line, under a name": json.dumps({"note": [], "n": 1.5, "data": ROWS}),
    "under a name given twice": f'{{"data": 5, "data": [{{}}],\n "other": [1], "data": {json.dumps(ROWS)}}}',
}  # fmt: skip
SIZES = [*range(1, 51), 10_000]


def read(path: Path, size: int) -> list[tuple[str, Any]]:
    return [(place, load_record(text, place)) for place, text in read_json_values(open_text(path, size))]


@pytest.mark.parametrize("name", LISTS)
def test_items_of_a_list(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(LISTS[name], encoding="utf-8")
    expected = [(f" row {number}", row) for number, row in enumerate(ROWS)]
    for size in SIZES:
        assert read(path, size) == expected
    assert list(read_records(path)) == [(f"{path}{place}", row) for place, row in expected]
    assert [(row.place, json.loads(row.text)) for row in read_raw_rows(path)] == expected


@pytest.mark.parametrize("between", ["\n", "", "\n\n \u3000\n"])
def test_values_one_after_the_other(between: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    written = [json.dumps(row, indent=1, ensure_ascii=False) for row in ROWS]
    path.write_text("\n" + between.join(written), encoding="utf-8")
    lines = [2 + (between.join(written[:number]) + between * bool(number)).count("\n") for number in range(3)]
    expected = [(f":{line}", row) for line, row in zip(lines, ROWS, strict=True)]
    for size in SIZES:
        assert read(path, size) == expected


def faults(text: str) -> list[str]:
    """The text without each of its characters, and with each of some characters in every place."""
    cuts = [text[:at] + text[at + 1 :] for at in range(len(text))] + [text[:at] for at in range(1, len(text))]
    return cuts + [text[:at] + more + text[at:] for at in range(len(text)) for more in '",]}\\']


@pytest.mark.parametrize("wrapper", ["[%s]", '{"v":\n1, "d": [%s]}', "%s"])
def test_invalid_json_is_named_by_line_and_column(wrapper: str, tmp_path: Path) -> None:
    """As the parser names it that reads the text as a whole."""
    path = tmp_path / "rows.json"
    row = '{"a": "\\n",\n "c": [1]}'
    text = wrapper % (f"{row},\n{row}" if "%s]" in wrapper else row)
    assert json.loads(text)
    found = 0
    for number, fault in enumerate(faults(text)):
        path.write_text(fault, encoding="utf-8")
        try:
            json.loads(fault)
            continue
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # values one after the other
                continue
            expected = f"{path}:{error.lineno}: invalid JSON, column {error.colno}: {error.msg}"
        found += 1
        with pytest.raises(UserError) as caught:
            list(read_json_values(open_text(path, 1 + number % 50)))
        assert caught.value.cause == expected
    assert found > 100


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('[\n{"a": 1}\n]\n{"a": 2}', ":1: the row is a list, not a mapping of fields"),
        ('\n[\n{"a": 1}\n]\n[\n]', ":2: the row is a list, not a mapping of fields"),
        ('[\n{"a": 1},\n5]', " row 1: the row is a int, not a mapping of fields"),
        ('[\n{"a": 1},\n{"a": "\\ud83d"}]', " row 1: a \\ud… escape spells half of a character (a lone surrogate)"),
        ('{\n"a": [{}], "b": [{"c": 1}]}', ": several lists of rows in one file: a, b"),
        ('[\n{"a": ' + "1" * 5000 + "}]", ":1: JSON that cannot be read"),
        ('[\n{"a": ' + "[" * 90_000, ":1: JSON that cannot be read"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(text: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path}{cause}")):
        list(read_records(path))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"a": [{"b": 1}], "text": "文"}', [":1"]),  # a field of rows: it is one itself
        ('{\n"a": [{"b": 1}]}\n{\n"c": 1}', [":1", ":3"]),  # more than one value
        ('{"a": [{"b": 1}, 5]}', [":1"]),
        ('{"a": [], "b": 1}', [":1"]),
        ("{}", [":1"]),
        ("[]", []),
        ('[{"a": 1}]', [" row 0"]),
        ('{"a": 1}\n{"a": 2}', [":1", ":2"]),
    ],
)
def test_which_values_are_rows(text: str, rows: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    assert [row.place for row in read_raw_rows(path)] == rows


# Writes a file of some MB in one of several shapes, and tells by how many MB private memory grows while it is read.
READ = """
import json, resource, sys
from pathlib import Path
import pyarrow, pyarrow.parquet
from dataset.records import read_raw_rows, read_records

def private():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

shape, path, megabytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
row = {"instruction": "山里的雪下了一整夜。" * 5, "output": "老人推开门，看见院子里有一行小小的脚印。" * 12}
line = json.dumps(row, ensure_ascii=False)
count = megabytes * 1_000_000 // len(line.encode())
encoding = "gb18030" if shape == "gb18030" else "utf-8"
begin, between, end = {"list": ("[", ", ", "]"), "under a name": ('{"data": [', ", ", "]}")}.get(shape, ("", "\\n", ""))
if shape == "spread":
    line = json.dumps(row, ensure_ascii=False, indent=1)
if shape == "csv":
    begin, line = "instruction,output\\n", f'"{row["instruction"]}\\n","{row["output"]}"'
if shape == "parquet":
    table = pyarrow.Table.from_pylist([row])
    with pyarrow.parquet.ParquetWriter(path, table.schema, use_dictionary=False, compression="none") as writer:
        for _ in range(max(1, count // 2_000)):
            writer.write_table(pyarrow.concat_tables([table] * 2_000), row_group_size=2_000)
    count = count // 2_000 * 2_000
else:
    with path.open("w", encoding=encoding) as file:
        file.write(begin + line)
        for _ in range(count - 1):
            file.write(between + line)
        file.write(end)
for read in (read_raw_rows, read_records):
    before, peak, rows = private(), 0, 0
    for rows, _ in enumerate(read(path), start=1):
        if rows % 500 == 1:
            peak = max(peak, private())
    assert rows == count, (rows, count)
    print(max(peak, private()) - before)
"""
SHAPES = ["lines", "spread", "list", "under a name", "gb18030", "csv", "parquet"]


def growth(shape: str, path: Path, megabytes: int) -> float:
    arguments = [sys.executable, "-c", READ, shape, str(path), str(megabytes)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return max(map(float, done.stdout.split()))


@pytest.mark.parametrize("shape", ["lines", "list"])
def test_memory_holds_a_few_rows(shape: str, tmp_path: Path) -> None:
    suffix = ".jsonl" if shape == "lines" else ".json"
    assert growth(shape, tmp_path / f"rows{suffix}", 12) < 6


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_does_not_grow_with_the_file(shape: str, tmp_path: Path) -> None:
    suffix = {"csv": ".csv", "parquet": ".parquet"}.get(shape, ".json")
    # Arrow keeps about 30 MB of a .parquet file of any size.
    assert growth(shape, tmp_path / f"rows{suffix}", 60) < (40 if shape == "parquet" else 20)
