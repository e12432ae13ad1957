"""How a report shows each score: its Chinese name, group, which values are better, and its format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from novelgpt.scoring.summary import reference_name

GROUPS = {
    "overlap": ("Similarity to the reference", "与参考答案的相似度"),
    "answers": ("Short answers", "简短回答"),
    "model": ("References under the model", "参考答案在模型下的概率"),
    "repetition": ("Repetition", "重复程度"),
    "length": ("Length", "长度"),
    "other": ("Other scores", "其他分数"),
}
"""Name of a group -> English and Chinese heading, in page order."""


@dataclass(frozen=True)
class Metric:
    """A score as a report shows it.

    Attributes:
        name: exact name.
        chinese: Chinese name.
        group: name in `GROUPS`.
        better: "higher", "lower", "reference" (closer to the references' value), or "" for neither.
        digits: decimals.
    """

    name: str
    chinese: str
    group: str = "other"
    better: str = ""
    digits: int = 4


METRICS = {
    metric.name: metric
    for metric in (
        Metric("rouge-1", "词重合", "overlap", "higher"),
        Metric("rouge-2", "二元词重合", "overlap", "higher"),
        Metric("rouge-l", "最长公共子序列（按词）", "overlap", "higher"),
        Metric("rouge1_char_count", "字重合（计次数）", "overlap", "higher"),
        Metric("rouge2_char_count", "二元字重合（计次数）", "overlap", "higher"),
        Metric("rougel_char", "最长公共子序列（按字）", "overlap", "higher"),
        Metric("bleu4_char", "按字 BLEU-4", "overlap", "higher"),
        Metric("bleu4_word", "按词 BLEU-4", "overlap", "higher"),
        Metric("sacrebleu", "语料级 BLEU", "overlap", "higher", 2),
        Metric("exact_match", "完全一致", "answers", "higher"),
        Metric("answer_f1_char", "按字 F1", "answers", "higher"),
        Metric("choice_accuracy", "选择题正确率", "answers", "higher"),
        Metric("perplexity", "困惑度", "model", "lower", 2),
        Metric("bits_per_character", "每字比特数", "model", "lower"),
        Metric("token_accuracy", "token 准确率", "model", "higher"),
        Metric("loss", "损失", "model", "lower"),
        Metric("rep4_char", "四字重复率", "repetition", "reference"),
        Metric("rep8_char", "八字重复率", "repetition", "reference"),
        Metric("rep16_char", "十六字重复率", "repetition", "reference"),
        Metric("distinct1_char", "不同字占比", "repetition", "reference"),
        Metric("distinct2_char", "不同字二元组占比", "repetition", "reference"),
        Metric("longest_repeat_char", "最长重复片段", "repetition", "reference", 1),
        Metric("looped", "陷入循环的比例", "repetition", "lower"),
        Metric("first_loop_char", "循环起点", "repetition", "", 1),
        Metric("sentences_seen_before", "重复句子占比", "repetition", "reference"),
        Metric("compression_ratio", "压缩比", "repetition", "reference", 3),
        Metric("prediction_characters", "回答字数", "length", "reference", 1),
        Metric("stopped", "自然结束的比例", "length", "higher"),
        Metric("cut", "超出计分长度的比例", "length"),
    )
}
"""Scores by name, in page order."""


def metrics_of(scores: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics that any of these scores.json has, by name and in page order; an unknown one has no Chinese name."""
    found = [name for name in METRICS if any(is_number(one.get(name)) for one in scores)]
    found += [
        name
        for one in scores
        for name in one.get("intervals", {})
        if name not in METRICS and not name.startswith("reference_") and is_number(one.get(name))
    ]
    return {name: METRICS.get(name) or Metric(name, "") for name in found}


def reference_value(name: str, scores: Mapping[str, Any]) -> float | None:
    """The references' value of a score of predictions; None where they have none."""
    value = scores.get(reference_name(name))
    return float(value) if is_number(value) else None


def goodness(metric: Metric, value: float, reference: float | None) -> float | None:
    """A number that grows as the value improves; None where no value is better than another."""
    if metric.better == "higher":
        return value
    if metric.better == "lower":
        return -value
    if metric.better == "reference" and reference is not None:
        return -abs(value - reference)
    return None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_number(value: float, digits: int) -> str:
    """A number with this many decimals and commas between thousands; very large ones as 1.23e+45."""
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    text = f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) else text.lstrip("-")
