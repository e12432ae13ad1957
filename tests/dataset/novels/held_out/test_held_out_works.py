"""A list of held-out works keeps them out of training: in every edition, and their authors' other works."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import opencc
import pytest

from dataset.novels.command import main
from dataset.novels.duplicates.near_duplicates import BookPrints, find_duplicates
from dataset.novels.duplicates.shingles import fingerprint, fold
from dataset.novels.duplicates.split import Decision, Split, assign_splits, decide
from dataset.novels.held_out.command import main as list_main
from dataset.novels.held_out.recognition import recognise
from dataset.novels.held_out.sketches import sketch_of
from dataset.novels.held_out.works import (
    HeldOutWork,
    HeldOutWorks,
    load_held_out_works,
    save_held_out_works,
    words_of,
)
from dataset.novels.manifest import MANIFEST
from novelgpt.settings.errors import UserError
from tests.novel_files import json_rows, make_book, sample_bodies, shard_rows, source_of_book

SHARED = Path(__file__).resolve().parents[5] / "shared"
SHIPPED = Path(__file__).parents[4] / "dataset" / "novels" / "held_out" / "public_domain.json"
ADS = "天才一秒记住本站地址，手机用户请浏览阅读，最新章节全文免费，更优质的阅读体验。"
BODIES = sample_bodies()
HILLS, TOWER, RAIN, WIND = BODIES[:4], BODIES[4:8], BODIES[8:12], BODIES[12:16]

Book = tuple[str, list[str]]


def work(author: str, title: str, chapters: list[str], role: str = "test", sha256: str = "0" * 64) -> HeldOutWork:
    prints = fingerprint(chapters)
    of = "" if role == "test" else "某"
    return HeldOutWork(author, title, role, of, "now", int(prints.characters.sum()), sha256, sketch_of(prints))


LISTED = HeldOutWorks("mine", "", (work("沈默", "山中", HILLS), work("沈默", "雨", RAIN, "same_author")))


def fates(*books: Book, listed: HeldOutWorks = LISTED, names: tuple[str, ...] = (), **sha256_of: str) -> Any:
    """The split of each book, and the decisions about its chapters."""
    prints = [BookPrints(Path(source).stem, source, fingerprint(chapters)) for source, chapters in books]
    duplicates = find_duplicates(prints)
    reserved = recognise(listed, prints, duplicates, {f"{name}.txt": value for name, value in sha256_of.items()})
    splits = assign_splits(prints, duplicates, names, reserved=reserved)
    return splits, decide(prints, duplicates, splits, reserved=reserved)


def reasons(decisions: list[Decision]) -> list[str]:
    return [decision.reason or decision.fate for decision in decisions]


def traditional(chapters: list[str]) -> list[str]:
    return list(map(opencc.OpenCC("s2t").convert, chapters))


def one_line(chapters: list[str]) -> list[str]:
    return ["".join(chapters).replace("\n", "")]


def scraps(chapters: list[str]) -> list[str]:
    text = "".join(chapters)
    return [text[start : start + 300] for start in range(0, len(text), 300)]


def with_ads(chapters: list[str]) -> list[str]:
    return [ADS.join(chapter[start : start + 300] for start in range(0, len(chapter), 300)) for chapter in chapters]


EDITIONS = (traditional, one_line, scraps, with_ads)


@pytest.mark.parametrize("edition", EDITIONS)
def test_an_edition_under_any_name_is_held_out_and_others_are_trained_on(
    edition: Callable[[list[str]], list[str]],
) -> None:
    splits, decisions = fates(("a.txt", edition(HILLS)), ("b.txt", TOWER), ("c.txt", WIND))
    assert splits == ["held_out", "train", "train"]
    assert [set(reasons(made)) for made in decisions] == [{"held_out"}, {"train"}, {"train"}]


@pytest.mark.parametrize("edition", EDITIONS)
def test_chapters_of_an_absent_work_in_an_anthology_are_leaks(edition: Callable[[list[str]], list[str]]) -> None:
    part = edition(HILLS[1:2])
    splits, (decisions, _) = fates(("合集.txt", [*TOWER, *part, *WIND]), ("c.txt", BODIES[16:]))
    assert splits == ["train", "train"]
    assert reasons(decisions) == ["train"] * 4 + ["leak"] * len(part) + ["train"] * 4
    where = decisions[4].other
    assert where is not None
    assert (where.source, where.book, where.chapter) == ("沈默_山中", "山中", 2)


def test_a_listed_chapter_inside_a_long_one_makes_that_a_leak() -> None:
    long = "".join(BODIES[4:8] + HILLS[2:3] + BODIES[12:])
    assert 5 * len(HILLS[2]) < len(long)
    _, (decisions, _) = fates(("合集.txt", [long]), ("c.txt", RAIN[:1]))
    assert reasons(decisions) == ["leak"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("沈默_别的.txt", "held_out_author"),
        ("沈默全集.txt", "held_out_author"),
        ("书/沈默/别的.txt", "held_out_author"),
        ("《别的》作者：沈默.txt", "held_out_author"),
        ("沈默霞_别的.txt", "train"),
        ("沈默的羔羊.txt", "train"),
        ("山中.txt", "train"),
        ("沈默_山中.txt", "held_out"),
        ("《山中》 沈默.txt", "held_out"),
    ],
)
def test_a_file_name_says_the_author_or_the_work(source: str, expected: str) -> None:
    splits, (decisions, others) = fates((source, TOWER), ("c.txt", WIND))
    assert set(reasons(decisions)) == {expected}
    assert splits[0] == {"held_out_author": "left_out"}.get(expected, expected)
    assert set(reasons(others)) == {"train"}


def test_nobody_is_the_author_of_other_anonymous_works() -> None:
    listed = HeldOutWorks("mine", "", (work("佚名", "山中", HILLS),))
    assert fates(("佚名_别的.txt", TOWER), listed=listed)[0] == ["train"]


def test_a_work_of_the_author_by_content_is_in_neither_split_and_neither_is_a_copy_of_its_chapter() -> None:
    splits, decisions = fates(("a.txt", traditional(RAIN)), ("b.txt", [*WIND, RAIN[0]]))
    assert splits == ["left_out", "train"]
    assert reasons(decisions[0]) == ["held_out_author"] * 4
    assert reasons(decisions[1]) == ["train"] * 4 + ["leak"]


def test_a_chapter_of_a_work_that_only_its_name_gives_away_is_a_leak_too() -> None:
    _, decisions = fates(("沈默_别的.txt", TOWER), ("b.txt", [*WIND, *with_ads(TOWER[:1])]))
    assert reasons(decisions[0]) == ["held_out_author"] * 4
    assert reasons(decisions[1]) == ["train"] * 4 + ["leak"]


def test_beside_the_very_file_other_editions_are_in_neither_split() -> None:
    listed = HeldOutWorks("mine", "", (work("沈默", "山中", HILLS, sha256="f" * 64),))
    books = ("a.txt", traditional(HILLS)), ("b.txt", HILLS), ("c.txt", WIND)
    assert fates(*books, listed=listed, b="f" * 64)[0] == ["left_out", "held_out", "train"]
    assert fates(*books, listed=listed)[0] == ["held_out", "held_out", "train"]


def test_an_edition_of_what_only_its_name_gives_away_goes_with_it() -> None:
    books = ("沈默_山中.txt", TOWER), ("b.txt", traditional(TOWER)), ("c.txt", WIND)
    assert fates(*books)[0] == ["held_out", "held_out", "train"]


def test_names_and_list_are_held_out_together() -> None:
    books = ("a.txt", HILLS), ("b.txt", RAIN), ("c.txt", TOWER), ("d.txt", WIND)
    assert fates(*books)[0] == ["held_out", "left_out", "train", "train"]
    assert fates(*books, names=("c",))[0] == ["held_out", "left_out", "held_out", "train"]
    assert fates(*books, names=("b",))[0] == ["held_out", "held_out", "train", "train"]
    with pytest.raises(UserError, match="by the list"):
        fates(*books[:3], names=("c",))


def test_a_share_is_drawn_from_books_that_the_list_leaves() -> None:
    prints = [BookPrints(f"{number}", f"{number}.txt", fingerprint([body])) for number, body in enumerate(BODIES)]
    duplicates = find_duplicates(prints)
    reserved = recognise(HeldOutWorks("mine", "", (work("沈默", "山中", BODIES[:1]),)), prints, duplicates, {})
    drawn: list[Split] = assign_splits(prints, duplicates, held_out_share=0.3, seed=1)
    both = assign_splits(prints, duplicates, held_out_share=0.3, seed=1, reserved=reserved)
    assert both == ["held_out", *drawn[1:]]


def test_a_list_made_from_a_folder_binds_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, first, out, path = (tmp_path / name for name in ("raw", "first", "out", "list.json"))
    raw.mkdir()
    for name, bodies in (("沈默_山中", HILLS), ("沈默_雨", RAIN), ("李四_灯塔", TOWER), ("王五_风", WIND)):
        (raw / f"{name}.txt").write_text(make_book(bodies), encoding="utf-8")
    edition = make_book(traditional([*HILLS[2:], *HILLS[:2]]))
    (raw / "蔣.txt").write_bytes(edition.replace("\n", "\r\n").encode("gb18030"))
    (tmp_path / "choice.yaml").write_text(
        "name: 我的\nworks:\n- {author: 沈默, title: 山中, era: now}\n", encoding="utf-8"
    )
    main([str(raw), str(first), "--workers", "1", "--held_out_share", "0"])
    list_main([str(tmp_path / "choice.yaml"), str(first), str(path)])
    listed = load_held_out_works(str(path))
    assert [(one.name, one.role, one.of) for one in listed.works] == [
        ("沈默_山中", "test", ""),
        ("蔣", "near_duplicate", "沈默_山中"),
        ("沈默_雨", "same_author", "沈默_山中"),
    ]
    assert listed.works[0].characters == sum(len(fold(row["text"])) for row in shard_rows(first, "train")
                                             if row["book"] == "沈默_山中")  # fmt: skip
    sizes = [len(one.sketch.values) for one in listed.works]
    assert 10 * sizes[1] < sizes[0]  # it holds only what the first one lacks
    words = [str(tmp_path / "choice.yaml"), str(first)]
    list_main([*words, str(tmp_path / "new" / "list.json")])
    assert (tmp_path / "new" / "list.json").read_bytes() == path.read_bytes()
    text = path.read_text(encoding="utf-8")
    assert not [body[i : i + 4] for body in HILLS for i in range(len(body)) if body[i : i + 4] in text]

    capsys.readouterr()
    main([str(raw), str(out), "--workers", "1", "--held_out_works", str(path)])
    assert "left out" in capsys.readouterr().out
    assert {source_of_book(row) for row in shard_rows(out, "held_out")} == {"沈默_山中.txt"}
    trained = {source_of_book(row): "" for row in shard_rows(out, "train")}
    assert set(trained) == {"李四_灯塔.txt", "王五_风.txt"}
    assert [row for row in shard_rows(first, "train") if source_of_book(row) in trained] == shard_rows(out, "train")
    left_out = {source_of_book(row): row["reason"] for row in json_rows(out / "left_out.jsonl")}
    assert left_out == {"沈默_雨.txt": "held_out_author", "蔣.txt": "held_out_edition"}
    splits = {book["source"]: (book["split"], book["left_out"]) for book in json_rows(out / "books.jsonl")}
    assert splits["沈默_雨.txt"] == ("left_out", "held_out_author")
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["options"]["held_out_works"] == f"我的, sha256 {listed.digest}"
    assert manifest["options"]["held_out_share"] == 0
    assert "held_out_author" in (out / "report.html").read_text(encoding="utf-8")

    for place, message in (("choice.yaml/list.json", "choice.yaml/list.json: "), ("raw", "raw: ")):
        with pytest.raises(SystemExit, match="2"):
            list_main([*words, str(tmp_path / place)])
        assert message in capsys.readouterr().err
    (first / "duplicates.jsonl").unlink()
    with pytest.raises(SystemExit, match="2"):
        list_main([*words, str(tmp_path / "list.json")])
    assert "is not a prepared folder" in capsys.readouterr().err


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_held_out_works("mine", LISTED.works, tmp_path / "list.json")
    read = load_held_out_works(str(tmp_path / "list.json"))
    for before, after in zip(LISTED.works, read.works, strict=True):
        assert np.array_equal(before.sketch.values, after.sketch.values)
        assert np.array_equal(before.sketch.starts, after.sketch.starts)
        assert before.name == after.name
    first = (tmp_path / "list.json").read_bytes()
    save_held_out_works("mine", read.works, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first


def broken(field: str, value: object) -> str:
    row: dict[str, object] = {"author": "沈默", "title": "山中", "role": "test", "of": "", "era": "", "characters": 9,
                              "sha256": "0" * 64, "chapters": [1], "sketch": "AQAAAA=="}  # fmt: skip
    return json.dumps({"format": 1, "name": "mine", "works": [row | {field: value}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list"),
        ("[]", "not a list"),
        ('{"format": 2, "works": []}', "format 1"),
        ('{"format": 1, "name": "mine", "works": []}', "no work to test on"),
        ('{"format": 1, "name": "mine", "works": [3]}', "work 1: not an object"),
        (broken("role", "same_author"), "no work to test on"),
        (broken("role", "other"), "work 1: role"),
        (broken("title", "长" * 200), "work 1: title"),
        (broken("title", ""), "work 1: no title"),
        (broken("sha256", "abc"), "work 1: sha256"),
        (broken("characters", "9"), "work 1: characters"),
        (broken("chapters", [2]), "work 1: chapters add up to 2 shingles, sketch holds 1"),
        (broken("chapters", [-1, 2]), "work 1: chapters"),
        (broken("sketch", "云"), "work 1: sketch"),
        (broken("sketch", "AQAAAAA="), "work 1: sketch"),
        (broken("sketch", "AAAA/w=="), "work 1: sketch"),
        (broken("sketch", None), "work 1: sketch"),
    ],
)
def test_a_malformed_list_stops_the_run_before_it_begins(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "out"), "--held_out_works", str(tmp_path / "list.json")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(UserError) as raised:
        load_held_out_works("public_domian")
    assert "public_domain" in raised.value.remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine", "no name or no works"),
        ("- a", "no name or no works"),
        ("name: mine\nworks: [{author: 沈默}]", "work 1"),
        ("name: mine\nworks: [{author: 沈默, title: 山中, size: 3}]", "work 1"),
        ("name: [", "cannot be read"),
        ("name: mine\nworks: [{author: 沈默, title: 山中}]", "not a prepared folder"),
    ],
)
def test_a_choice_that_cannot_be_used_leaves_no_list(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "choice.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        list_main([str(tmp_path / "choice.yaml"), str(tmp_path / "prepared"), str(tmp_path / "list.json")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "list.json").exists()


def test_sketches_are_those_that_lists_were_made_with() -> None:
    # Digits mean the same to every version of OpenCC and Unicode.
    digits = "".join(map(str, range(150)))
    golden = [587977996, 768273087, 854387433, 1357069579, 1688937467]
    assert sketch_of(fingerprint([digits])).values.tolist() == golden


def test_the_shipped_list_holds_twelve_works_and_no_text() -> None:
    listed = load_held_out_works("public_domain")
    assert sum(one.role == "test" for one in listed.works) == 12
    assert len({one.author for one in listed.works if one.role == "test"}) == 12
    stored = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert SHIPPED.stat().st_size < 300_000
    for row in stored["works"]:
        texts = {name: value for name, value in row.items() if isinstance(value, str)}
        sketch = texts.pop("sketch")
        assert base64.b64encode(base64.b64decode(sketch)).decode() == sketch
        assert re.fullmatch("[0-9a-f]{64}", texts.pop("sha256"))
        assert max(map(len, texts.values())) <= 40
        # A shingle in 64, or less where works before it have them.
        assert sum(row["chapters"]) < row["characters"] / 64 * 1.1


def test_words_are_simplified_and_without_signs() -> None:
    assert words_of("蕭紅_《生死場》.txt") == ["萧红", "生死场", "txt"]


def grams(texts: list[str]) -> np.ndarray:
    """Hashes of the 12-character shingles of texts, ascending and distinct; one in four."""
    found = [np.zeros(0, np.uint64)]
    for codes in (fold(text).astype(np.uint64) for text in texts):
        hashes = np.zeros(max(len(codes) - 11, 0), np.uint64)
        for place in range(12):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(hashes)]
        for _ in range(2):
            hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        found.append(hashes[hashes >> np.uint64(62) == 0])
    return np.unique(np.concatenate(found))


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="the corpus is not here")
def test_the_corpus_keeps_its_other_works_and_shares_no_text_with_the_twelve(tmp_path: Path) -> None:
    main([str(SHARED / "corpus"), str(tmp_path), "--workers", "2", "--held_out_works", "public_domain"])
    texts: dict[str, list[str]] = {}
    for row in shard_rows(tmp_path, "train"):
        texts.setdefault(row["book"], []).append(row["text"])
    held_out = shard_rows(tmp_path, "held_out")
    assert len({row["book"] for row in held_out}) == 12
    assert len(texts) == 211 - 12
    assert not [row for row in json_rows(tmp_path / "left_out.jsonl") if row["reason"] == "leak"]
    tested = grams([row["text"] for row in held_out])
    assert not {book: share for book, some in texts.items() if (share := np.isin(grams(some), tested).mean()) >= 1e-3}


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "data" / "novels").is_dir(), reason="the novels are not here")
def test_other_editions_of_listed_works_are_recognised_without_the_hash_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    names = ("ernvyingxiongzhuan.gutenberg.utf8", "xiaohong_quanji.xstt.utf8bom", "hulanhezhuan.daocaoren.utf8")
    for number, name in enumerate((*names, "yulihun.gutenberg.utf8", "panghuang.oneline.utf8")):
        text = (SHARED / "data" / "novels" / f"{name}.txt").read_text(encoding="utf-8-sig")
        (tmp_path / "raw" / f"{number}号.txt").write_bytes(f"{text}\n".encode("gb18030"))
    main([str(tmp_path / "raw"), str(tmp_path / "out"), "--workers", "2", "--held_out_works", "public_domain"])
    assert {source_of_book(row) for row in shard_rows(tmp_path / "out", "train")} == {"3号.txt", "4号.txt"}
