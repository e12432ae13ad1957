"""Our BLEU == nltk's sentence_bleu with method3, to the last bit."""

import random
from collections.abc import Callable
from pathlib import Path

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from novelgpt.scoring.bleu import bleu4, bleu4_char, bleu4_word, bleu_words

NOVEL = Path(__file__).resolve().parents[2] / "dataset" / "samples" / "novels" / "deng_ta_xia_de_xin.txt"
METHOD3 = SmoothingFunction().method3


def pairs(count: int) -> list[tuple[str, str]]:
    """Snippets of 0 to 400 characters, of which the second shares a part with the first."""
    text = NOVEL.read_text(encoding="utf-8")
    generator = random.Random(20240606)
    drawn = []
    for _ in range(count):
        lengths = [generator.choice([0, 1, 2, 3, 4, 5, 10, 60, 400]) for _ in range(2)]
        first, second = (generator.randrange(len(text) - 400) for _ in range(2))
        prediction = text[first : first + lengths[0]]
        shared = generator.randint(0, lengths[0])
        drawn.append((prediction, prediction[:shared] + text[second : second + lengths[1]]))
    return drawn


def test_bleu_of_characters_and_of_words_is_that_of_nltk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_or_all: Callable[[int, int], int]
) -> None:
    monkeypatch.setattr(jieba.dt, "tmp_dir", str(tmp_path))
    scores = set()
    for prediction, reference in pairs(few_or_all(700, 2000)):
        characters = sentence_bleu([list(reference)], list(prediction), smoothing_function=METHOD3)
        assert bleu4_char(prediction, reference) == characters, (prediction, reference)
        assert bleu4(list(prediction), list(reference)) == characters
        cut = [[word.strip(" ") for word in jieba.cut(text)] for text in (prediction, reference)]
        cut = [[word for word in side if word] for side in cut]
        assert [bleu_words(prediction), bleu_words(reference)] == cut
        assert bleu4_word(prediction, reference) == sentence_bleu([cut[1]], cut[0], smoothing_function=METHOD3)
        scores.add(characters)
    assert len(scores) > few_or_all(200, 500) and 0 in scores and max(scores) == 1.0


def test_a_short_text_is_not_smoothed_to_nothing() -> None:
    assert bleu4_char("你好吗", "你好吗") == pytest.approx(0.5**0.25)  # no 4-gram: 1 / (2 * 1)
    assert bleu4_char("好", "坏") == bleu4_char("", "好") == bleu4_char("好", "") == bleu4_char("", "") == 0.0
