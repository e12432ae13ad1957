"""rep-n is 1 - distinct n-grams / all n-grams, of characters."""

import random
from collections import Counter
from pathlib import Path

import pytest

from novelgpt.scoring.repetition import rep4_char, repetition

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
