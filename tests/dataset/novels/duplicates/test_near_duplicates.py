"""What counts is found again whatever its layout and script; estimates agree with the sets they stand for."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import opencc
import pytest

from dataset.decode import decode_text
from dataset.novels.duplicates.near_duplicates import BookPrints, find_duplicates
from dataset.novels.duplicates.overlaps import PARTNERS, collect, shared_shingles, similar_signatures
from dataset.novels.duplicates.shingles import (
    PERMUTATIONS,
    SAMPLED,
    VERSION,
    Fingerprints,
    fingerprint,
    fold,
    load_fingerprints,
    save_fingerprints,
)
from novelgpt.settings.errors import UserError

ROOT = Path(__file__).parents[4]
SAMPLES = sorted((ROOT / "dataset" / "samples" / "novels").glob("*.txt"))
NOVELS = ROOT.parent / "shared" / "data" / "novels"
FREQUENT = [chr(point) for point in range(0x4E00, 0x5600)]


def prose(seed: int, length: int) -> str:
    drawn = random.Random(seed)
    return "".join(drawn.choice(FREQUENT) + ("，" if drawn.random() < 0.1 else "") for _ in range(length))


def pieces(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


def book(name: str, chapters: list[str]) -> BookPrints:
    return BookPrints(name, f"{name}.txt", fingerprint(chapters))


def shingles(text: str) -> set[tuple[int, ...]]:
    codes = fold(text).tolist()
    return set(zip(*(codes[i:] for i in range(5)), strict=False))


def equal(first: Fingerprints, second: Fingerprints) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def sample_text(number: int = 0) -> str:
    return SAMPLES[number].read_text(encoding="utf-8")


def test_only_letters_digits_and_hanzi_count() -> None:
    text = sample_text()
    plain = "".join(filter(str.isalnum, text))
    for other in (plain, text.replace("\n", "\r\n\u3000\u3000"), "“" + "——".join(pieces(plain, 7)) + "”…"):
        assert equal(fingerprint([other]), fingerprint([text]))
    assert not equal(fingerprint([plain[:-1]]), fingerprint([text]))


@pytest.mark.parametrize(
    ("written", "counted"),
    [("後來，裏面", "后来里面"), ("ＡＢＣ１２", "abc12"), ("看著", "看着"), ("乾坤", "干坤"), ("……！？「」", "")],
)
def test_characters_count_as_their_simplified_plain_form(written: str, counted: str) -> None:
    assert "".join(map(chr, fold(written))) == "".join(map(chr, fold(counted))) == counted


def test_each_text_has_its_own_fingerprint_wherever_it_stands() -> None:
    texts = ["", "天地", "天地玄黄宇宙洪荒", *pieces(sample_text(), 1_700), prose(1, 150_000), "", "日月盈昃辰宿列张"]
    together = fingerprint(texts)
    assert len(together) == len(texts)
    for i, text in enumerate(texts):
        assert equal(together.part(i, i + 1), fingerprint([text]))
    assert equal(fingerprint([]), together.part(0, 0))


def test_a_process_of_its_own_writes_the_same_file(tmp_path: Path) -> None:
    chapters = pieces(sample_text(), 2_000)
    save_fingerprints([fingerprint(chapters), fingerprint([]), fingerprint(chapters[:3])], tmp_path / "here.npz")
    code = (
        "import sys; from pathlib import Path; from dataset.novels.duplicates.shingles import *\n"
        f"text = Path({str(SAMPLES[0])!r}).read_text(encoding='utf-8')\n"
        "parts = [text[i : i + 2000] for i in range(0, len(text), 2000)]\n"
        "books = [fingerprint(parts), fingerprint([]), fingerprint(parts[:3])]\n"
        "save_fingerprints(books, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.npz")], cwd=ROOT, check=True)
    assert (tmp_path / "here.npz").read_bytes() == (tmp_path / "there.npz").read_bytes()
    loaded = load_fingerprints(tmp_path / "here.npz")
    assert [len(part) for part in loaded] == [len(chapters), 0, 3]
    assert equal(loaded[0], fingerprint(chapters)) and equal(loaded[2], fingerprint(chapters[:3]))


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prints.npz"
    np.savez(path, version=np.array(VERSION + " other"), texts=np.zeros(0, np.int64), **vars(fingerprint([])))
    with pytest.raises(UserError, match="another version"):
        load_fingerprints(path)
    path.write_bytes(path.read_bytes()[:100])
    for broken in (path, tmp_path / "missing.npz"):
        with pytest.raises(UserError, match=broken.name):
            load_fingerprints(broken)


@pytest.mark.parametrize("length", [60, 400, 5_000])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_signatures_estimate_jaccard(length: int, kept: float) -> None:
    first = prose(length, length)
    second = first[: int(kept * length)] + prose(length + 1, length - int(kept * length))
    a, b = shingles(first), shingles(second)
    true = len(a & b) / len(a | b)
    one, two = fingerprint([first, second]).signatures
    assert abs((one == two).mean() - true) < 4 * (true * (1 - true) / PERMUTATIONS) ** 0.5


def test_samples_estimate_shares() -> None:
    text = sample_text()
    part = text[3_000:15_000]
    changed = "".join(c if i % 40 else "〇" for i, c in enumerate(part))
    prints = fingerprint([text, changed])
    true = len(shingles(changed) & shingles(text)) / len(shingles(changed))
    estimated = np.isin(prints.part(1, 2).samples, prints.part(0, 1).samples).mean()
    assert abs(estimated - true) < 4 * (SAMPLED * true * (1 - true) / len(shingles(changed))) ** 0.5
    for i, whole in enumerate((text, changed)):
        expected = len(shingles(whole)) / SAMPLED
        assert abs(len(prints.part(i, i + 1).samples) - expected) < 4 * expected**0.5


def test_shared_shingles_are_those_of_the_sets() -> None:
    """Enough of them for several slices of the range."""
    drawn = np.random.default_rng(0)
    pool = np.unique(drawn.integers(0, 1 << 32, 250_000, dtype=np.uint32))
    sets = [[pool[drawn.random(len(pool)) < 0.2] for _ in range(10)] for _ in range(3)]
    books = [
        Fingerprints(
            np.zeros((10, 32), np.uint8),
            np.full(10, 1_000_000),
            np.zeros((10, PERMUTATIONS), np.uint32),
            np.concatenate(chapters),
            np.cumsum([0, *map(len, chapters)]),
        )
        for chapters in sets
    ]
    shared = shared_shingles(collect(books))
    whole = [np.unique(np.concatenate(chapters)) for chapters in sets]
    assert shared.distinct.tolist() == list(map(len, whole))
    assert {(later, earlier): value for later, earlier, value in shared.books.rows()} == {
        (later, earlier): len(np.intersect1d(whole[later], whole[earlier]))
        for later in range(3)
        for earlier in range(later)
    }
    last = [(earlier, value) for later, earlier, value in shared.chapters.rows() if later == 29]
    assert sum(value for earlier, value in last if earlier < 10) == np.isin(sets[2][9], whole[0]).sum()
    assert dict(last)[0] == np.isin(sets[2][9], sets[0][0]).sum()
    earlier_here = np.concatenate(sets[2][:9])
    assert sum(value for earlier, value in last if earlier >= 20) == np.isin(sets[2][9], earlier_here).sum()


def test_pairs_below_the_least_share_are_left_out_and_no_others() -> None:
    chapters = [prose(i, 4_000) for i in range(6)]
    parts = [chapters[i][: 200 * i] + prose(100 + i, 4_000 - 200 * i) for i in range(6)]
    long = "".join(prose(200 + i, 3_000) + chapters[i][:1_500] for i in range(6))
    books = [fingerprint([chapters[0], long]), fingerprint(chapters), fingerprint(parts)]
    collection = collect(books)
    everything = shared_shingles(collection).chapters
    for least in (0.1, 0.2, 0.5):
        expected = set()
        for later, earlier, _ in everything.rows():
            book = collection.book_of[earlier]
            group = [(e, value) for p, e, value in everything.rows() if p == later and collection.book_of[e] == book]
            share = sum(value for _, value in group) / collection.sampled[later]
            if share >= least or any(value >= least * collection.sampled[e] for e, value in group):
                expected.add((later, earlier))
        found = shared_shingles(collection, least).chapters
        assert {(later, earlier) for later, earlier, _ in found.rows()} == expected
        assert 0 < len(expected) < len(everything.later)


def test_similar_chapters_are_found_and_others_are_not() -> None:
    """Of 60 pairs that are alike by 0.8 all; none of those that are not."""
    texts = [prose(i, 600) for i in range(60)]
    changed = [text[:560] + prose(1_000 + i, 40) for i, text in enumerate(texts)]
    found = similar_signatures(collect([fingerprint(texts), fingerprint(changed)]), 0.7)
    assert {(later, earlier) for later, earlier, _ in found.rows()} == {(60 + i, i) for i in range(60)}


def test_every_kind_is_reported_once_and_nothing_else() -> None:
    chapters = [prose(i, 3_000) for i in range(12)]
    near = [chapter[:-90] + prose(50 + i, 100) for i, chapter in enumerate(chapters[:6])]
    books = [
        book("原本", chapters),
        book("转载", [*chapters[:-1], chapters[-1][:-1]]),
        book("改本", near),
        book("合集", [prose(70, 9_000), prose(71, 9_000), chapters[6] + prose(72, 3_000) + chapters[7]]),
        book("节选", [chapters[2][1_500:] + chapters[3][:1_500], prose(73, 2_000)]),
        book("别的", [prose(80, 20_000)]),
    ]
    found = find_duplicates(books)
    levels = {level: [pair for pair in found.pairs if pair.level == level] for level in ("book", "chapter")}
    assert {(p.kind, p.first.book, p.second.book) for p in levels["book"]} == {
        ("near", "转载", "原本"),
        ("contained", "改本", "原本"),
        ("contained", "改本", "转载"),
        ("contained", "节选", "原本"),
        ("contained", "节选", "转载"),
        ("contained", "节选", "改本"),
    }
    places = [(p.kind, p.first.book, p.first.chapter, p.second.book, p.second.chapter) for p in levels["chapter"]]
    assert sorted(p for p in places if p[1] == "转载") == sorted(
        [("exact", "转载", i, "原本", i) for i in range(1, 12)] + [("near", "转载", 12, "原本", 12)]
    )
    assert sorted(p for p in places if p[1] == "改本") == [("near", "改本", i, "原本", i) for i in range(1, 7)]
    assert [p[:3] for p in places if p[1] == "节选"] == [("contained", "节选", 1)]
    assert {p[1] for p in places} == {"转载", "改本", "节选"}
    assert all(0 < pair.similarity <= 1 for pair in found.pairs)


def test_a_chapter_repeated_in_its_own_book_is_reported() -> None:
    chapters = [prose(i, 2_000) for i in range(5)]
    found = find_duplicates([book("书", [*chapters, chapters[1], chapters[2] + chapters[3]])])
    assert [(p.kind, p.first.chapter) for p in found.pairs] == [("exact", 6), ("contained", 7)]


def test_empty_and_tiny_chapters() -> None:
    found = find_duplicates(
        [book("甲", ["", "第一章", "……", prose(1, 3_000)]), book("乙", ["", "第一章", prose(2, 300)])]
    )
    assert [(p.kind, p.first, p.second.chapter) for p in found.pairs] == [("exact", ("乙.txt", "乙", 2), 2)]
    assert find_duplicates([]).pairs == find_duplicates([book("空", []), book("白", [])]).pairs == []


def test_every_one_of_many_copies_is_found_with_one_pair_a_chapter() -> None:
    text = sample_text()
    copies = [
        pieces("".join(c if i % (60 + n) else "〇" for i, c in enumerate(text)), 2_500) for n in range(3 * PARTNERS)
    ]
    books = [book(f"本{i}", copy) for i, copy in enumerate(copies)]
    found = find_duplicates(books)
    assert len(set(found.editions)) == 1
    repeats = [pair.first for pair in found.pairs if pair.level == "chapter"]
    assert len(set(repeats)) == len(repeats) == sum(map(len, copies)) - len(copies[0])


def test_the_order_of_books_makes_no_difference() -> None:
    text = sample_text()
    books = [book(f"本{i}", pieces(text[i * 500 :], 2_000 + 300 * i)) for i in range(5)] + [
        book("别", [sample_text(1)])
    ]
    found = find_duplicates(books)
    assert (
        found.pairs
        == find_duplicates(books[::-1]).pairs
        == sorted(found.pairs, key=lambda p: (p.level != "book", p[2:4]))
    )
    assert [books[i].name for i in found.editions] == [
        books[::-1][i].name for i in reversed(find_duplicates(books[::-1]).editions)
    ]


def test_traditional_characters_make_no_difference() -> None:
    text = sample_text()
    traditional = opencc.OpenCC("s2t").convert(text)
    found = find_duplicates([book("简", [text]), book("繁", [traditional])])
    assert traditional != text and {pair.kind for pair in found.pairs} <= {"exact", "near"}
    assert min(pair.similarity for pair in found.pairs) > 0.97


@pytest.mark.skipif(not NOVELS.is_dir(), reason="no novels here")
def test_of_the_real_novels_only_editions_are_reported() -> None:
    paths = [path for path in sorted(NOVELS.glob("*.txt")) if ".from_" not in path.name]
    books = [book(path.name, pieces(decode_text(path.read_bytes(), path.name), 5_000)) for path in paths]
    found = find_duplicates(books)
    assert {
        (p.kind, p.first.book.split(".")[0], p.second.book.split(".")[0]) for p in found.pairs if p.level == "book"
    } == {
        ("near", "hongloumeng", "hongloumeng"),
        ("near", "sanguoyanyi", "sanguoyanyi"),
        ("contained", "hulanhezhuan", "xiaohong_quanji"),
    }
    across = {
        (p.first.book, p.second.book) for p in found.pairs if p.level == "chapter" and p.first.book != p.second.book
    }
    assert across == {(p.first.book, p.second.book) for p in found.pairs if p.level == "book"}
