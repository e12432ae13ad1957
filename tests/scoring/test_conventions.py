"""Other tools' figures, each against a plain restatement of the tool's recipe with the packages it calls."""

import random
import sys
from pathlib import Path
from typing import Any

import jieba
import numpy
import pytest
import rouge_chinese
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from novelgpt.scoring.conventions import llamafactory, opencompass, swift

NOVEL = Path(__file__).resolve().parents[2] / "dataset" / "samples" / "novels" / "deng_ta_xia_de_xin.txt"
METHOD3 = SmoothingFunction().method3
HARD = [
    "",
    " ",
    "。",
    ".",
    "...",
    "好",
    "3.14 与 2.71。",
    "他说：a.b.c",
    "\n\n",
    "甲. 乙. 丙.",
    "The cat, an owl.",
    "，，，",
]


@pytest.fixture(autouse=True)
def private_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jieba.dt, "tmp_dir", str(tmp_path))  # else the oracle writes into the shared one


def pairs(count: int = 300) -> tuple[list[str], list[str]]:
    text = NOVEL.read_text(encoding="utf-8").replace("，", ". ", 400)
    generator = random.Random(20240608)
    predictions, references = [], []
    for _ in range(count):
        length = generator.choice([1, 5, 30, 150])
        first, second = (generator.randrange(len(text) - 300) for _ in range(2))
        predictions.append(text[first : first + length])
        references.append(text[first : first + length // 2] + text[second : second + length // 2])
    for first_hard in HARD:
        for second_hard in HARD:
            predictions.append(first_hard)
            references.append(second_hard)
    return predictions, references


def test_llamafactory() -> None:
    predictions, references = pairs()
    scores: dict[str, list[float]] = {name: [] for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4")}
    for prediction, reference in zip(predictions, references, strict=True):
        cut = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
        found = {name: {"f": 0.0} for name in ("rouge-1", "rouge-2", "rouge-l")}
        if all(side.split() for side in cut):
            found = rouge_chinese.Rouge().get_scores(*cut)[0]
        for name, value in found.items():
            scores[name].append(round(value["f"] * 100, 4))
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=METHOD3)
        scores["bleu-4"].append(round(bleu * 100, 4))
    assert llamafactory(predictions, references) == {name: float(numpy.mean(value)) for name, value in scores.items()}


def longest_common_words(x: list[str], y: list[str]) -> set[str]:
    """As the `rouge` package walks its table back: recursively, a match first, the shorter y where both are equal."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            best = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = table[i - 1][j - 1] + 1 if x[i - 1] == y[j - 1] else best

    def walk(i: int, j: int) -> list[str]:
        if i == 0 or j == 0:
            return []
        if x[i - 1] == y[j - 1]:
            return [*walk(i - 1, j - 1), x[i - 1]]
        return walk(i - 1, j) if table[i - 1][j] > table[i][j - 1] else walk(i, j - 1)

    return set(walk(len(x), len(y)))


def rouge_package(prediction: str, reference: str) -> dict[str, float]:
    """rouge 1.0.1's F of rouge-1, rouge-2 and rouge-l, whose union of subsequences goes over all pairs of sentences."""
    hyp, ref = (
        [" ".join(sentence.split()) for sentence in text.split(".") if len(sentence) > 0]
        for text in (prediction, reference)
    )
    words = [[word for sentence in side for word in sentence.split(" ")] for side in (hyp, ref)]

    def f(overlap: int, evaluated: int, expected: int) -> float:
        p = overlap / evaluated if evaluated else 0.0
        r = overlap / expected if expected else 0.0
        return 2.0 * ((p * r) / (p + r + 1e-8))

    scores: dict[str, float] = {}
    for n, name in ((1, "rouge-1"), (2, "rouge-2")):
        grams: list[set[Any]] = [{tuple(side[i : i + n]) for i in range(len(side) - n + 1)} for side in words]
        scores[name] = f(len(grams[0] & grams[1]), len(grams[0]), len(grams[1]))
    union: set[str] = set()
    for r in ref:
        for h in hyp:
            union |= longest_common_words(r.split(" "), h.split(" "))
    scores["rouge-l"] = f(len(union), len(set(words[0])), len(set(words[1])))
    return scores


def test_swift(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, references = pairs()
    totals = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4"), 0.0)
    count = 0
    for prediction, reference in zip(predictions, references, strict=True):
        hyp, ref = ([w.strip(" ") for w in jieba.cut(text) if w.strip(" ")] for text in (prediction, reference))
        if not ref:
            continue
        count += 1
        if not hyp:
            continue
        if " ".join(hyp).strip(".") and " ".join(ref).strip("."):
            for name, value in rouge_package(" ".join(hyp), " ".join(ref)).items():
                totals[name] += value
        totals["bleu-4"] += sentence_bleu([ref], hyp, smoothing_function=METHOD3)
    expected = {name: round(total / count * 100, 6) for name, total in totals.items()}
    assert swift(predictions, references) == pytest.approx(expected, abs=1e-9)
    assert count < len(predictions)


def test_swift_goes_on_where_the_package_would_break_off() -> None:
    text = NOVEL.read_text(encoding="utf-8").replace(".", "")
    long = [text[:4000], text[2000:6000]]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        expected = rouge_package(*(" ".join(w.strip(" ") for w in jieba.cut(side) if w.strip(" ")) for side in long))
    finally:
        sys.setrecursionlimit(limit)
    assert swift(long[:1], long[1:])["rouge-l"] == pytest.approx(100 * expected["rouge-l"], abs=1e-6)


def test_opencompass() -> None:
    predictions, references = pairs()
    import re

    sides = []
    for texts, placeholder in ((predictions, "__PREDPLACEHOLDER__"), (references, "__REFRPLACEHOLDER__")):
        cut = []
        for text in texts:
            first = re.split(r"[\n.,]", text, maxsplit=1)[0]
            first = re.sub(r"\b(a|an|the)\b", "", re.sub(r"[^\w\s]", "", first), flags=re.IGNORECASE)
            cut.append(" ".join(jieba.cut(re.sub(r"\s+", " ", first).strip())) or placeholder)
        sides.append(cut)
    score = rouge_chinese.Rouge().get_scores(*sides, avg=True)
    expected = {f"rouge{name[-1].upper()}": score[name]["f"] * 100 for name in ("rouge-1", "rouge-2", "rouge-l")}
    assert opencompass(predictions, references) == pytest.approx(expected, abs=1e-9)


def test_an_empty_answer_counts_for_one_tool_and_a_missing_reference_for_none_of_another() -> None:
    assert llamafactory(["", "好好好"], ["好", "好好好"])["rouge-1"] < 51
    assert swift(["好好好", "好"], ["好好好", ""])["rouge-1"] == pytest.approx(100, abs=1e-5)
