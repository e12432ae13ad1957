"""Scores of the whole: exact means, intervals that cover the truth as often as they say, tests that see differences."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import rouge_chinese
from sacrebleu.metrics import BLEU

from novelgpt.scoring.row_scores import RowScores, ScoredRow, score_row, score_rows
from novelgpt.scoring.segmentation import segment
from novelgpt.scoring.summary import compare_rows, definitions, summarise_rows

NOVEL = Path(__file__).resolve().parents[2] / "dataset" / "samples" / "novels" / "deng_ta_xia_de_xin.txt"


def rows(count: int, length: int = 120) -> list[ScoredRow]:
    text = NOVEL.read_text(encoding="utf-8")
    generator = random.Random(20240609)
    drawn = []
    for _ in range(count):
        first, second = (generator.randrange(len(text) - length) for _ in range(2))
        shared = generator.randrange(length)
        reference = text[first : first + length]
        drawn.append(ScoredRow(reference[:shared] + text[second : second + length - shared], reference))
    return drawn


def test_means_are_those_of_rouge_chinese_and_of_sacrebleu() -> None:
    pairs = rows(60)
    means, _ = summarise_rows(list(score_rows(pairs)))
    cut = [[segment(text) for text in side] for side in zip(*((r.prediction, r.reference) for r in pairs), strict=True)]
    package = rouge_chinese.Rouge().get_scores(*cut, avg=True)
    assert {name: means[name] for name in package} == {name: value["f"] for name, value in package.items()}
    bleu = BLEU(tokenize="zh")
    assert means["sacrebleu"] == bleu.corpus_score([r.prediction for r in pairs], [[r.reference for r in pairs]]).score
    assert str(bleu.get_signature()) in definitions()["sacrebleu"]
    assert set(means) <= set(definitions())


@pytest.mark.slow
def test_several_processes_score_as_one_does(few_or_all: Callable[[int, int], int]) -> None:
    pairs = rows(few_or_all(150, 400), length=200)
    pairs[5] = ScoredRow("", "")
    assert list(score_rows(iter(pairs), workers=2)) == [score_row(pair) for pair in pairs] == list(score_rows(pairs))
    assert list(score_rows([])) == []


def test_sums_of_the_model_are_weighted_by_tokens_not_by_rows() -> None:
    names = ("reference_nats", "reference_tokens", "reference_tokens_right", "reference_characters", "loss")
    scored: list[RowScores] = [
        dict(zip(names, values, strict=True)) for values in ((10.0, 5, 1, 8, 2.0), (90.0, 95, 59, 92, 0.9))
    ]
    scored.append({"reference_characters": 1000})  # which the model has not seen
    means, intervals = summarise_rows(scored)
    assert means["loss"] == 1.0 and means["perplexity"] == math.e and means["token_accuracy"] == 0.6
    assert means["bits_per_character"] == pytest.approx(1 / math.log(2))
    assert 0.9 < intervals["loss"][1] <= 2.0


def test_rows_that_lack_a_score_are_left_out_of_its_mean() -> None:
    scored: list[RowScores] = [{"id": "a", "looped": 0.0}, {"id": "b", "looped": 1.0, "first_loop_char": 30}]
    means, intervals = summarise_rows(scored)
    assert means == {"looped": 0.5, "first_loop_char": 30.0}
    assert intervals["first_loop_char"] == [30.0, 30.0]
    with pytest.raises(ValueError, match="no rows"):
        summarise_rows([])


def test_intervals_cover_the_truth_in_about_95_of_100_samples() -> None:
    generator = numpy.random.default_rng(5)
    covered = 0
    for sample in range(100):
        values = generator.exponential(size=60)
        _, intervals = summarise_rows([{"score": float(value)} for value in values], seed=sample)
        covered += intervals["score"][0] <= 1.0 <= intervals["score"][1]
    assert 86 <= covered <= 99  # 95 expected, a little less as 60 values are few


@pytest.mark.slow
def test_a_paired_test_finds_a_small_steady_difference_and_no_difference_in_noise(
    few_or_all: Callable[[int, int], int],
) -> None:
    generator = numpy.random.default_rng(6)
    base = generator.normal(0.5, 0.2, size=100)
    first: list[RowScores] = [{"score": float(value)} for value in base]
    better: list[RowScores] = [{"score": float(value + 0.02 + noise)} for value, noise in
                               zip(base, generator.normal(0, 0.02, 100), strict=True)]  # fmt: skip
    (found,) = compare_rows(first, better)
    assert found.second - found.first == pytest.approx(0.02, abs=0.01)
    assert 0 < found.low < found.second - found.first < found.high and found.p_value < 0.001
    (same,) = compare_rows(first, first)
    assert (same.low, same.high, same.p_value) == (0.0, 0.0, 1.0)
    by_chance = 0
    for seed in range(few_or_all(40, 100)):
        noise = numpy.random.default_rng(seed).normal(0, 0.05, 40)
        (drawn,) = compare_rows([{"score": 0.5}] * 40, [{"score": 0.5 + float(value)} for value in noise], seed)
        by_chance += drawn.p_value < 0.05
    assert by_chance <= few_or_all(6, 12)  # 2 and 5 expected
    with pytest.raises(ValueError, match="same rows"):
        compare_rows(first, first[1:])


def test_a_row_may_ask_for_scores_of_answers() -> None:
    scores = score_row(ScoredRow("答案是B", "A", ("choice_accuracy", "exact_match"), ("B",)))
    assert (scores["choice_accuracy"], scores["exact_match"]) == (1.0, 0.0)
    assert "answer_f1_char" not in scores


def test_a_row_without_reference_has_the_scores_that_need_none() -> None:
    scores = score_row(ScoredRow("好" * 100, ""))
    assert scores["looped"] == 1.0 and "rouge-1" not in scores
