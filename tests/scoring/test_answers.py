"""Scores of short answers."""

import pytest

from novelgpt.scoring.answers import answer_f1, choice_accuracy, choice_letter, exact_match


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("青螺岛", ["青螺岛"], 1.0),
        ("“青螺岛”。", ["青螺岛"], 1.0),
        ("ＧＰＴ－４", ["gpt-4"], 1.0),
        ("在青螺岛", ["青螺岛"], 0.0),
        ("灯塔", ["青螺岛", "灯塔"], 1.0),
        ("", ["青螺岛"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("青螺岛", ["青螺岛"], 1.0),
        ("在青螺岛上", ["青螺岛"], 2 * 3 / 8),
        ("岛岛岛", ["岛"], 2 * 1 / 4),
        ("在青螺岛上", ["灯塔", "青螺岛"], 2 * 3 / 8),
        ("", ["岛"], 0.0),
        ("。", ["，"], 1.0),
    ],
)
def test_answer_f1_counts_each_character_as_often_as_both_have_it(
    prediction: str, answers: list[str], expected: float
) -> None:
    assert answer_f1(prediction, answers) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("答案：C", "C"),
        ("（Ｄ）", "D"),
        ("A 不对，所以答案是（C）。", "C"),
        ("应选B，因为A不成立", "B"),
        ("B. 灯塔", "B"),
        ("b", "B"),
        ("ABC 公司", ""),
        ("不知道", ""),
        ("", ""),
    ],
)
def test_choice_letter(text: str, letter: str) -> None:
    assert choice_letter(text) == letter
    assert choice_accuracy(text, [letter]) == float(bool(letter))
    assert choice_accuracy(text, ["Z"]) == 0.0
