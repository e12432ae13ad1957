"""Rows for benchmarks: Alpaca rows whose characters follow each other as somewhere in the sample novels."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from novelgpt.settings.paths import SAMPLES
from novelgpt.text.conversation import encode_conversation
from novelgpt.text.messages import Message

BLOCK_ROWS = 10_000
# Rows are this far from their mean length, and questions are this part of a row.
SPREAD, QUESTION = 0.5, 0.25
MEASURED_ROWS = 300


class RowMaker:
    """Makes rows of so many tokens on average, the same in every process.

    Args:
        tokenizer: of the model that is to read them.
        tokens: of a row on average, with those of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        text = "".join(path.read_text(encoding="utf-8") for path in sorted((SAMPLES / "novels").glob("*.txt")))
        text = "".join(text.split())
        followers: dict[str, list[int]] = defaultdict(list)
        for one, following in itertools.pairwise(text + text[0]):
            followers[one].append(ord(following))
        self.known = numpy.array(sorted(map(ord, followers)), numpy.uint32)
        lists = [followers[chr(code)] for code in self.known]
        self.counts = numpy.array(list(map(len, lists)))
        self.starts = numpy.concatenate([[0], self.counts.cumsum()[:-1]])
        self.followers = numpy.searchsorted(self.known, numpy.concatenate(lists))
        self.characters = 200.0
        for _ in range(2):
            mean = self.mean_tokens(tokenizer)
            self.characters *= tokens / mean

    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Tokens of a row, from the first rows."""
        counts = []
        for row in itertools.islice(self.rows(), MEASURED_ROWS):
            question, answer = row["instruction"], row["output"]
            messages: list[Message] = [
                {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            ]  # fmt: skip
            counts.append(len(encode_conversation(messages, tokenizer)[0].input_ids))
        return sum(counts) / len(counts)

    def rows(self) -> Iterator[dict[str, str]]:
        """Rows without an end, always the same ones."""
        for block in itertools.count():
            yield from self._block(block)

    def _block(self, number: int) -> Iterator[dict[str, str]]:
        draw = numpy.random.default_rng(number)
        lengths = (self.characters * draw.uniform(1 - SPREAD, 1 + SPREAD, BLOCK_ROWS)).astype(int).clip(8)
        states = draw.integers(len(self.known), size=BLOCK_ROWS)
        made = numpy.empty((lengths.max(), BLOCK_ROWS), numpy.uint32)
        for place in range(len(made)):
            made[place] = self.known[states]
            picked = (draw.random(BLOCK_ROWS) * self.counts[states]).astype(int)
            states = self.followers[self.starts[states] + picked]
        for row, length in zip(made.T, lengths, strict=True):
            text = row[:length].tobytes().decode("utf-32-le")
            cut = int(length * QUESTION)
            yield {"instruction": text[:cut], "input": "", "output": text[cut:]}


def write_rows(path: Path, rows: Iterable[dict[str, str]], shape: Callable[[dict[str, str]], dict[str, Any]]) -> Path:
    """A .jsonl file of rows in another shape, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(shape(row), ensure_ascii=False) + "\n" for row in rows)
        partial.replace(path)
    return path


def as_pair(row: dict[str, str]) -> dict[str, Any]:
    """Prompt and completion as lists of messages, TRL's shape of a question and its answer."""
    prompt = [{"role": "user", "content": row["instruction"]}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["output"]}]}


def as_prediction(row: dict[str, str], characters: int = 24) -> dict[str, Any]:
    """A short prediction and a reference that shares its beginning."""
    text, other = row["output"], row["instruction"]
    return {"prediction": text[:characters], "reference": text[: characters // 2] + other[: characters // 2]}
