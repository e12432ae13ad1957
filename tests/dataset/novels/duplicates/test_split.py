"""No chapter of a held-out book reaches training, in whatever shape; each text is kept once; draws are stable."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import opencc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.decode import decode_text
from dataset.novels.duplicates.near_duplicates import BookPrints, find_duplicates
from dataset.novels.duplicates.shingles import fingerprint
from dataset.novels.duplicates.split import Decision, Split, assign_splits, decide
from novelgpt.settings.errors import UserError

ROOT = Path(__file__).parents[4]
SAMPLES = sorted((ROOT / "dataset" / "samples" / "novels").glob("*.txt"))
NOVELS = ROOT.parent / "shared" / "data" / "novels"
FREQUENT = [chr(point) for point in range(0x4E00, 0x5600)]
ADS = "天才一秒记住本站地址，手机用户请浏览阅读，最新章节全文免费，更优质的阅读体验。"


def prose(seed: int, length: int) -> str:
    drawn = random.Random(seed)
    return "".join(drawn.choice(FREQUENT) + ("，" if drawn.random() < 0.1 else "") for _ in range(length))


def pieces(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


def book(name: str, chapters: list[str], source: str = "") -> BookPrints:
    return BookPrints(name, source or f"{name}.txt", fingerprint(chapters))


def split(books: list[BookPrints], *names: str, share: float = 0.0, seed: int = 0) -> list[Split]:
    return assign_splits(books, find_duplicates(books), names, share, seed)


def decide_all(books: list[BookPrints], splits: list[Split]) -> list[list[Decision]]:
    return decide(books, find_duplicates(books), splits)


def fates(decisions: list[Decision]) -> set[tuple[str, str]]:
    return {(decision.fate, decision.reason) for decision in decisions}


def held_out_chapters() -> list[str]:
    return pieces(SAMPLES[0].read_text(encoding="utf-8"), 2_000)


def traditional(chapters: list[str]) -> list[str]:
    return list(map(opencc.OpenCC("s2t").convert, chapters))


def other_borders(chapters: list[str]) -> list[str]:
    return [chapters[0][:700], *pieces("".join(chapters)[700:], 1_600)]


def halves(chapters: list[str]) -> list[str]:
    return [half for chapter in chapters for half in (chapter[: len(chapter) // 2], chapter[len(chapter) // 2 :])]


def merged(chapters: list[str]) -> list[str]:
    return ["\n".join(pair) for pair in pairwise([*chapters, ""])][::2]


def with_ads(chapters: list[str]) -> list[str]:
    return [ADS.join(pieces(chapter, 300)) + ADS for chapter in chapters]


def changed(chapters: list[str]) -> list[str]:
    drawn = random.Random(7)
    return ["".join(drawn.choice(FREQUENT) if drawn.random() < 0.05 else c for c in chapter) for chapter in chapters]


def everything(chapters: list[str]) -> list[str]:
    return traditional(with_ads(changed(other_borders(chapters))))


def unchanged(chapters: list[str]) -> list[str]:
    return chapters


SHAPES = [unchanged, traditional, other_borders, halves, merged, with_ads, changed, everything]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["sample", "short_chapters"])
def test_a_held_out_chapter_never_reaches_training(shape: Callable[[list[str]], list[str]], text: str) -> None:
    held_out = held_out_chapters() if text == "sample" else [prose(i, 800) for i in range(20)]
    own = pieces(SAMPLES[1].read_text(encoding="utf-8"), 2_000)
    copied = shape(held_out)
    for surplus in ([], [prose(100 + i, 9_000) for i in range(8)]):
        books = [book("藏", held_out), book("练", [*own[:3], *copied, *own[3:], *surplus]), book("抄", copied)]
        of_held, of_training, of_copy = decide_all(books, ["held_out", "train", "train"])
        assert fates(of_copy) == fates(of_training[3 : 3 + len(copied)]) == {("left_out", "leak")}
        assert fates(of_training[:3]) == fates(of_training[3 + len(copied) :]) == {("train", "")}
        assert fates(of_held) == {("held_out", "")}
        assert {decision.other.book for decision in of_copy if decision.other} == {"藏"}


def test_a_book_may_quote_itself_but_not_hold_a_chapter_twice() -> None:
    last = prose(1, 900)
    chapters = [prose(2, 3_000) + last + prose(3, 3_000), prose(4, 4_000), prose(5, 4_000), prose(5, 4_000), last]
    (decisions,) = decide_all([book("书", chapters)], ["train"])
    assert [decision.reason for decision in decisions] == ["", "", "", "exact", ""]


@pytest.mark.parametrize("length", [300, 500, 1_000])
def test_a_short_held_out_chapter_inside_a_long_one(length: int) -> None:
    short = [prose(i, length) for i in range(30)]
    long = [prose(100 + i, 6_000) + changed([chapter])[0] + prose(200 + i, 6_000) for i, chapter in enumerate(short)]
    _, of_training = decide_all([book("藏", short), book("练", [*long, prose(999, 8_000)])], ["held_out", "train"])
    assert fates(of_training[:-1]) == {("left_out", "leak")} and fates(of_training[-1:]) == {("train", "")}


def test_many_copies_hide_nothing() -> None:
    """A text that half of the collection has is not taken for a common phrase."""
    chapters = held_out_chapters()
    books = [book(f"本{i}", changed(chapters[i % 3 :])) for i in range(12)] + [book("藏", chapters)]
    *of_copies, of_held = decide_all(books, ["train"] * 12 + ["held_out"])
    assert all(fates(decisions) == {("left_out", "leak")} for decisions in of_copies)
    assert fates(of_held) == {("held_out", "")}


def test_the_longest_edition_is_kept_whole_and_of_the_others_what_it_lacks() -> None:
    chapters = [prose(i, 2_000) for i in range(10)]
    short = [*changed(chapters[2:7]), prose(50, 2_000)]
    books = [book("短", short, "a.txt"), book("长", chapters, "b.txt"), book("别", [prose(60, 4_000)], "c.txt")]
    of_short, of_long, of_other = decide_all(books, ["train"] * 3)
    assert fates(of_long) == fates(of_other) == fates(of_short[5:]) == {("train", "")}
    assert all(decision.fate == "left_out" for decision in of_short[:5])
    assert [decision.other.chapter for decision in of_short[:5] if decision.other] == [3, 4, 5, 6, 7]
    assert {decision.other.source for decision in of_short[:5] if decision.other} == {"b.txt"}


def test_what_stands_only_in_a_chapter_that_is_left_out_is_kept() -> None:
    long, own = prose(1, 9_000), prose(2, 1_200)
    books = [book("长", [long, prose(3, 9_000)]), book("中", [long[:8_400] + own]), book("短", [own])]
    of_long, of_middle, of_short = decide_all(books, ["train"] * 3)
    assert fates(of_middle) == {("left_out", "contained")}
    assert fates(of_long) == fates(of_short) == {("train", "")}


def test_repeats_among_held_out_chapters_are_dropped() -> None:
    chapters = [prose(i, 2_000) for i in range(4)]
    books = [
        book("全", [*chapters, prose(9, 2_000)]),
        book("半", [*chapters, chapters[0]]),
        book("练", [prose(8, 2_000)]),
    ]
    of_long, of_short, of_training = decide_all(books, ["held_out", "held_out", "train"])
    assert fates(of_long) == {("held_out", "")} and fates(of_short) == {("left_out", "exact")}
    assert fates(of_training) == {("train", "")}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_is_left_out_is_kept_elsewhere_in_any_order(data: st.DataObject) -> None:
    """The other chapter of a repeat is itself kept, in the same split; of a leak it is held out. Nothing is twice."""
    stories = [prose(i, 700) for i in range(6)]
    variants = stories + changed(stories) + traditional(stories) + merged(stories) + ["", "第一章"]
    chapters = st.lists(st.sampled_from(variants), max_size=6)
    books = [book(f"书{i}", data.draw(chapters)) for i in range(data.draw(st.integers(1, 5)))]
    splits: list[Split] = data.draw(
        st.lists(st.sampled_from(["train", "held_out"]), min_size=len(books), max_size=len(books))
    )
    decisions = decide_all(books, splits)
    by_place = {(b.source, n): d for b, ds in zip(books, decisions, strict=True) for n, d in enumerate(ds, start=1)}
    assert [len(ds) for ds in decisions] == [len(b.prints) for b in books]
    split_of = {b.source: s for b, s in zip(books, splits, strict=True)}
    for (source, _), decision in by_place.items():
        if decision.fate != "left_out":
            assert decision == (split_of[source], "", None, 0.0)
            continue
        assert decision.other is not None and 0 < decision.similarity <= 1
        other = by_place[decision.other.source, decision.other.chapter]
        if decision.reason == "leak":
            assert (split_of[source], split_of[decision.other.source]) == ("train", "held_out")
        else:
            assert other.fate == split_of[source]
    for fate in ("train", "held_out"):
        kept = [i for i, d in enumerate(sum(decisions, [])) if d.fate == fate]
        digests = [bytes(row) for b in books for row in b.prints.digests]
        full = [i for i in kept if sum((b.prints.characters.tolist() for b in books), [])[i]]
        assert len({digests[i] for i in full}) == len(full)
    shuffled = data.draw(st.permutations(range(len(books))))
    again = decide_all([books[i] for i in shuffled], [splits[i] for i in shuffled])
    assert again == [decisions[i] for i in shuffled]


def shelf(count: int) -> list[BookPrints]:
    return [book(f"书{i}", [prose(i, 400)], f"架/{i % 3}/书{i}.txt") for i in range(count)]


@pytest.mark.parametrize("name", ["书2", "架/2/书2.txt", "书[2]", "架/*/书2.*", "*2"])
def test_books_are_held_out_by_name_source_or_pattern(name: str) -> None:
    assert split(shelf(6), name) == ["train", "train", "held_out", "train", "train", "train"]


def test_names_that_fit_nothing_or_everything_are_refused() -> None:
    with pytest.raises(UserError, match="书22.*nearest is '书2'"):
        split(shelf(6), "书22")
    with pytest.raises(UserError, match="all books"):
        split(shelf(6), "书*")
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="share"):
            split(shelf(2), share=share)


def test_editions_are_held_out_together_and_collections_by_chapter() -> None:
    novel, other = [prose(i, 2_000) for i in range(8)], [prose(50 + i, 2_000) for i in range(12)]
    books = [
        book("甲本", novel),
        book("乙本", changed(novel[1:])),
        book("全集", other + novel),
        book("别", [prose(90, 999)]),
    ]
    splits = split(books, "乙本")
    assert splits == ["held_out", "held_out", "train", "train"]
    of_collection = decide_all(books, splits)[2]
    assert fates(of_collection[:12]) == {("train", "")} and fates(of_collection[12:]) == {("left_out", "leak")}


def test_a_draw_does_not_depend_on_the_other_books() -> None:
    books = shelf(40)
    drawn = split(books, share=0.2)
    assert 0 < drawn.count("held_out") < 20
    first = drawn.index("held_out")
    assert split(books[first : first + 15], share=0.2) == drawn[first : first + 15]
    assert split(books[::-1], share=0.2) == drawn[::-1]
    assert split(books, share=0.2, seed=1) != drawn
    assert all(
        more >= less
        for less, more in zip(*([s == "held_out" for s in split(books, share=x)] for x in (0.2, 0.5)), strict=True)
    )


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("share", [1e-9, 0.5, 0.999999])
def test_a_share_holds_out_at_least_one_book_and_leaves_one(count: int, share: float) -> None:
    for seed in range(5):
        assert set(split(shelf(count), share=share, seed=seed)) == {"train", "held_out"}
    assert split(shelf(1), share=share) == ["train"]
    assert split(shelf(count)) == ["train"] * count


@pytest.mark.skipif(not NOVELS.is_dir(), reason="no novels here")
@pytest.mark.parametrize("name", ["hongloumeng.arabic*", "sanguoyanyi.*.gbk*", "hulanhezhuan*", "xiaohong*"])
def test_real_editions_never_cross(name: str) -> None:
    paths = [path for path in sorted(NOVELS.glob("*.txt")) if ".from_" not in path.name]
    stem = name.split(".")[0].rstrip("*")[:8]
    twins = {"hulanhez": "xiaohong", "xiaohong": "hulanhez"}
    paths = [p for p in paths if p.name[:8] in (stem, twins.get(stem), "shuihuzh", "nahan.gu")]
    texts = {path.name: pieces(decode_text(path.read_bytes(), path.name), 5_000) for path in paths}
    books = [book(path, chapters) for path, chapters in texts.items()]
    splits = split(books, name)
    decisions = decide_all(books, splits)
    for entry, decided in zip(books, decisions, strict=True):
        kept = sum(decision.fate == "train" for decision in decided)
        if entry.name[:8] in ("shuihuzh", "nahan.gu"):
            assert kept == len(decided)
        elif entry.name.startswith("xiaohong") and stem == "hulanhez":
            assert kept == pytest.approx(0.58 * len(decided), abs=2)
        else:
            assert kept <= 1, entry.name  # a site's own words around the book
