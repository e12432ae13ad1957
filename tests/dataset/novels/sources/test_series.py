"""A folder with one file a chapter is one book in the order of the numbers; numbered novels are books of their own."""

import zipfile
from pathlib import Path

import pytest

from dataset.novels.sources.series import find_series
from dataset.novels.sources.sources import list_folder, read_books
from tests.dataset.novels.test_prepare import prepare
from tests.novel_files import CHINESE_NUMBERS, json_rows, sample_bodies, shard_rows

BODIES = sample_bodies()


def chapter(number: int) -> str:
    return f"第{CHINESE_NUMBERS[number - 1]}章 风雨\n{BODIES[number - 1]}\n"


def members(folder: Path) -> list[tuple[str, list[str]]]:
    found = find_series(list_folder(folder)[0], folder, folder.name)
    return [(series.name, list(series.members)) for series in found]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_numbered_files_are_one_book_of_one_split(share: float, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "长夜").mkdir(parents=True)
    for number in range(1, 11):
        (raw / "长夜" / f"{number}.txt").write_text(chapter(number), encoding="gb18030" if number % 2 else "utf-8")
    (raw / "另一本.txt").write_text("第一章 海\n" + BODIES[12] + "\n第二章 灯\n" + BODIES[13], encoding="utf-8")
    prepare(raw, tmp_path / "out", "--held_out_share", str(share))
    books = {book["name"]: book for book in json_rows(tmp_path / "out" / "books.jsonl")}
    assert set(books) == {"长夜", "另一本"}
    book = books["长夜"]
    assert book["source"] == "长夜/1.txt…10.txt" and "10 files" in book["findings"][0]
    rows = [
        row for split in ("train", "held_out") for row in shard_rows(tmp_path / "out", split) if row["book"] == "长夜"
    ]
    assert [row["chapter"] for row in rows] == [f"第{number}章" for number in CHINESE_NUMBERS]
    assert [row["text"].split("\n", 1)[1] for row in rows] == [
        "\n".join(line.strip() for line in body.split("\n") if line.strip()) for body in BODIES[:10]
    ]
    # A changed file is seen, and the others are not read as books of their own.
    (raw / "长夜" / "10.txt").write_text(chapter(10).replace("风雨", "归人"), encoding="utf-8")
    prepare(raw, tmp_path / "out", "--held_out_share", str(share))
    rows = [row for split in ("train", "held_out") for row in shard_rows(tmp_path / "out", split)]
    assert [row["title"] for row in rows if row["chapter"] == "第十章"] == ["归人"]


def test_files_without_headings_are_named_by_their_files(tmp_path: Path) -> None:
    raw = tmp_path / "长夜"
    raw.mkdir()
    for number, title in enumerate(("雨夜", "渡口", "旧信"), start=9):
        (raw / f"{number:03} {title}.txt").write_text(BODIES[number], encoding="utf-8")
    prepare(raw, tmp_path / "out", "--held_out_share", "0")
    rows = shard_rows(tmp_path / "out", "train")
    assert [(row["book"], row["chapter"]) for row in rows] == [("长夜", "雨夜"), ("长夜", "渡口"), ("长夜", "旧信")]


@pytest.mark.parametrize(
    "names",
    [
        ["第8章.txt", "第9章.txt", "第10章.txt"],
        ["第一章 雨.txt", "第二章 渡.txt", "第三章 信.txt"],
        ["长夜_001.txt", "长夜_002.txt", "长夜_004.txt"],
        ["一.txt", "二.txt", "三.txt"],
        ["1.雨.TXT", "2.渡.txt", "3.信.txt"],
    ],
)
def test_ways_of_numbering(names: list[str], tmp_path: Path) -> None:
    numbers = [8, 9, 10] if "第10章.txt" in names else [1, 2, 4] if "长夜_004.txt" in names else [1, 2, 3]
    for name, number in zip(names, numbers, strict=True):
        (tmp_path / name).write_text(chapter(number), encoding="utf-8")
    ((name, found),) = members(tmp_path)
    assert found == names
    assert name == ("长夜" if names[0].startswith("长夜") else tmp_path.name)


@pytest.mark.parametrize(
    "names",
    [
        ["第一卷/1.txt", "第一卷/2.txt", "第一卷/3.txt", "第二卷 渡口/1.txt", "第二卷 渡口/2.txt", "第二卷 渡口/3.txt"],
        ["1-1.txt", "1-2.txt", "1-3.txt", "2-1.txt", "2-2.txt", "2-3.txt"],
        ["第1卷第1章.txt", "第1卷第2章.txt", "第1卷第3章.txt", "第2卷第1章.txt", "第2卷第2章.txt", "第2卷第3章.txt"],
    ],
)
def test_volumes_are_one_book(names: list[str], tmp_path: Path) -> None:
    for index, name in enumerate(names):
        path = tmp_path / "长夜" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(chapter(index % 3 + 1), encoding="utf-8")
    assert members(tmp_path) == [("长夜", [f"长夜/{name}" for name in names])]


def test_a_file_twice_or_damaged_costs_no_other_chapter(tmp_path: Path) -> None:
    raw = tmp_path / "长夜"
    raw.mkdir()
    for number in range(1, 8):
        (raw / f"{number}.txt").write_text(chapter(number), encoding="utf-8")
    (raw / "01.txt").write_text(chapter(1), encoding="utf-8")
    (raw / "4.txt").write_bytes(b"")
    prepare(raw, tmp_path / "out", "--held_out_share", "0")
    (book,) = json_rows(tmp_path / "out" / "books.jsonl")
    assert any("4.txt is empty" in finding for finding in book["findings"])
    rows = shard_rows(tmp_path / "out", "train")
    assert sorted({row["chapter"] for row in rows}) == sorted(
        f"第{CHINESE_NUMBERS[n - 1]}章" for n in (1, 2, 3, 5, 6, 7)
    )


def test_what_is_no_series(tmp_path: Path) -> None:
    novel = "".join(map(chapter, (1, 2, 3)))
    folders = {
        "numbered novels": {f"{number:02} 书{number}.txt": novel for number in (1, 2, 3, 4)},
        "bare numbered novels": {f"{number}.txt": novel for number in (1, 2, 3)},
        "long texts without headings": {f"{number}.txt": BODIES[number] * 60 for number in (1, 2, 3)},
        "two files": {f"{number}.txt": chapter(number) for number in (1, 2)},
        "far apart": {f"{number}.txt": chapter(index) for index, number in enumerate((1, 40, 900), start=1)},
        "names without numbers": {"甲.txt": chapter(1), "乙.txt": chapter(2), "丙.txt": chapter(3)},
        "years": {f"{number}年.txt": chapter(1) for number in (1984, 1991, 2049)},
    }
    for folder, files in folders.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text, encoding="utf-8")
    assert members(tmp_path) == []


@pytest.mark.parametrize("names", ["{}.txt", "长夜/第{}章.txt", "第一卷/{:03}.txt"])
def test_chapters_in_an_archive_are_one_book(names: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with zipfile.ZipFile(raw / "长夜.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9):
            archive.writestr(names.format(number), chapter(number).encode("gb18030" if number % 2 else "utf-8"))
        archive.writestr("另一本.txt", ("第一章 海\n" + BODIES[12] + "\n第二章 灯\n" + BODIES[13]).encode())
    prepare(raw, tmp_path / "out", "--held_out_share", "0.9")
    books = {book["name"]: book for book in json_rows(tmp_path / "out" / "books.jsonl")}
    assert set(books) == {"长夜", "另一本"} and "10 files" in books["长夜"]["findings"][0]
    rows = [row for split in ("train", "held_out") for row in shard_rows(tmp_path / "out", split)]
    assert [row["chapter"] for row in rows if row["book"] == "长夜"] == [f"第{number}章" for number in CHINESE_NUMBERS]


def test_numbered_novels_in_an_archive_stay_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "合集.zip", "w") as archive:
        for number in (1, 2, 3):
            archive.writestr(f"{number}.txt", "".join(map(chapter, (1, 2, 3))))
    assert [book.name for book in read_books(tmp_path / "合集.zip", tmp_path)] == ["1", "2", "3"]
