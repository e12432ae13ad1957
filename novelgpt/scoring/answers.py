"""Scores of short answers, for rows that ask for them: F1, exact match, and the letter of a choice."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

_SILENT = re.compile(r"[\W_]+")
# "答案：B", "选 (C)", "B. 因为…", "应选Ａ": a letter that no other letter or digit touches.
_CHOICE = re.compile(r"(?<![A-Z0-9])([A-Z])(?![A-Z0-9])")
_NAMED_CHOICE = re.compile(r"(?:答案|选择|选项|应选|应该选|选)(?:是|为|应为|应是)?[:\s(]*([A-Z])(?![A-Z0-9])")


def normalize_answer(text: str) -> str:
    """A text in the form in which answers are compared: one width and one case, without blanks and punctuation."""
    return _SILENT.sub("", unicodedata.normalize("NFKC", text).casefold())


def exact_match(prediction: str, answers: list[str]) -> float:
    """1.0 if the prediction is one of the answers, width, case, blanks and punctuation aside; else 0.0."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def answer_f1(prediction: str, answers: list[str]) -> float:
    """F1 of the characters that prediction and answer share, each as often as in both; the best of the answers.

    After SQuAD's F1 (arXiv:1606.05250), on characters instead of words, of which Chinese has no certain ones.
    """
    predicted = Counter(normalize_answer(prediction))
    best = 0.0
    for answer in answers:
        expected = Counter(normalize_answer(answer))
        total = predicted.total() + expected.total()
        best = max(best, 2 * (predicted & expected).total() / total if total else 1.0)
    return best


def choice_letter(text: str) -> str:
    """The letter that a text chooses, "" where it chooses none.

    The last one that "答案" or "选" introduces; without one, the first letter that stands alone.

    >>> choice_letter("A 不对，所以答案是（C）。")
    'C'
    """
    plain = unicodedata.normalize("NFKC", text).upper()
    named = _NAMED_CHOICE.findall(plain)
    if named:
        return str(named[-1])
    alone = _CHOICE.search(plain)
    return alone[1] if alone else ""


def choice_accuracy(prediction: str, answers: list[str]) -> float:
    """1.0 if the prediction chooses the letter that an answer names, else 0.0."""
    letter = choice_letter(prediction)
    return float(bool(letter) and letter in {choice_letter(answer) for answer in answers})


ANSWER_SCORES: dict[str, Callable[[str, list[str]], float]] = {
    "exact_match": exact_match,
    "answer_f1_char": answer_f1,
    "choice_accuracy": choice_accuracy,
}
"""What a row's field `metrics` may ask for."""

ANSWER_DEFINITIONS = {
    "exact_match": "share of predictions equal to a reference, width, case, blanks and punctuation aside; of the rows "
    "that ask for it",
    "answer_f1_char": "F1 of shared characters, punctuation aside, best of the references; of the rows that ask for it",
    "choice_accuracy": "share of predictions that choose the letter of the reference; of the rows that ask for it",
}
