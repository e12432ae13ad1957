"""Folders of novels for tests, cut from the samples, every book with chapters of its own; and what was made of them."""

import gzip
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet

from novelgpt.settings.paths import SAMPLES

CHINESE_NUMBERS = "一二三四五六七八九十"
NOTICE = "更新时间:2007-11-16 7:55:51 本章字数:4804"
ASKING = "求月票！求推荐票！求收藏！"


def sample_bodies() -> list[str]:
    """The chapters of both samples, without headings: 21 texts of some 1,500 characters."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((SAMPLES / "novels").glob("*.txt"))]
    return [body.strip("\n") for text in texts for body in re.split(r"^第.{1,3}章 .*$", text, flags=re.MULTILINE)[1:]]


def make_book(bodies: list[str], notices: bool = False) -> str:
    """A text as sites have it."""
    parts = []
    for number, body in zip(CHINESE_NUMBERS, bodies, strict=False):
        lines = body.split("\n")
        if notices:
            lines = [NOTICE, *lines[:-1], lines[-1], ASKING]
        parts.append(f"第{number}章 风雨\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def write_novels(folder: Path) -> dict[str, str]:
    """Books of three chapters in every kind of file, and what can be met beside them.

    Returns:
        source -> text, of the books that can be used.
    """
    bodies = sample_bodies()
    texts = [make_book(bodies[start : start + 3], notices=start < 6) for start in range(0, 18, 3)]
    (folder / "海").mkdir(parents=True)
    (folder / "山.txt").write_bytes(texts[0].replace("\n", "\r\n").encode("gb18030"))
    (folder / "海" / "灯塔.txt").write_text(texts[1], encoding="utf-8")
    (folder / "信.txt.gz").write_bytes(gzip.compress(texts[2].encode(), mtime=0))
    with zipfile.ZipFile(folder / "合集.zip", "w") as archive:
        archive.writestr("../外面/甲.txt", texts[3].encode())
        archive.writestr("乙.txt", texts[4].encode())
        archive.writestr("封面.jpg", b"\xff\xd8\xff")
    rows = [
        {"book": "行", "chapter": f"第{n}章", "title": "雨", "text": body}
        for n, body in zip("一二三", bodies[15:18], strict=True)
    ]
    (folder / "行.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (folder / "转载.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode())
    (folder / "坏.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "空.txt").write_bytes(b"")
    (folder / "说明.docx").write_bytes(b"PK")
    return {
        "山.txt": texts[0],
        "海/灯塔.txt": texts[1],
        "信.txt.gz": texts[2],
        "合集.zip!../外面/甲.txt": texts[3],
        "合集.zip!乙.txt": texts[4],
        "行.jsonl:1": "".join(f"第{n}章 雨{body}" for n, body in zip("一二三", bodies[15:18], strict=True)),
        "转载.txt": texts[0],
    }


def tree(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder."""
    return {
        str(Path(here, name).relative_to(folder)): hashlib.sha256(Path(here, name).read_bytes()).hexdigest()
        for here, _, names in os.walk(folder)
        for name in names
    }


def json_rows(path: Path) -> list[dict[str, Any]]:
    """Of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def shard_rows(out: Path, split: str) -> list[dict[str, Any]]:
    """Of all files of a split, in order."""
    rows: list[dict[str, Any]] = []
    for path in sorted(out.glob(f"{split}-*")):
        rows += pyarrow.parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else json_rows(path)
    return rows


def source_of_book(row: dict[str, Any]) -> str:
    """Of a row of a chapter or of a removed line."""
    return str(row["source"]).rsplit("#", 1)[0]
