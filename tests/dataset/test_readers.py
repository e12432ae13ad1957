"""Each format and encoding is read exactly; each error names file, line and field."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset.readers import make_source_row, read_conversation_rows, read_source_rows, read_text_rows
from dataset.records import read_records
from novelgpt.settings.errors import UserError

SIMPLIFIED = "　　他说：“这里的人都不是我们的朋友。”\n　　她来了，𠮷野先生也在。“你看——”"
TRADITIONAL = "　　他說：「這個人不是我們的朋友。」\n　　她來了，唔係佢嘅，啲人在。"
ENCODINGS = [
    ("utf-8", SIMPLIFIED),
    ("utf-8", TRADITIONAL),
    ("utf-8-sig", SIMPLIFIED),
    ("utf-16", SIMPLIFIED),
    ("utf-16-be with its mark", TRADITIONAL),
    ("gb18030", SIMPLIFIED),
    ("gb18030", TRADITIONAL),
    ("big5hkscs", TRADITIONAL),
    ("utf-8", "plain ASCII, no Chinese"),
]


def encoded(text: str, encoding: str) -> bytes:
    if encoding == "utf-16-be with its mark":
        return b"\xfe\xff" + text.encode("utf-16-be")
    return text.encode(encoding)


def as_csv(rows: list[dict[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# suffix, variant: rows -> text of the file
FORMATS = {
    (".jsonl", "lines"): lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    (".jsonl", "CRLF, blank lines"): lambda rows: "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows),
    (".json", "list"): lambda rows: json.dumps(rows, ensure_ascii=False),
    (".json", "list over lines"): lambda rows: "\n" + json.dumps(rows, ensure_ascii=False, indent=1) + "\n",
    (".json", "JSON lines"): lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    (".csv", "quoted"): as_csv,
}


@pytest.mark.parametrize(("encoding", "text"), ENCODINGS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_in_every_encoding(tmp_path: Path, kind: tuple[str, str], encoding: str, text: str) -> None:
    rows = [{"text": text, "title": "一人"}, {"text": text + "\n完。", "title": ""}]
    path = tmp_path / f"rows{kind[0]}"
    path.write_bytes(encoded(FORMATS[kind](rows), encoding))
    assert [record for _, record in read_records(path)] == rows
    assert [(row["text"], row["title"]) for row in read_text_rows(path)] == [(r["text"], r["title"]) for r in rows]


@pytest.mark.parametrize(("encoding", "text"), ENCODINGS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_plain_text_is_one_row(tmp_path: Path, encoding: str, text: str, line_end: str) -> None:
    path = tmp_path / "呼兰河传.txt"
    path.write_bytes(encoded(text.replace("\n", line_end), encoding))
    assert list(read_text_rows(path)) == [
        {"text": text, "book": "呼兰河传", "chapter": "", "title": "", "source": str(path)}
    ]


def test_upper_case_suffix(tmp_path: Path) -> None:
    path = tmp_path / "ROWS.JSONL"
    path.write_text('{"text": "好"}', encoding="utf-8")
    assert [row["text"] for row in read_text_rows(path)] == ["好"]


def test_line_separators_inside_json_strings_do_not_end_lines(tmp_path: Path) -> None:
    texts = ["上\u2028下", "上\u2029下", "上\x85下", "上\x0b\x0c\x1c下"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert [row["text"] for row in read_text_rows(path)] == texts
    assert [where for where, _ in read_records(path)] == [f"{path}:{line}" for line in (1, 2, 3, 4)]


def test_parquet_texts_and_nested_conversations(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": SIMPLIFIED, "book": "书", "chapter": "1"}, {"text": TRADITIONAL, "book": "书", "chapter": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(read_text_rows(path)) == [
        {**row, "title": "", "source": f"{path} row {index}"} for index, row in enumerate(rows)
    ]
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}] * 2), path)
    assert list(read_conversation_rows(path)) == [
        {"id": f"rows-{index}", "messages": messages, "source": f"{path} row {index}"} for index in range(2)
    ]


def test_messages_in_a_csv_column_are_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答，\n“好”"}]
    path = tmp_path / "rows.csv"
    path.write_text(as_csv([{"id": "a7", "messages": json.dumps(messages)}]), encoding="utf-8")
    (row,) = read_conversation_rows(path)
    assert (row["id"], row["messages"]) == ("a7", messages)


def test_history_in_a_csv_column_is_json(tmp_path: Path) -> None:
    row = {"instruction": "二", "output": "乙", "history": json.dumps([["一", "甲"]])}
    path = tmp_path / "rows.csv"
    path.write_text(as_csv([row, {**row, "history": ""}]), encoding="utf-8")
    contents = [[message["content"] for message in row["messages"]] for row in read_conversation_rows(path)]
    assert contents == [["一", "甲", "二", "乙"], ["二", "乙"]]


def test_a_csv_field_may_hold_a_whole_book(tmp_path: Path) -> None:
    book = "他来了。\n" * 50_000
    path = tmp_path / "rows.csv"
    path.write_text(as_csv([{"text": book}]), encoding="utf-8")
    assert [row["text"] for row in read_text_rows(path)] == [book]


def test_other_text_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"content": "好\\r\\n的", "book": "书", "chapter": 3}', encoding="utf-8")
    assert list(read_text_rows(path, "content")) == [
        {"text": "好\n的", "book": "书", "chapter": "3", "title": "", "source": f"{path}:1"}
    ]


def test_a_text_of_several_columns_is_theirs_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"title": "题", "abstract": "摘\r\n要", "a,b": "一列"}
    path.write_text(json.dumps(row), encoding="utf-8")
    for column, text in (("title,abstract", "题\n摘\n要"), ("abstract,title", "摘\n要\n题"), ("a,b", "一列")):
        assert [read["text"] for read in read_text_rows(path, column)] == [text]
    with pytest.raises(UserError, match="no text in field 'author'"):
        list(read_text_rows(path, "title,author"))


def test_line_ends_inside_json_texts_are_line_feeds_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ['{"prompt": "问", "completion": "答", "more": [1, {"deep\\r\\nname": ["好\\r的", null]}]}', GOOD]
    path.write_text("".join(rows), encoding="utf-8")
    assert [row.fields for row in read_source_rows(path)] == [
        {"prompt": "问", "completion": "答", "more": [1, {"deep\nname": ["好\n的", None]}]},
        {"prompt": "问", "completion": "答"},
    ]
    where, record = next(read_records(path))
    assert [make_source_row(record | more, where, "a").id for more in ({"id": 7}, {"id": None}, {})] == ["7", "a", "a"]


GOOD = '{"prompt": "问", "completion": "答"}\n'

# file name, its bytes, what the cause must say beside the file's name
BAD_CONVERSATIONS = [
    ("a.jsonl", GOOD + '{"prompt": "问", "completion" "答"}\n', ["a.jsonl:2", "invalid JSON", "column 30"]),
    ("a.jsonl", "\n\n" + GOOD + "\n{\n", ["a.jsonl:5", "invalid JSON"]),
    ("a.json", GOOD + "oops\n", ["a.json:2", "invalid JSON"]),
    ("a.json", '[\n{"prompt": "问",\n"completion" "答"}\n]', ["a.json:3", "invalid JSON", "column 14"]),
    ("a.json", '\n\n[\n{"prompt": "问",\n"completion" "答"}\n]', ["a.json:5", "invalid JSON", "column 14"]),
    ("a.jsonl", GOOD + "[1, 2]\n", ["a.jsonl:2", "list"]),
    ("a.jsonl", GOOD + '{"question": "问", "answer": "答"}', ["a.jsonl:2", "question, answer"]),
    ("a.jsonl", GOOD + '{"prompt": "问"}', ["a.jsonl:2", "prompt"]),
    ("a.jsonl", GOOD + '{"prompt": "问", "completion": null}', ["a.jsonl:2", "completion is missing"]),
    ("a.jsonl", '{"prompt": 5, "completion": "答"}', ["a.jsonl:1", "prompt is not a text"]),
    ("a.jsonl", '{"instruction": "问", "output": ["答"]}', ["a.jsonl:1", "output is not a text"]),
    ("a.jsonl", '{"instruction": "问", "output": "答", "history": [["一"]]}', ["a.jsonl:1", "history[0]"]),
    ("a.jsonl", '{"title": "题", "abstract": 7}', ["a.jsonl:1", "abstract is not a text"]),
    ("a.jsonl", '{"messages": []}', ["a.jsonl:1", "messages"]),
    ("a.jsonl", '{"messages": ["你好"]}', ["a.jsonl:1", "messages[0]"]),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "一"}, {"role": "bot", "content": "二"}]}',
     ["a.jsonl:1", "messages[1].role", "'bot'"]),
    ("a.jsonl", '{"messages": [{"role": ["user"], "content": "一"}]}', ["a.jsonl:1", "messages[0].role"]),
    ("a.jsonl", '{"messages": [{"role": "user"}]}', ["a.jsonl:1", "messages[0].content is missing"]),
    ("a.jsonl", '{"conversations": [{"from": "alien", "value": "一"}]}', ["a.jsonl:1", "conversations[0].from"]),
    ("a.jsonl", '{"conversations": [{"from": "human", "value": 1}]}', ["a.jsonl:1", "conversations[0].value"]),
    ("a.jsonl", '{"prompt": [{"role": "you", "content": "一"}], "completion": "二"}', ["a.jsonl:1", "prompt[0].role"]),
    ("a.csv", "prompt,completion\n问,答\n问\n", ["a.csv:3", "completion is missing"]),
    ("a.csv", 'messages\n"[{""role"": 1"\n', ["a.csv:2", "messages", "invalid JSON"]),
    ("a.jsonl", "", ["a.jsonl", "empty"]),
    ("a.jsonl", " \n\n", ["a.jsonl", "empty"]),
    ("a.jsonl", "\ufeff", ["a.jsonl", "empty"]),
    ("a.parquet", "", ["a.parquet", "empty"]),
    ("a.parquet", "PAR1 not really", ["a.parquet", "parquet"]),
    ("a.yaml", GOOD, ["a.yaml", ".yaml"]),
    ("a.txt", "你好", ["a.txt", ".txt"]),
    ("plain", GOOD, ["plain", "without a suffix"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "parts"), BAD_CONVERSATIONS)
def test_errors_name_file_line_and_field(tmp_path: Path, name: str, content: str, parts: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_conversation_rows(tmp_path / name))
    assert caught.value.cause.startswith(str(tmp_path / name))
    for part in parts:
        assert part in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "好"}\n{"content": "好"}', [":2", "'text'", "content"]),
        ('{"text": "好"}\n{"text": null}', [":2", "'text'"]),
        ('{"text": 5}', [":1", "'text'"]),
        ("{}", [":1", "'text'", "nothing"]),
    ],
)
def test_rows_without_their_text_are_named(tmp_path: Path, content: str, parts: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_text_rows(path))
    for part in [f"{path}{parts[0]}", *parts[1:]]:
        assert part in caught.value.cause


def test_rows_before_a_bad_line_come_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "oops", encoding="utf-8")
    rows = read_conversation_rows(path)
    assert next(rows)["source"] == f"{path}:1"
    with pytest.raises(UserError):
        next(rows)


@pytest.mark.parametrize("name", ["no.jsonl", "no.json", "no.csv", "no.parquet", "no.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        list(read_text_rows(tmp_path / name))
    assert caught.value.cause.startswith(str(tmp_path / name))


# what comes before the bad bytes, the bad bytes, what comes after
UNDECODABLE = {
    "no encoding has 0xff": ("他说：这是我们的。\n".encode(), b"\xff", "好\n".encode()),
    "at once": (b"", b"\xff", "他说的。\n".encode()),
    "after the mark of UTF-8": (b"\xef\xbb\xbf" + "他说的".encode(), b"\xff", "好\n".encode()),
    "in GB18030": ("他说：这是我们的。\n".encode("gb18030") * 9, b"\xff", "好\n".encode("gb18030")),
    "half a pair in UTF-16": ("他说".encode("utf-16"), b"\x00\xd8", "好".encode("utf-16-le")),
    "UTF-8 without its first byte": ("他说：这是我们的。\n".encode(), "我".encode()[1:], "们在。\n".encode() * 9),
    "UTF-8 cut short": ("他说：这是我们的。\n".encode() * 9, "我".encode()[:2], b""),
    # Every two bytes of these characters are one of GB18030.
    "UTF-8 cut short, one line": (("我们的" * 60).encode(), "我".encode()[:2], b""),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_undecodable_bytes_are_named_with_their_offset(tmp_path: Path, name: str) -> None:
    before, bad, after = UNDECODABLE[name]
    path = tmp_path / "book.txt"
    path.write_bytes(before + bad + after)
    with pytest.raises(UserError) as caught:
        list(read_text_rows(path))
    assert caught.value.cause.startswith(f"{path}: byte {bad[0]:#04x} at offset {len(before)} ")
