"""Scores of short answers, for rows that ask for them: F1, exact match and multiple choice."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

_SILENT = re.compile(r"[\W_]+")
# "答案：B", "选 (C)", "B. 因为…", "应选Ａ": a letter with no other letter or digit beside it.
_CHOICE = re.compile(r"(?<![A-Z0-9])([A-Z])(?![A-Z0-9])")
_NAMED_CHOICE = re.compile(r"(?:答案|选择|选项|应选|应该选|选)(?:是|为|应为|应是)?[:\s(]*([A-Z])(?![A-Z0-9])")


def normalize_answer(text: str) -> str:
    """A text as answers are compared: in one width and case, without blanks and punctuation."""
    return _SILENT.sub("", unicodedata.normalize("NFKC", text).casefold())


def exact_match(prediction: str, answers: list[str]) -> float:
    """1.0 if the prediction equals one of the answers after `normalize_answer`, else 0.0."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def answer_f1(prediction: str, answers: list[str]) -> float:
    """F1 of the characters that prediction and answer share, by count; the best of the answers.

    SQuAD's F1 (arXiv:1606.05250) on characters, as Chinese words have no certain boundaries.
    """
    predicted = Counter(normalize_answer(prediction))
    best = 0.0
    for answer in answers:
        expected = Counter(normalize_answer(answer))
        total = predicted.total() + expected.total()
        best = max(best, 2 * (predicted & expected).total() / total if total else 1.0)
    return best


def choice_letter(text: str) -> str:
    """The letter that a text chooses, "" for none.

    The last one after "答案" or "选"; otherwise the first isolated letter.

    >>> choice_letter("A 不对，所以答案是（C）。")
    'C'
    """
    plain = unicodedata.normalize("NFKC", text).upper()
    found = _NAMED_CHOICE.findall(plain)[-1:] or _CHOICE.findall(plain)
    return str(found[0]) if found else ""


def choice_accuracy(prediction: str, answers: list[str]) -> float:
    """1.0 if the prediction chooses the letter of an answer, else 0.0."""
    letter = choice_letter(prediction)
    return float(bool(letter) and letter in {choice_letter(answer) for answer in answers})


ANSWER_SCORES: dict[str, Callable[[str, list[str]], float]] = {
    "exact_match": exact_match,
    "answer_f1_char": answer_f1,
    "choice_accuracy": choice_accuracy,
}
"""Scores that a row's field `metrics` can name."""

ANSWER_DEFINITIONS = {
    "exact_match": "share of predictions equal to a reference, ignoring width, case, blanks and punctuation; of the "
    "rows that ask for it",
    "answer_f1_char": "F1 of shared characters, ignoring punctuation, best of the references; of the rows that ask for "
    "it",
    "choice_accuracy": "share of predictions that choose the letter of the reference; of the rows that ask for it",
}
