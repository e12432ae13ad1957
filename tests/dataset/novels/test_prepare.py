"""The run that prepares a folder of novels: nothing is lost, nothing is done twice, nothing depends on chance."""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset.novels.books import count_visible
from dataset.novels.command import main
from dataset.novels.manifest import MANIFEST
from tests.novel_files import (
    ASKING,
    NOTICE,
    json_rows,
    make_book,
    sample_bodies,
    shard_rows,
    source_of_book,
    tree,
    write_novels,
)

QUOTATION_MARKS = "“”‘’「」『』"


def prepare(raw: Path, out: Path, *words: str) -> None:
    main([str(raw), str(out), "--workers", "1", *words])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> inode and time of change of everything below a folder, and of the folder."""
    paths = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("prepared")
    texts = write_novels(folder / "raw")
    prepare(folder / "raw", folder / "out", "--held_out", "灯塔")
    yield folder / "raw", folder / "out", texts


@pytest.fixture
def copied(prepared: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> tuple[Path, Path]:
    """A prepared folder that a test may change; times and names stay, inodes do not."""
    raw, out, _ = prepared
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "raw", tmp_path / "out"


def test_every_character_is_in_a_shard_or_listed_as_removed_or_left_out(
    prepared: tuple[Path, Path, dict[str, str]],
) -> None:
    _, out, texts = prepared
    found: Counter[str] = Counter()
    marks: Counter[str] = Counter()
    for row in [*shard_rows(out, "train"), *shard_rows(out, "held_out"), *json_rows(out / "left_out.jsonl")]:
        found[source_of_book(row)] += count_visible(row["text"])
        marks.update(character for character in row["text"] if character in QUOTATION_MARKS)
    for row in json_rows(out / "rejected.jsonl"):
        if "line" in row:
            found[source_of_book(row)] += count_visible(row["text"])
            marks.update(character for character in row["text"] if character in QUOTATION_MARKS)
    assert {source: count for source, count in found.items() if count} == {
        source: count_visible(text) for source, text in texts.items()
    }
    assert marks == Counter(character for text in texts.values() for character in text if character in QUOTATION_MARKS)
    for book in json_rows(out / "books.jsonl"):
        if not book["refused"]:
            removed = sum(counts["characters"] for counts in book["removed"].values())
            assert book["characters_in"] == book["characters_kept"] + removed == count_visible(texts[book["source"]])


def test_notices_are_removed_with_their_rule_and_line(prepared: tuple[Path, Path, dict[str, str]]) -> None:
    _, out, texts = prepared
    rejected = {(row["source"], row["line"]): row for row in json_rows(out / "rejected.jsonl") if "line" in row}
    for source in ("山.txt", "海/灯塔.txt"):
        for number, line in enumerate(texts[source].split("\n"), start=1):
            if line in (NOTICE, ASKING):
                assert rejected[source, number]["text"] == line
                assert rejected[source, number]["rule"]
    assert not any(line in row["text"] for row in shard_rows(out, "train") for line in (NOTICE, ASKING))


def test_rows_are_text_rows_and_a_repeat_is_left_out(prepared: tuple[Path, Path, dict[str, str]]) -> None:
    _, out, _ = prepared
    rows = shard_rows(out, "train")
    assert all(list(row) == ["text", "book", "chapter", "title", "source"] for row in rows)
    assert list(dict.fromkeys(map(source_of_book, rows))) == sorted(
        ["山.txt", "信.txt.gz", "合集.zip!../外面/甲.txt", "合集.zip!乙.txt", "行.jsonl:1"]
    )
    first = next(row for row in rows if row["source"] == "山.txt#1")
    assert (first["book"], first["chapter"], first["title"]) == ("山", "第一章", "风雨")
    assert first["text"].startswith("第一章 风雨\n")
    assert {source_of_book(row) for row in shard_rows(out, "held_out")} == {"海/灯塔.txt"}
    left_out = [row for row in json_rows(out / "left_out.jsonl") if row["text"]]
    assert {source_of_book(row) for row in left_out} == {"转载.txt"}
    assert all(row["reason"] and row["other"].startswith("山.txt") for row in left_out)


def test_files_that_cannot_be_used_are_told_with_the_reason(
    prepared: tuple[Path, Path, dict[str, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    raw, out, texts = prepared
    refused = {book["source"]: book["refused"] for book in json_rows(out / "books.jsonl") if book["refused"]}
    assert set(refused) == {"坏.txt", "空.txt"}
    assert all(refused.values())
    skipped = {row["source"] for row in json_rows(out / "left_out.jsonl") if not row["text"]}
    assert skipped == {"说明.docx", "合集.zip!封面.jpg"}
    shutil.copytree(raw, tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "out")
    shown = capsys.readouterr().out
    assert all(f"{source}: {reason}" in shown for source, reason in refused.items())
    report = (out / "report.html").read_text(encoding="utf-8")
    assert all(source in report for source in refused)


def test_nothing_usable_ends_with_status_2_and_names_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "空.txt").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        prepare(tmp_path / "raw", tmp_path / "out")
    shown = capsys.readouterr()
    assert "nothing usable" in shown.err
    assert "空.txt" in shown.out
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_the_same_again_does_nothing(copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = copied
    before = stamps(out)
    prepare(raw, out, "--held_out", "灯塔")
    assert "nothing to do" in capsys.readouterr().out
    assert stamps(out) == before


def test_a_changed_file_is_done_again_and_no_other(copied: tuple[Path, Path]) -> None:
    raw, out = copied
    before = stamps(out / "cache" / "files")
    path = raw / "海" / "灯塔.txt"
    times = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("风雨", "雨风"), encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # neither time nor size tells
    prepare(raw, out, "--held_out", "灯塔")
    after = stamps(out / "cache" / "files")
    same = {name for name in before.keys() & after.keys() if name != "."}
    assert len([name for name in before.keys() - same if "/" not in name and name != "."]) == 1
    assert len([name for name in after.keys() - same if "/" not in name and name != "."]) == 1
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert {row["title"] for row in shard_rows(out, "held_out")} == {"雨风"}


def test_a_removed_file_is_forgotten(copied: tuple[Path, Path], tmp_path: Path) -> None:
    raw, out = copied
    (raw / "合集.zip").unlink()
    prepare(raw, out, "--held_out", "灯塔")
    prepare(raw, tmp_path / "fresh", "--held_out", "灯塔")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_damaged_output_is_made_again(copied: tuple[Path, Path]) -> None:
    raw, out = copied
    before = tree(out)
    (out / "report.html").write_text("", encoding="utf-8")
    (out / "train-00000.parquet").unlink()
    (out / "cache" / "files" / "0000.unfinished-1").mkdir()
    prepare(raw, out, "--held_out", "灯塔")
    assert tree(out) == before


def test_places_orders_and_numbers_of_workers_change_no_byte(
    prepared: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    raw, out, _ = prepared
    other = tmp_path / "another place" / "raw"
    other.mkdir(parents=True)
    for path in sorted((path for path in raw.rglob("*") if path.is_file()), reverse=True):
        target = other / path.relative_to(raw)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    main([str(other), str(tmp_path / "out"), "--workers", "3", "--held_out", "灯塔"])
    assert tree(tmp_path / "out") == tree(out)


def test_formats_hold_the_same_rows_and_shards_are_cut_by_size(
    copied: tuple[Path, Path], prepared: tuple[Path, Path, dict[str, str]]
) -> None:
    raw, out = copied
    before = stamps(out / "cache" / "files")
    prepare(raw, out, "--held_out", "灯塔", "--format", "jsonl")
    assert shard_rows(out, "train") == shard_rows(prepared[1], "train")
    assert not list(out.glob("*.parquet"))
    assert stamps(out / "cache" / "files") == before


def test_options_redo_what_depends_on_them(copied: tuple[Path, Path]) -> None:
    raw, out = copied
    before = {path.name for path in (out / "cache" / "files").iterdir()}
    prepare(raw, out, "--held_out", "甲")
    assert {path.name for path in (out / "cache" / "files").iterdir()} == before
    assert {source_of_book(row) for row in shard_rows(out, "held_out")} == {"合集.zip!../外面/甲.txt"}
    rules = raw.parent / "more.yaml"
    rules.write_text("rules:\n- {name: lamp, where: line, contains: [风雨], pattern: '.*风雨.*'}\n", encoding="utf-8")
    prepare(raw, out, "--held_out", "甲", "--rules", str(rules))
    assert not {path.name for path in (out / "cache" / "files").iterdir()} & before
    assert "lamp" in {row["rule"] for row in json_rows(out / "rejected.jsonl")}


def test_traditional_characters_become_simplified_on_request(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    text = (
        make_book(sample_bodies()[:2]).replace("灯", "燈").replace("来", "來").replace("说", "說").replace("个", "個")
    )
    (tmp_path / "raw" / "燈.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "raw", tmp_path / "out", "--held_out_share", "0")
    kept = [row["text"] for row in shard_rows(tmp_path / "out", "train")]
    prepare(tmp_path / "raw", tmp_path / "out", "--held_out_share", "0", "--to_simplified")
    assert [row["text"] for row in shard_rows(tmp_path / "out", "train")] == [
        part.replace("燈", "灯").replace("來", "来").replace("說", "说").replace("個", "个") for part in kept
    ]
    assert any("燈" in part for part in kept)


def test_bad_bytes_are_left_out_and_listed(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    data = make_book(sample_bodies()[:3]).encode("gb18030")
    place = data.index("。".encode("gb18030"), 2000) + 2
    (tmp_path / "raw" / "书.txt").write_bytes(data[:place] + b"\xff" + data[place:])
    prepare(tmp_path / "raw", tmp_path / "out")
    bad = [row for row in json_rows(tmp_path / "out" / "rejected.jsonl") if "offset" in row]
    assert bad == [{"source": "书.txt", "offset": place, "rule": "undecodable_bytes", "text": "ff"}]
    assert json_rows(tmp_path / "out" / "books.jsonl")[0]["bad_bytes"] == [{"offset": place, "hex": "ff"}]


def test_books_of_one_name_stay_apart(tmp_path: Path) -> None:
    bodies = sample_bodies()
    for number in (0, 1):
        (tmp_path / "raw" / str(number)).mkdir(parents=True)
        text = make_book(bodies[number * 3 : number * 3 + 3])
        (tmp_path / "raw" / str(number) / "书.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path / "raw", tmp_path / "out", "--held_out_share", "0")
    assert {row["book"] for row in shard_rows(tmp_path / "out", "train")} == {"书 (0/书.txt)", "书 (1/书.txt)"}


def test_the_manifest_tells_what_is_there(prepared: tuple[Path, Path, dict[str, str]]) -> None:
    raw, out, _ = prepared
    text = (out / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert str(raw.parent) not in text
    hashes = tree(out)
    assert {entry["file"]: entry["sha256"] for entry in manifest["outputs"]} == {
        name: value for name, value in hashes.items() if "/" not in name and name != MANIFEST
    }
    sources = tree(raw)
    del sources["说明.docx"]
    assert {entry["source"]: entry["sha256"] for entry in manifest["inputs"]} == sources
    rows = {entry["file"]: entry["rows"] for entry in manifest["outputs"] if "rows" in entry}
    assert rows["train-00000.parquet"] == len(shard_rows(out, "train"))
    assert rows["rejected.jsonl"] == len(json_rows(out / "rejected.jsonl"))
    assert rows["left_out.jsonl"] == len(json_rows(out / "left_out.jsonl"))


def test_two_runs_do_not_mix(copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = copied
    before = stamps(out)
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(SystemExit, match="2"):
        prepare(raw, out)
    os.close(lock)
    assert "another run" in capsys.readouterr().err
    assert stamps(out) == before


@pytest.mark.parametrize("place", ["raw", "raw/out", "taken", "file"])
def test_folders_that_hold_something_else_are_left_alone(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_novels(tmp_path / "raw")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "train-00000.parquet").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        prepare(tmp_path / "raw", tmp_path / place)
    assert capsys.readouterr().err.count("\n") == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--shard_size", "0"],
        ["--workers", "0"],
        ["--held_out_share", "1"],
        ["--near_duplicate_threshold", "0"],
        ["--held_out", "没有这本书"],
        ["--rules", "no_such_file.yaml"],
        ["--format", "csv"],
    ],
)
def test_options_that_make_no_sense_are_two_lines(
    words: list[str], copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        prepare(*copied, *words)
    assert capsys.readouterr().err.splitlines()[-2].startswith("error: ")
