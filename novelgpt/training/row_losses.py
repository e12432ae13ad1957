"""The rows that the loss of an optimizer step comes from, found by computing their losses once more."""

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

from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.origins import TracedRows, unique
from novelgpt.training.sample_predictions import preserve_mode_and_rng


@dataclass
class MicroBatch:
    """The inputs and figures of one forward pass of a step.

    Attributes:
        inputs: of the model.
        numbers: of its rows.
        loss: [] its share of the step's loss, on the device.
        gradient: [] norm of the gradient of the watched tensor, on the device; None where it has none.
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
        start, end: the tokens that the loss is computed from; where it is not finite, the first such token.
    """

    number: int
    loss: float
    start: int
    end: int


def document_losses(
    model: nn.Module,
    batches: list[MicroBatch],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[DocumentLoss]:
    """Losses of all documents with a trained token, from one more forward pass of each micro-batch, without dropout.

    Under ZeRO-3 all processes must take part. Random states, modes and gradients do not change.

    Args:
        model: the bare one, which returns `token_losses` for labelled rows.
        batches: of this process.
        prepare: puts inputs on the model's device.
        autocast: the context of each pass.
    """
    found: list[DocumentLoss] = []
    with preserve_mode_and_rng(model), torch.no_grad():
        for batch in batches:
            inputs = prepare(batch.inputs)
            with autocast():
                losses = model(**inputs).token_losses.double().cpu().numpy()
            labels = inputs["labels"].cpu().numpy()
            rows, places = numpy.nonzero(labels[:, 1:] != IGNORE_INDEX)
            documents = numpy.zeros_like(labels)
            if "position_ids" in inputs:
                documents = numpy.cumsum(inputs["position_ids"].cpu().numpy() == 0, axis=1)
            keys = rows * (labels.shape[1] + 1) + documents[rows, places]
            boundaries = numpy.flatnonzero(numpy.diff(keys)) + 1  # tokens are sorted by row and document
            for part in numpy.split(numpy.arange(len(keys)), boundaries) if len(keys) else []:
                loss = float(losses[part].mean())
                start, end = int(places[part[0]]), int(places[part[-1]]) + 1
                if not math.isfinite(loss):
                    start = int(places[part[~numpy.isfinite(losses[part])][:1]].sum())
                    end = start + 1
                found.append(DocumentLoss(batch.numbers[rows[part[0]]], loss, start, end))
    return found


def name_losses(found: list[DocumentLoss], rows: Dataset[Any], most: int) -> list[tuple[float, str]]:
    """(loss, name) of at most `most` documents, the worst first."""
    worst = sorted(found, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf, reverse=True)[:most]
    return [(one.loss, ", ".join(_origins(rows, one.number, one.start, one.end))) for one in worst]


def name_rows(batches: list[MicroBatch], rows: Dataset[Any]) -> list[str]:
    """Files and rows of whole micro-batches."""
    return unique(name for batch in batches for number in batch.numbers for name in _origins(rows, number, 0, None))


def _origins(rows: Dataset[Any], number: int, start: int, end: int | None) -> list[str]:
    """Files and rows of tokens [start, end) of a training row; its number where nothing else is known."""
    known = rows.origins(number, start, end) if isinstance(rows, TracedRows) else []
    return known or [f"row {number} of the training data"]
