"""Every score of a pair: by name, for any two texts, and blind to nothing that its name promises."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from novelgpt.scoring.rouge import character_rouge, score_texts
from novelgpt.scoring.text_scores import DEFINITIONS, repetition_scores, score_pair

NOVEL = Path(__file__).resolve().parents[2] / "dataset" / "samples" / "novels" / "deng_ta_xia_de_xin.txt"
SENTENCE = "民国十五年农历九月十七，程小满坐着一条装满咸鱼的木船，到了青螺岛。"
STRANGE = [
    "", " ", "\n\u3000\r\n", "好", "𠮷", "🙂👨‍👩‍👧", "ＡＢＣ１２３，。", "ﾊﾝｶｸ",
    "Hello, 世界! مرحبا ひらがな 한글", "\0\x1c\x85\u2028",
    "。。。。。。", "……", "\ud800", "啊" * 5000,
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "reference"), list(itertools.product(STRANGE, STRANGE)))
def test_any_two_texts_have_every_score(prediction: str, reference: str) -> None:
    scores = score_pair(prediction, reference)
    assert set(scores) | {"first_loop_char"} == set(DEFINITIONS)
    assert all(value >= 0 for value in scores.values())
    shares = set(scores) - {"prediction_characters", "reference_characters", "longest_repeat_char", "first_loop_char"}
    assert all(scores[name] <= 1 for name in shares - {"compression_ratio"})


def test_a_text_of_100000_characters() -> None:
    text = NOVEL.read_text(encoding="utf-8")
    long = (text * (100_000 // len(text) + 1))[:100_000]
    scores = score_pair(long, long[50_000:])
    assert scores["prediction_characters"] == 100_000 and scores["longest_repeat_char"] == 100_000 - len(text)


def test_a_sentence_said_ten_times_scores_full_marks_with_sets_alone() -> None:
    scores = score_pair(SENTENCE * 10, SENTENCE)
    assert scores["rouge-1"] > 0.99
    length = len(SENTENCE)
    assert scores["rouge1_char_count"] == scores["rougel_char"] == 2 * length / (11 * length)
    assert scores["looped"] == 1 and scores["first_loop_char"] == 0
    assert scores["rep4_char"] > 0.8 > score_pair(SENTENCE, SENTENCE)["rep4_char"]


def test_character_rouge_counts_each_character_as_often_as_both_have_it() -> None:
    generator = random.Random(20240607)
    text = NOVEL.read_text(encoding="utf-8")
    for _ in range(200):
        starts = [generator.randrange(len(text) - 100) for _ in range(2)]
        first, second = (text[start : start + generator.randint(0, 100)] for start in starts)
        sides = ["".join(side.split()) for side in (first, second)]
        scores = character_rouge(first, second)
        for order, name in ((1, "rouge1_char_count"), (2, "rouge2_char_count")):
            grams = [Counter(zip(*(side[at:] for at in range(order)), strict=False)) for side in sides]
            shared = sum((grams[0] & grams[1]).values())
            totals = [sum(side.values()) for side in grams]
            expected = 2 * shared / sum(totals) if all(totals) else 0.0
            assert scores[name] == pytest.approx(expected, abs=1e-15)
    assert character_rouge(SENTENCE, " " + SENTENCE + "\n") == dict.fromkeys(scores, 1.0)


def test_a_row_has_the_scores_of_its_parts() -> None:
    prediction, reference = SENTENCE, SENTENCE[5:] + "雨下了一夜。"
    scores = score_pair(prediction, reference)
    (rouge,) = score_texts([prediction], [reference])
    expected = {name: parts["f"] for name, parts in rouge.items()} | character_rouge(prediction, reference)
    assert scores.items() >= (expected | repetition_scores(prediction)).items()
