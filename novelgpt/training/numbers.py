"""The numbers of each optimizer step: not finite, exactly zero, or far above those before; and the rows they are of.

A loss that is not finite makes the gradients of its whole step so, on the device, and their reduction makes those of
all processes so: the norm of the gradients tells all of them the same, and the device is read once per optimizer step.
DeepSpeed leaves out a step with such gradients by itself; elsewhere the norm is known before the optimizer steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import say_above_bars
from novelgpt.text.origins import unique
from novelgpt.training.row_losses import DocumentLoss, MicroBatch, NumberedRows, name_losses, name_rows

# Steps left out in a row that end the run, whatever was chosen.
MOST_SKIPS = 10
# Steps in a row with a loss of exactly zero.
ZERO_STEPS = 3
# A spike lies above the median of so many losses by so many of their (scaled) median deviations, and by this in nats.
SPIKE_WINDOW, SPIKE_DEVIATIONS, SPIKE_FLOOR = 50, 8.0, 0.5
# Spikes are told from so many steps on, and at most once in so many.
SPIKE_WARM_UP = SPIKE_PAUSE = 20
# Median deviation to standard deviation, of a normal distribution.
SCALED = 1.4826
# Rows in a line on the terminal, and in metrics.jsonl.
SHOWN, NOTED = 5, 100
# Of the trained tensors, those that backward passes reach last; the smallest of them is watched.
LAST_REACHED = 16


class StepMonitor:
    """Follows the micro-batches of each optimizer step, then judges it. All processes come to the same judgement.

    Args:
        model: the bare one.
        rows: what is trained on.
        look_again: losses of documents of the micro-batches (see `document_losses`).
        gather: puts the tensors of all processes one after the other.
        skip: leave out steps that are not finite, in place of a stop.
        note: takes an entry of metrics.jsonl, on every process.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: NumberedRows,
        look_again: Callable[[list[MicroBatch]], list[DocumentLoss]],
        gather: Callable[[torch.Tensor], torch.Tensor],
        skip: bool,
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        self.rows, self.look_again, self.gather, self.skip, self.note = rows, look_again, gather, skip, note
        self._batches: list[MicroBatch] = []
        self._in_a_row = 0
        self._zeros: list[list[MicroBatch]] = []
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._next_spike = 0
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad][:LAST_REACHED]
        # Tensors in parts (ZeRO-3) tell no size: then the last of them, as the first may be the whole embedding.
        watched = min(reversed(trained), key=lambda tensor: tensor.numel())
        watched.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]

    def begin(self, inputs: dict[str, Any], numbers: list[int]) -> bool:
        """A forward pass starts. Returns whether it is the first of its step."""
        self._batches.append(MicroBatch(inputs, numbers))
        return len(self._batches) == 1

    def see_loss(self, loss: torch.Tensor, last: bool) -> torch.Tensor:
        """Take the loss of the pass; returns what is to be differentiated: the same number, bit for bit, but NaN in the
        last pass of a step in which a loss was not finite.

        Nothing is read from the device.
        """
        self._batches[-1].loss = loss.detach().float()
        if not last:
            return loss
        return loss * (1 + 0 * self._sum()).to(loss.dtype)

    def judge(self, step: int, norm: torch.Tensor | float | None, scale: float | None, left_out: bool | None) -> bool:
        """Judge the step whose gradients are complete.

        Args:
            step: its number, from 1.
            norm: of the gradients of all processes.
            scale: of the loss in fp16, where overflows are to be expected and the scaler deals with them.
            left_out: whether the optimizer has left out the step already; None where it is still to come.

        Returns:
            Whether the step must not reach the weights.

        Raises:
            UserError: the run is to stop, on all processes.
        """
        figures = torch.stack([self._sum(), torch.as_tensor(0.0 if norm is None else norm).to(self._sum())])
        losses, norms = zip(*self.gather(figures[None]).tolist(), strict=True)
        batches, self._batches = self._batches, []
        if all(map(math.isfinite, losses + norms)):
            self._in_a_row = 0
            self._check_zero(step, batches, losses)
            self._check_spike(step, batches, sum(losses) / len(losses))
            return False
        finite = all(map(math.isfinite, losses))
        if finite and scale is not None and scale > 1:
            return False
        self._in_a_row += 1
        what = (
            f"the loss is {next(loss for loss in losses if not math.isfinite(loss))}" if not finite
            else f"the loss is finite and its gradients are not (norm {max(norms)})"
        )  # fmt: skip
        names = self._guilty(batches, finite)
        goes_on = self.skip and self._in_a_row < MOST_SKIPS and left_out is not False
        self.note(
            {"step": step, "not_finite": "gradients" if finite else "loss", "rows": names[:NOTED], "skipped": goes_on}
        )
        if not goes_on:
            raise self._stop(step, what, names, left_out, scale)
        _say(f"step {step:>5}  left out: {what}, on {listed(names)}")
        return True

    def _sum(self) -> torch.Tensor:
        return torch.stack([batch.loss for batch in self._batches if batch.loss is not None]).sum()

    def _see_gradient(self, gradient: torch.Tensor) -> None:
        if self._batches:
            self._batches[-1].gradient = torch.linalg.vector_norm(gradient.detach().float())

    def _guilty(self, batches: list[MicroBatch], finite: bool) -> list[str]:
        """Names of the rows, as few as can be told: of documents, else of micro-batches, else of the whole step."""
        if not finite:
            found = [one for one in self.look_again(batches) if not math.isfinite(one.loss)]
            named = [name for _, name in name_losses(found, self.rows, NOTED)]
            numbers = [batch.loss for batch in batches]
        else:
            named, numbers = [], [batch.gradient for batch in batches]
        suspects = [
            batch for batch, number in zip(batches, numbers, strict=True)
            if number is not None and not math.isfinite(float(number))
        ]  # fmt: skip
        by_process = gather_object([(named, name_rows(suspects, self.rows), name_rows(batches, self.rows))])
        for level in range(3):
            names = unique(name for one in by_process for name in one[level])
            if names:
                return names
        return []

    def _stop(self, step: int, what: str, names: list[str], left_out: bool | None, scale: float | None) -> UserError:
        skips = f" ({self._in_a_row} steps in a row)" if self.skip and self._in_a_row > 1 else ""
        taken = "; the step has reached the weights, go back to a checkpoint" if left_out is False else ""
        half = "--precision bf16 or fp32, else " if scale is not None else ""
        return UserError(
            f"step {step}: {what}{skips}, on {listed(names)}{taken}",
            f"{half}look at these rows, lower --learning_rate, or leave such steps out: --on_non_finite skip"
            if not self.skip
            else f"{half}look at these rows, lower --learning_rate, or go back to an earlier checkpoint",
        )

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
            "(--precision bf16 or fp32)? Or do the rows hold nothing that is left to learn?",
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
        mine = name_losses(self.look_again(batches), self.rows, NOTED)
        found = sorted((one for part in gather_object([mine]) for one in part), reverse=True)[:NOTED]
        names, row_losses = [name for _, name in found], [round(one, 4) for one, _ in found]
        self.note({"step": step, "spike": loss, "median": median, "rows": names, "row_losses": row_losses})
        _say(f"step {step:>5}  loss {loss:.4f} leaps above its median {median:.4f}, highest on {listed(names)}")


def _say(line: str) -> None:
    if is_first_process():
        say_above_bars(line)


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more (metrics.jsonl lists up to {NOTED})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
