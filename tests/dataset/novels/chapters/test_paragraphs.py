"""Hard-wrapped lines become the paragraphs they were; over-long ones are cut at sentence ends; nothing else changes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.novels.chapters.paragraphs import (
    LONGEST_PARAGRAPH,
    cut_at_sentence_ends,
    join_lines,
    parts_of_about,
    wrap_width,
)

CLAUSES = [
    "天色渐渐暗了下来",
    "他沿着河边慢慢地走",
    "心里想着白天的事",
    "远处的灯火一盏一盏地亮起来",
    "她没有回答",
    "雨停了",
]


def visible(texts: list[str]) -> str:
    return "".join("".join(texts).split())


def sentence(draw: random.Random) -> str:
    return "，".join(draw.choices(CLAUSES, k=draw.randint(1, 4))) + draw.choice("。。。！？")


def paragraph(draw: random.Random, per_line: int, indent: int) -> str:
    """One that does not end with a line that is full but for three characters: no reader could tell that it ends."""
    while True:
        text = "".join(sentence(draw) for _ in range(draw.randint(1, 8)))
        if draw.random() < 0.3:
            text = f"“{text}”"
        if 0 < (len(text) + indent) % per_line < per_line - 3:
            return text


def wrap(text: str, per_line: int, indent: str, margin: str = "") -> list[str]:
    """Lines of at most `per_line` characters, the first of them indented by two of these; `margin` before each."""
    first = per_line - 2 * bool(indent)
    rest = text[first:]
    return [
        margin + indent + text[:first],
        *(margin + rest[at : at + per_line] for at in range(0, len(rest), per_line)),
    ]


@pytest.mark.parametrize("per_line", [34, 38, 45])
@pytest.mark.parametrize(("indent", "margin"), [("　　", ""), ("    ", ""), ("", ""), ("　　", "    ")])
@pytest.mark.parametrize("double_spaced", [False, True])
def test_wrapped_paragraphs_come_back(per_line: int, indent: str, margin: str, double_spaced: bool) -> None:
    draw = random.Random(per_line)
    paragraphs = [paragraph(draw, per_line, 2 * bool(indent)) for _ in range(200)]
    lines = [line for one in paragraphs for line in wrap(one, per_line, indent, margin)]
    if double_spaced:
        lines = [text for line in lines for text in (line, "")]
    width = wrap_width(lines)
    assert width is not None
    assert join_lines(lines, width) == paragraphs


def test_blank_lines_end_paragraphs() -> None:
    full = "雪" * 36
    assert join_lines([full, full, "", full, "夜。"], 72) == [full * 2, full + "夜。"]


def test_a_sentence_goes_on_behind_the_end_of_a_page() -> None:
    full, comma = "雪" * 36, "雪" * 35 + "，"
    # The next line is no beginning of a paragraph, where these are indented; a comma ends none anywhere.
    assert join_lines(["　　" + "雪" * 34, full, "", full, "夜。"], 72) == ["雪" * 34 + full * 2 + "夜。"]
    assert join_lines([full, comma, "", "\f", full, "夜。"], 72) == [full + comma + full + "夜。"]
    # An indent, the end of a sentence, or a short line end a paragraph as before.
    assert join_lines(["　　" + "雪" * 34, comma, "", "　　夜。"], 72) == ["雪" * 34 + comma, "夜。"]
    ended = "雪" * 35 + "。"
    assert join_lines(["　　" + "雪" * 34, ended, "", full, "夜。"], 72) == ["雪" * 34 + ended, full + "夜。"]
    assert join_lines(["　　" + "雪" * 34, "短，", "", full, "夜。"], 72) == ["雪" * 34 + "短，", full + "夜。"]


def test_verse_sections_and_speech_are_not_glued() -> None:
    verse = ["    宋江重赏升官日，方腊当刑受剐时。", "    善恶到头终有报，只争来早与来迟！"]
    full = "雪" * 36
    short = ["他说道：", "“好。”", "一", "　　二"]
    assert join_lines([full, "夜。", *verse, *short, full, "三", full, "夜。"], 72) == [
        full + "夜。", *map(str.strip, verse), "他说道：", "“好。”", "一", "二", full, "三", full + "夜。",
    ]  # fmt: skip


def test_a_block_with_its_own_width_is_joined() -> None:
    block = ["　　　　" + "雪" * 24] * 4 + ["　　　　完了。"]
    full = "雪" * 36
    assert join_lines([full, "夜。", *block, "　　" + full[:34], "夜。"] * 3, 72) == [
        full + "夜。", "雪" * 96 + "完了。", full[:34] + "夜。",
    ] * 3  # fmt: skip


def test_words_of_ascii_letters_stay_apart() -> None:
    first = "雪" * 33 + "Hello"
    assert join_lines([first, "World" + "夜" * 10], 71) == [first + " World" + "夜" * 10]
    assert join_lines(["雪" * 34 + "1904", "年"], 72) == ["雪" * 34 + "1904年"]


@pytest.mark.parametrize(
    "lines",
    [
        ["　　" + "雪" * length + "。" for length in (5, 60, 12, 140, 33, 80, 7, 45, 36, 36, 36)],
        ["　　这是一句正好三十六个字的话这是一句正好三十六个字的话这是一句。"] * 30,
        ["　　无材可去补苍天，枉入红尘若许年。"] * 30,
        ["　　那边清溪唱着", "　　这边树叶绿了", "　　姑娘啊"] * 10,
        [],
    ],
)
def test_lines_that_are_paragraphs_stay(lines: list[str]) -> None:
    assert wrap_width(lines) is None
    assert join_lines(lines) == [line.strip() for line in lines]


def test_blanks_within_a_paragraph_are_left_alone() -> None:
    assert join_lines(["　　雪  夜\u3000归人  ", "", " \t", "x  y"]) == ["雪  夜\u3000归人", "x  y"]


def test_long_lines_are_cut_at_sentence_ends_outside_of_quotes() -> None:
    draw = random.Random(0)
    text = "".join(draw.choice(["{}", "“{}”"]).format(sentence(draw) + sentence(draw)) for _ in range(400))
    pieces = join_lines([text])
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(len(piece) <= 1_600 and piece.count("“") == piece.count("”") for piece in pieces)
    assert all(piece[-1] in "。！？”" for piece in pieces)


def test_a_long_speech_is_cut_inside_only_as_it_is_long() -> None:
    speech = "“" + "他沿着河边慢慢地走。" * 400 + "”"
    pieces = list(cut_at_sentence_ends(speech))
    assert "".join(pieces) == speech
    assert all(len(piece) >= 200 and piece[-1] in "。”" for piece in pieces)
    assert list(cut_at_sentence_ends("雪" * 5_000)) == ["雪" * 5_000]
    assert list(cut_at_sentence_ends("雪夜。" * 1_000)) == ["雪夜。" * 1_000] and LONGEST_PARAGRAPH == 3_000


def test_parts_are_even_and_whole() -> None:
    paragraphs = ["雪" * (100 + 37 * number % 400) for number in range(200)]
    parts = list(parts_of_about(paragraphs, 5_000))
    assert [one for part in parts for one in part] == paragraphs
    assert all(abs(sum(map(len, part)) - 5_000) < 600 for part in parts)
    assert list(parts_of_about([], 5_000)) == []
    assert list(parts_of_about(["雪"], 5_000)) == [["雪"]]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text(max_size=60)
        | st.sampled_from(["雪" * 36, "　　" + "雪" * 34, "", "夜。", "一", "　　　　" + "雪" * 24, "ab"])
    ),
    st.none() | st.integers(40, 100),
)
def test_no_character_is_lost_or_made_up(lines: list[str], width: int | None) -> None:
    paragraphs = join_lines(lines, width)
    assert visible(paragraphs) == visible(lines)
    assert all(one and one == one.strip() for one in paragraphs)
