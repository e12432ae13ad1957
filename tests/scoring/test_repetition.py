"""rep-n is 1 - distinct n-grams / all n-grams, of characters."""

import random
from collections import Counter
from pathlib import Path

import pytest

from novelgpt.scoring.repetition import (
    LONGEST_PERIOD,
    WINDOW,
    compression_ratio,
    distinct,
    first_loop,
    longest_repeat,
    rep4_char,
    repetition,
    sentences_seen_before,
    windowed_repetition,
    windows,
)

NOVEL = Path(__file__).resolve().parents[2] / "dataset" / "samples" / "novels" / "shan_zhong_yao_pu.txt"


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("春眠不觉晓，处处闻啼鸟。", 4, 0.0),  # 9 of 9 differ
        ("春眠不觉晓，处处闻啼鸟。", 1, 1 - 11 / 12),  # 处 comes twice
        ("的的的的的的的的", 4, 1 - 1 / 5),
        ("好了好了好了好了", 4, 1 - 2 / 5),  # 好了好了, 了好了好
        ("好了好了好了好了", 2, 1 - 2 / 7),
        ("山上有山，山上有山", 4, 1 - 5 / 6),  # 山上有山 comes twice
        ("一二三四", 4, 0.0),
        ("一二三", 4, 0.0),
        ("", 4, 0.0),
        ("雨。\n\n雨。\n\n", 2, 1 - 4 / 7),  # line feeds count
    ],
)
def test_repetition_of_known_texts(text: str, n: int, expected: float) -> None:
    assert repetition(text, n) == pytest.approx(expected, abs=1e-15)


def test_repetition_is_the_share_of_later_occurrences() -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("山水人家", k=draw.randint(0, 40)))
        n = draw.randint(1, 6)
        counts = Counter(zip(*(text[start:] for start in range(n)), strict=False))
        again = sum(count - 1 for count in counts.values())
        assert repetition(text, n) == pytest.approx(again / max(1, counts.total()))


def test_a_looping_text_repeats_itself_and_a_novel_hardly() -> None:
    novel = NOVEL.read_text(encoding="utf-8")
    assert repetition(novel[:400]) < 0.05
    assert repetition(novel[:20] * 20) == pytest.approx(1 - 20 / 397)


def test_rep4_char_is_the_mean_over_texts_not_over_n_grams() -> None:
    texts = ["的" * 8, "一二三四五六七八九十", "好了" * 4, ""]
    assert rep4_char(texts) == pytest.approx((4 / 5 + 0 + 3 / 5 + 0) / 4)
    assert rep4_char(texts[:1]) == repetition(texts[0])


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="no texts"):
        rep4_char([])
    with pytest.raises(ValueError, match="0-grams"):
        repetition("一", 0)


def looping_texts(count: int) -> list[str]:
    """Short texts of few characters, a third of them with a piece that stands several times in a row."""
    generator = random.Random(20240605)
    texts = []
    for number in range(count):
        letters = "一二" if number % 2 else "一二三四五六七八"
        text = "".join(generator.choices(letters, k=generator.randint(0, 60)))
        if number % 3 == 0:
            piece = "".join(generator.choices("一二三四五", k=generator.randint(1, 30)))
            text += piece * generator.randint(1, 6) + "".join(generator.choices("一二三", k=generator.randint(0, 20)))
        texts.append(text)
    return texts


def stands_twice(text: str, length: int) -> bool:
    pieces = [text[start : start + length] for start in range(len(text) - length + 1)]
    return len(set(pieces)) < len(pieces)


def test_longest_repeat_is_the_longest_substring_at_two_places() -> None:
    for text in looping_texts(600):
        expected = max((length for length in range(1, len(text)) if stands_twice(text, length)), default=0)
        assert longest_repeat(text) == expected, text


def begins_loop(text: str, start: int) -> bool:
    for period in range(1, (len(text) - start) // 3 + 1):
        length = max(50, 3 * period)
        piece = text[start : start + length]
        if len(piece) == length and piece[period:] == piece[:-period]:
            return True
    return False


def test_first_loop_is_the_first_place_where_one_begins() -> None:
    loops = 0
    for text in looping_texts(600):
        expected = next((start for start in range(len(text)) if begins_loop(text, start)), None)
        assert first_loop(text) == expected, text
        loops += expected is not None
    assert loops > 50


def test_first_loop_of_a_novel_that_gets_stuck() -> None:
    text = NOVEL.read_text(encoding="utf-8")[:3000]
    assert first_loop(text) is None
    paragraph = "门外的雨还在下，他望着灯，没有说话，过了很久才叹了一口气。"
    assert first_loop(text + paragraph * 2) is None
    assert first_loop(text + "◆" + paragraph * 3) == 3001
    period = "".join(chr(0x4E00 + number) for number in range(LONGEST_PERIOD))
    assert first_loop("序" + period * 3) == 1
    assert first_loop("序" + (period + "长") * 3) is None


def test_windows_are_of_one_length_and_cover_the_text() -> None:
    text = "".join(chr(0x4E00 + number) for number in range(3 * WINDOW + 700))
    for length in (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 700):
        pieces = windows(text[:length])
        assert {len(piece) for piece in pieces} == {min(length, WINDOW)}
        assert set("".join(pieces)) == set(text[:length])
        assert len(pieces) == max(1, -(-length // WINDOW))


def test_a_long_text_repeats_as_much_as_its_windows() -> None:
    text = NOVEL.read_text(encoding="utf-8")
    pieces = windows(text)
    assert len(pieces) > 2
    assert windowed_repetition(text, 4) == pytest.approx(sum(repetition(piece, 4) for piece in pieces) / len(pieces))
    assert windowed_repetition(text, 4) < repetition(text, 4)
    assert distinct(text, 2) == 1 - windowed_repetition(text, 2)
    assert distinct("一二一二", 2) == 2 / 3
    assert distinct("一", 2) == distinct("", 1) == 0.0


def test_sentences_seen_before() -> None:
    sentence = "他推开客栈的门走了进来"
    assert sentences_seen_before(f"{sentence}。雨下了一整夜没有停。{sentence}！") == pytest.approx(1 / 3)
    assert sentences_seen_before(f"{sentence}。“他推开客栈的门，走了进来。”") == pytest.approx(1 / 2)
    assert sentences_seen_before("他笑了。他笑了。他笑了。") == sentences_seen_before("") == 0.0


def test_a_loop_compresses_better() -> None:
    text = NOVEL.read_text(encoding="utf-8")[:2000]
    assert compression_ratio("") == 0.0
    assert 1.2 < compression_ratio(text) < 3
    assert compression_ratio(text[:100] * 20) > 5 * compression_ratio(text)
