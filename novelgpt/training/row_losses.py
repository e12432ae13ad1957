"""Which rows of an optimizer step its loss comes from, told by computing them once more."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import Dataset

from novelgpt.text.collator import NUMBER
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.origins import TracedRows, unique
from novelgpt.training.sample_predictions import preserve_mode_and_rng


class NumberedRows(Dataset[dict[str, Any]]):
    """Training rows that carry their number, by which their origins are found again."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row and its number."""
        return {**self.rows[index], NUMBER: index}

    def names(self, number: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows of tokens [begin, end) of a row; its number where nothing else is known."""
        known = self.rows.origins(number, begin, end) if isinstance(self.rows, TracedRows) else []
        return known or [f"row {number} of the training data"]


@dataclass
class MicroBatch:
    """What one forward pass of a step got.

    Attributes:
        inputs: of the model.
        numbers: of its rows.
        loss: [] its share of the step's loss, on the device.
        gradient: [] norm of the gradient of the tensor that is watched, on the device; None where it got none.
    """

    inputs: dict[str, Any]
    numbers: list[int]
    loss: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


@dataclass
class DocumentLoss:
    """The loss of one document of a row.

    Attributes:
        number: of the row.
        loss: mean over its trained tokens, nats.
        begin, end: the tokens that lead to that loss; where it is not finite, the first one from which it is not.
    """

    number: int
    loss: float
    begin: int
    end: int


def document_losses(
    model: nn.Module,
    batches: list[MicroBatch],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[DocumentLoss]:
    """Losses of all documents with a trained token, by one more forward pass of each micro-batch, without dropout.

    Under ZeRO-3 all processes must take part. Random states, modes and gradients stay what they were.

    Args:
        model: the bare one, which returns `token_losses` for labelled rows.
        batches: of this process.
        prepare: puts inputs on the model's device.
        autocast: what passes run under.
    """
    found: list[DocumentLoss] = []
    with preserve_mode_and_rng(model), torch.no_grad():
        for batch in batches:
            inputs = prepare(batch.inputs)
            with autocast():
                losses = model(**inputs).token_losses.double().cpu().numpy()
            found += _by_document(inputs, batch.numbers, losses)
    return found


def _by_document(inputs: dict[str, Any], numbers: list[int], losses: numpy.ndarray) -> list[DocumentLoss]:
    labels = inputs["labels"].cpu().numpy()
    rows, places = numpy.nonzero(labels[:, 1:] != IGNORE_INDEX)
    documents = numpy.zeros_like(labels)
    if "position_ids" in inputs:
        documents = numpy.cumsum(inputs["position_ids"].cpu().numpy() == 0, axis=1)
    keys = rows * (labels.shape[1] + 1) + documents[rows, places]
    borders = numpy.flatnonzero(numpy.diff(keys)) + 1  # tokens come row by row, document by document
    found = []
    for part in numpy.split(numpy.arange(len(keys)), borders) if len(keys) else []:
        loss = float(losses[part].mean())
        begin, end = int(places[part[0]]), int(places[part[-1]]) + 1
        if not math.isfinite(loss):
            begin = int(places[part[~numpy.isfinite(losses[part])][:1]].sum())
            end = begin + 1
        found.append(DocumentLoss(numbers[rows[part[0]]], loss, begin, end))
    return found


def name_losses(found: list[DocumentLoss], rows: NumberedRows, most: int) -> list[tuple[float, str]]:
    """(loss, name) of at most `most` documents, the worst first."""
    worst = sorted(found, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf, reverse=True)[:most]
    return [(one.loss, ", ".join(rows.names(one.number, one.begin, one.end))) for one in worst]


def name_rows(batches: list[MicroBatch], rows: NumberedRows) -> list[str]:
    """Files and rows of whole micro-batches."""
    return unique(name for batch in batches for number in batch.numbers for name in rows.names(number))
