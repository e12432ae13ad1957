"""The loss and gradient norm of each optimizer step: not finite, exactly zero, or a spike; and the rows they come from.

A loss that is not finite makes all gradients of its step so, on the device, and their reduction spreads that to all
processes: the norm of the gradients is the same everywhere, and the device is read once per optimizer step. DeepSpeed
skips a step with such gradients by itself; elsewhere the norm is known before the optimizer steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Dataset

from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import say_above_bars
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.origins import TracedRows, unique
from novelgpt.training.sample_predictions import preserve_mode_and_rng

# Consecutive skipped steps that end the run even with --on_non_finite skip.
MAX_SKIPS = 10
# Consecutive steps with a loss of exactly zero that end the run.
ZERO_STEPS = 3
# A spike exceeds the median of so many losses by so many of their (scaled) median deviations, and by so many nats.
SPIKE_WINDOW, SPIKE_DEVIATIONS, SPIKE_FLOOR = 50, 8.0, 0.5
# Spikes are reported from this step on, and at most once in so many steps.
SPIKE_WARM_UP = SPIKE_PAUSE = 20
# From median deviation to standard deviation, for a normal distribution.
SCALED = 1.4826
# Rows listed in a line on the terminal, and in metrics.jsonl.
SHOWN, NOTED = 5, 100
# Trained tensors that backward passes reach last; the smallest of them is watched.
LAST_REACHED = 16


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
    """Files and rows of complete micro-batches."""
    return unique(name for batch in batches for number in batch.numbers for name in _origins(rows, number, 0, None))


def _origins(rows: Dataset[Any], number: int, start: int, end: int | None) -> list[str]:
    """Files and rows of tokens [start, end) of a training row; its number where nothing else is known."""
    known = rows.origins(number, start, end) if isinstance(rows, TracedRows) else []
    return known or [f"row {number} of the training data"]


class StepMonitor:
    """Follows the micro-batches of each optimizer step, then judges it. All processes reach the same judgement.

    Args:
        model: the bare one.
        rows: of training.
        recompute: losses of the documents of micro-batches (see `document_losses`).
        gather: concatenates the tensors of all processes.
        skip: whether steps that are not finite are skipped; otherwise they end the run.
        note: takes an entry of metrics.jsonl, on every process.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Dataset[Any],
        recompute: Callable[[list[MicroBatch]], list[DocumentLoss]],
        gather: Callable[[torch.Tensor], torch.Tensor],
        skip: bool,
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        self.rows, self.recompute, self.gather, self.skip, self.note = rows, recompute, gather, skip, note
        self._batches: list[MicroBatch] = []
        self._skips = 0
        self._zeros: list[list[MicroBatch]] = []
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._next_spike = 0
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad][:LAST_REACHED]
        # Sharded tensors (ZeRO-3) have no size: then the last of them, as the first may be the whole embedding.
        watched = min(reversed(trained), key=lambda tensor: tensor.numel())
        watched.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]

    def start(self, inputs: dict[str, Any], numbers: list[int]) -> bool:
        """Note a micro-batch before its forward pass; returns whether it is the first of its step."""
        self._batches.append(MicroBatch(inputs, numbers))
        return len(self._batches) == 1

    def see_loss(self, loss: torch.Tensor, last: bool) -> torch.Tensor:
        """Note the loss of the pass; returns the one to differentiate: the same number, bit for bit, but NaN in the
        last pass of a step in which a loss was not finite.

        Nothing is read from the device.
        """
        self._batches[-1].loss = loss.detach().float()
        if not last:
            return loss
        return loss * (1 + 0 * self._sum()).to(loss.dtype)

    def judge(self, step: int, norm: torch.Tensor | float | None, scale: float | None, skipped: bool | None) -> bool:
        """Judge the step whose gradients are complete.

        Args:
            step: its number, from 1.
            norm: of the gradients of all processes.
            scale: of the loss in fp16, where overflows are expected and the scaler handles them.
            skipped: whether the optimizer has skipped the step already; None before the optimizer steps.

        Returns:
            Whether the step must not reach the weights.

        Raises:
            UserError: the run is to stop, on all processes.
        """
        figures = torch.stack([self._sum(), torch.as_tensor(0.0 if norm is None else norm).to(self._sum())])
        losses, norms = zip(*self.gather(figures[None]).tolist(), strict=True)
        batches, self._batches = self._batches, []
        if all(map(math.isfinite, losses + norms)):
            self._skips = 0
            self._check_zero(step, batches, losses)
            self._check_spike(step, batches, sum(losses) / len(losses))
            return False
        finite = all(map(math.isfinite, losses))
        if finite and scale is not None and scale > 1:
            return False
        self._skips += 1
        what = (
            f"the loss is {next(loss for loss in losses if not math.isfinite(loss))}" if not finite
            else f"the loss is finite and its gradients are not (norm {max(norms)})"
        )  # fmt: skip
        names = self._suspects(batches, finite)
        skips = self.skip and self._skips < MAX_SKIPS and skipped is not False
        self.note(
            {"step": step, "not_finite": "gradients" if finite else "loss", "rows": names[:NOTED], "skipped": skips}
        )
        if skips:
            _say(f"step {step:>5}  skipped: {what}, on {listed(names)}")
            return True
        consecutive = f" ({self._skips} steps in a row)" if self.skip and self._skips > 1 else ""
        taken = "; the step has reached the weights, go back to a checkpoint" if skipped is False else ""
        precision = "--precision bf16 or fp32, else " if scale is not None else ""
        otherwise = "go back to an earlier checkpoint" if self.skip else "skip such steps: --on_non_finite skip"
        raise UserError(
            f"step {step}: {what}{consecutive}, on {listed(names)}{taken}",
            f"{precision}inspect these rows, lower --learning_rate, or {otherwise}",
        )

    def _sum(self) -> torch.Tensor:
        return torch.stack([batch.loss for batch in self._batches if batch.loss is not None]).sum()

    def _see_gradient(self, gradient: torch.Tensor) -> None:
        if self._batches:
            self._batches[-1].gradient = torch.linalg.vector_norm(gradient.detach().float())

    def _suspects(self, batches: list[MicroBatch], finite: bool) -> list[str]:
        """Names of the rows, as precisely as is known: of documents, else of micro-batches, else of the whole step."""
        if not finite:
            found = [one for one in self.recompute(batches) if not math.isfinite(one.loss)]
            named = [name for _, name in name_losses(found, self.rows, NOTED)]
            numbers = [batch.loss for batch in batches]
        else:
            named, numbers = [], [batch.gradient for batch in batches]
        suspects = [
            batch for batch, number in zip(batches, numbers, strict=True)
            if number is not None and not math.isfinite(float(number))
        ]  # fmt: skip
        by_process = gather_object([(named, name_rows(suspects, self.rows), name_rows(batches, self.rows))])
        levels = [unique(name for one in by_process for name in one[level]) for level in range(3)]
        return next(filter(None, levels), [])

    def _check_zero(self, step: int, batches: list[MicroBatch], losses: tuple[float, ...]) -> None:
        if any(losses):
            self._zeros.clear()
            return
        self._zeros.append(batches)
        if len(self._zeros) < ZERO_STEPS:
            return
        mine = [batch for zero in self._zeros for batch in zero]
        names = unique(name for one in gather_object([name_rows(mine, self.rows)]) for name in one)
        self.note({"step": step, "zero_loss": ZERO_STEPS, "rows": names[:NOTED]})
        raise UserError(
            f"the loss was exactly 0 in {ZERO_STEPS} optimizer steps in a row, up to step {step}, on {listed(names)}",
            "are all labels masked, so that no token of these rows is trained? Does the model overflow in fp16 "
            "(--precision bf16 or fp32)? Or is nothing left to learn in the rows?",
        )

    def _check_spike(self, step: int, batches: list[MicroBatch], loss: float) -> None:
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < SPIKE_WARM_UP or step < self._next_spike:
            return
        median = statistics.median(before)
        deviation = SCALED * statistics.median(abs(one - median) for one in before)
        if loss <= median + max(SPIKE_DEVIATIONS * deviation, SPIKE_FLOOR):
            return
        self._next_spike = step + SPIKE_PAUSE
        mine = name_losses(self.recompute(batches), self.rows, NOTED)
        found = sorted((one for part in gather_object([mine]) for one in part), reverse=True)[:NOTED]
        names, row_losses = [name for _, name in found], [round(one, 4) for one, _ in found]
        self.note({"step": step, "spike": loss, "median": median, "rows": names, "row_losses": row_losses})
        _say(f"step {step:>5}  loss {loss:.4f} spikes above its median {median:.4f}, highest on {listed(names)}")


def _say(line: str) -> None:
    if is_first_process():
        say_above_bars(line)


def listed(names: list[str]) -> str:
    """The first few names, and the number of others."""
    more = f" and {len(names) - SHOWN} more (metrics.jsonl lists up to {NOTED})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
