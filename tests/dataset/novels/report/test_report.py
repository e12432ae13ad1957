"""The page adds up, shows what the records say, and asks for nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.novels.records import BookRecord
from dataset.novels.report.charts import (
    BarSegment,
    LogScale,
    box_strip,
    close_scale,
    decades,
    histogram,
    quantile,
    shares,
    short_number,
    stacked_bar,
    tick_label,
)
from dataset.novels.report.report import (
    BOOK_ROWS,
    EXAMPLES,
    FATES,
    PAIR_ROWS,
    count_fates,
    visible,
    write_report,
)
from novelgpt.settings.html_pages import content_hash

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = '<script>alert(1)</script><img src="https://example.org/x.png">"\'&'
PAIRS = [
    {"kind": "near", "level": "chapter", "first": "甲#1.txt#3", "second": "乙.txt#4", "similarity": 0.912},
    {"kind": "near", "level": "chapter", "first": "甲#1.txt#5", "second": "乙.txt#5", "similarity": 0.85},
    {"kind": "contained", "level": "chapter", "first": "甲#1.txt#6", "second": "丙.txt#1", "similarity": 0.9998},
    {"kind": "exact", "level": "book", "first": "甲#1.txt", "second": HOSTILE, "similarity": 1.0},
]
EXAMPLE_ROWS = {
    "site_ad": [{"source": "甲.txt", "line": 12, "text": "ｗｗw．小·说．net　" + HOSTILE}] * 20,
    "never_counted": [{"source": "甲.txt", "line": 1, "text": "x"}],
}
OPTIONS = {"raw": "novels", "held_out": ["呐喊"], "seed": 42, "note": HOSTILE}


def records() -> list[BookRecord]:
    kept = BookRecord(
        name="红楼梦",
        source="古典/红楼梦.txt",
        encoding="gb18030",
        bad_bytes=[{"offset": 3544, "hex": "ff"}],
        bad_byte_count=1,
        characters_in=1_000_000,
        characters_kept=990_000,
        chapter_characters=[8_000] * 118 + [46_000, 200],
        removed={"site_ad": {"lines": 40, "characters": 9_000}, "front_matter": {"lines": 5, "characters": 1_000}},
        findings=["第十三回 is missing", "第二十回 stands twice " + HOSTILE],
        chinese_share=0.9,
        repetition=0.0123,
        script="simplified",
        duplicate_chapters=2,
        characters_out=974_000,
    )
    held_out = replace(
        kept,
        name="呐喊",
        source="呐喊.zip!a/b.txt",
        encoding="utf-8",
        split="held_out",
        characters_in=100_001,
        characters_kept=100_001,
        chapter_characters=[50_000, 50_001],
        removed={},
        findings=[],
        bad_bytes=[],
        bad_byte_count=0,
        duplicate_chapters=0,
        characters_out=100_001,
    )
    refused = BookRecord(
        name=HOSTILE, source=HOSTILE, characters_in=77, characters_kept=70, split="refused", refused="乱码 " + HOSTILE
    )
    return [kept, held_out, refused]


class Page(HTMLParser):
    """Elements, and the text of each cell of the legend."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write(path: Path, books: list[BookRecord] | None = None, **arguments: Any) -> str:
    given = {"pairs": PAIRS, "examples": EXAMPLE_ROWS, "options": OPTIONS} | arguments
    write_report(records() if books is None else books, **given, path=path)
    return path.read_text(encoding="utf-8")


def legend(text: str) -> list[tuple[int, float]]:
    """(characters, share in per cent) of each row of the legend, the total last."""
    table = re.search(r'<table class="legend">(.*?)</table>', text, re.DOTALL)
    assert table
    rows = re.findall(r'<td>([\d,]+)</td><td class="share">([\d.]+) %</td>', table[1])
    return [(int(count.replace(",", "")), float(share)) for count, share in rows]


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12))
def test_shares_shown_add_up_to_100_and_are_near_the_truth(values: list[int]) -> None:
    shown = [round(float(share) * 100) for share in shares(values)]
    assert sum(shown) == (10_000 if sum(values) else 0)
    for value, share in zip(values, shown, strict=True):
        assert abs(share - 10_000 * value / max(1, sum(values))) < 1


counts = st.integers(0, 10**7)


@given(st.lists(st.tuples(counts, counts, counts, st.sampled_from(["train", "held_out", "refused"])), max_size=6))
def test_every_character_of_every_book_is_in_one_part(rows: list[tuple[int, int, int, str]]) -> None:
    for out, repeated, removed, split in rows:
        book = BookRecord(
            "b",
            "b",
            characters_in=out + repeated + removed,
            characters_kept=out + repeated,
            characters_out=out,
            split=split,
        )
        fates = count_fates(book)
        assert sum(fates.values()) == book.characters_in
        if split != "refused":
            assert (fates[split], fates["duplicate"], fates["removed"]) == (out, repeated, removed)


def test_the_legend_equals_the_records(tmp_path: Path) -> None:
    books = records()
    *rows, total = legend(write(tmp_path / "report.html"))
    assert [count for count, _ in rows] == [sum(count_fates(book)[fate] for book in books) for fate in FATES]
    assert total == (sum(book.characters_in for book in books), 100.0)
    assert round(sum(share for _, share in rows), 6) == 100.0


def test_rules_add_up_to_what_was_removed(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html")
    found = re.findall(r'rule-count">([\d,]+) characters .*?rule-share">([\d.]+) %', text)
    assert sum(int(count.replace(",", "")) for count, _ in found) == 10_000
    assert sum(float(share) for _, share in found) == 100.0
    assert "by other changes" not in text
    # A change of script may change the number of characters: the page says so.
    changed = [replace(records()[0], characters_kept=989_990, characters_out=973_990)]
    assert "and 10 by other changes" in write(tmp_path / "report.html", changed)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "one.html") == write(tmp_path / "other.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "other.html"]


def test_nothing_from_the_texts_is_markup(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "report.html"))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object")]
    assert page.text.count("<script>alert(1)</script>") >= 6
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))


def test_the_page_lets_run_what_it_holds_and_no_more(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy[1].startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside and f"{tag}-src '{content_hash(inside[1])}'" in policy[1]


def test_a_large_collection_gives_a_page_that_opens(tmp_path: Path) -> None:
    base = records()[0]
    books = [replace(base, name=f"书{n}", source=f"{n}.txt", characters_in=1_000_000 + n) for n in range(10_000)]
    pairs = [PAIRS[0] | {"first": f"{n}.txt#1"} for n in range(5_000)]
    text = write(tmp_path / "report.html", books, pairs=pairs)
    assert len(text.encode()) < 4_000_000
    assert text.count('<td class="name"') == BOOK_ROWS
    assert "<b>书9999</b>" in text and "<b>书0</b>" not in text
    assert f"the {BOOK_ROWS} longest of 10,000" in text
    assert f"{PAIR_ROWS} of 5,000" in text
    assert sum(count for count, _ in legend(text)[:-1]) == sum(book.characters_in for book in books)


def test_an_empty_collection_has_a_page(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", [], pairs=[], examples={}, options={})
    assert [share for _, share in legend(text)] == [0.0] * 7


def test_files_that_are_no_texts_are_named(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", skipped=[("封面/" + HOSTILE + ".jpg", "no text: .jpg")])
    page = Page(text)
    assert "封面/" + HOSTILE + ".jpg" in page.text and "no text: .jpg" in page.text
    assert legend(text) == legend(write(tmp_path / "report.html"))


def test_pairs_of_books_come_first_and_those_of_chapters_are_counted(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html")
    table = text.split('<table class="pairs">')[1].split("</table>")[0]
    rows = [Page(row).text for row in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1])]
    assert rows == [
        f"bookexact甲#1.txt{HOSTILE}11.00",
        "chapternear甲#1.txt乙.txt20.85 – 0.91",
        "chaptercontained甲#1.txt丙.txt10.99",
    ]


def test_examples_are_capped_and_name_their_line(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html")
    assert text.count("甲.txt:12") == EXAMPLES


def test_what_has_no_shape_is_shown_as_its_code() -> None:
    assert visible("a\x00b\u202ec\ud800") == "a\\u{0}b\\u{202e}c\\u{d800}"
    assert visible("“第一回　甄士隐”") == "“第一回　甄士隐”"
    assert visible("字" * 300, 10) == "字" * 10 + " … (+290)"


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60))
def test_pictures_hold_every_value(values: list[int]) -> None:
    for scale in (decades(values), close_scale(values)):
        assert 0 < scale.low < scale.high
        assert all(0 <= scale.place(value) <= 100 for value in values)
    counted = re.findall(r"<title>[^<]*: ([\d,]+) chapters</title>", histogram(values, "lengths", "chapters"))
    assert sum(int(count.replace(",", "")) for count in counted) == len(values)
    assert "median" in box_strip(values, close_scale(values), "lengths")
    ordered = sorted(values)
    assert quantile(ordered, 0) == ordered[0] and quantile(ordered, 1) == ordered[-1]


def test_a_scale_gives_each_decade_the_same_width() -> None:
    assert [LogScale(1, 1000).place(value) for value in (0, 1, 10, 100, 1000, 10**6)] == pytest.approx(
        [0, 0, 100 / 3, 200 / 3, 100, 100]
    )


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_a_bar_is_filled_in_proportion(values: list[int]) -> None:
    bar = stacked_bar([BarSegment(str(place), value, "train") for place, value in enumerate(values)], "a bar")
    widths = [float(width) for width in re.findall(r' width="([\d.]+)%" height="10"><title', bar)]
    expected = [100 * value / sum(values) for value in values if value]
    assert widths == pytest.approx(expected, abs=0.001)


def test_numbers_are_short_and_not_rounded_to_another_size() -> None:
    assert [
        short_number(value).replace("\xa0", " ") for value in (0, 941, 999.4, 999.5, 12_345, 999_949, 7_402_113)
    ] == [
        "0",
        "941",
        "999",
        "1.00 k",
        "12.3 k",
        "1.00 M",
        "7.40 M",
    ]
    assert [tick_label(value).replace("\xa0", " ") for value in (1, 200, 5_000, 10**9)] == ["1", "200", "5 k", "1 G"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    write(path)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [svg.bounding_box() for svg in page.query_selector_all("svg")]
    assert len(boxes) > 10
    assert all(box and box["width"] > 0 and box["height"] > 0 for box in boxes)
    shown = page.inner_text("body")
    for label in ("小说数据报告", "章节长度", "每个字的去向", "中位数", "按规则删除", "拒收的书", "第十三回"):
        assert label in shown
    names = "[...document.querySelectorAll('.books tbody b')].map(each => each.textContent)"
    if width > 820:
        page.click(".books th:nth-child(5) button")
        assert page.evaluate(names)[:2] == ["红楼梦", "呐喊"]
        page.click(".books th:nth-child(5) button")
        assert page.evaluate(names)[1:] == ["呐喊", "红楼梦"]
    page.close()
    assert messages == []
    assert requests == [path.as_uri()]
