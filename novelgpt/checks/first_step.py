"""What must hold of a model before its first step: a few forward passes on a real micro-batch, and one backward pass.

Every process takes part in every pass, as shared weights (ZeRO-3) need, and all of them raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import say
from novelgpt.training.sample_predictions import preserve_mode_and_rng

# How far losses of the same batch may lie apart, in nats, by the format of the computation.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Evaluation is repeated: caches of weights that outlive their weights show from the second pass on.
EVALUATIONS = 3
# fp16 ends at 65,504.
FP16_LIMIT = 6e4
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Parts of the names under which modules and configurations keep how random they are in training.
RANDOM_SETTINGS = ("drop", "jitter", "noise")
# Names that a message lists.
MOST_NAMES = 5

Problem = tuple[str, str]


def check_vocabulary(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """Every token of the batch, and every label, has a row in the embedding.

    Raises:
        UserError: otherwise, on all processes.
    """
    embedding = next((part for part in model.get_input_embeddings().modules() if isinstance(part, nn.Embedding)), None)
    rows = model.config.get_text_config().vocab_size if embedding is None else embedding.num_embeddings
    highest = max(int(batch[name].max()) for name in ("input_ids", "labels"))
    problem: Problem | None = None
    if highest >= rows:
        problem = (
            f"the training rows hold token {highest}, and the model's embedding has {rows} rows",
            "use the tokenizer that belongs to the model",
        )
    _raise_together(problem)


def check_forward(
    model: nn.Module,
    batch: dict[str, Any],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """One pass in training mode and EVALUATIONS in evaluation mode give one finite loss, and leave the weights alone.

    Dropout and other draws are off meanwhile. Modes, random states and settings are afterwards what they were, and no
    gradients are made. Where the loss is not finite, one more pass finds the module that began it.

    Args:
        model: the bare one, without the wrappers of data parallelism; it returns a loss for labelled rows.
        batch: a micro-batch of this process, on its device.
        dtype: of the computation; with fp16, outputs near its end are refused as well.
        autocast: what passes run under.

    Raises:
        UserError: otherwise, on all processes.
    """

    def loss(training: bool) -> float:
        model.train(training)
        with autocast():
            return float(model(**batch).loss)

    with preserve_mode_and_rng(model), without_randomness(model), torch.no_grad():
        before = _fingerprint(model)
        trained = loss(training=True)
        if dtype == torch.float16:
            _check_fp16(model, partial(loss, training=False))
        evaluated = [loss(training=False) for _ in range(EVALUATIONS)]
        finite = all(map(math.isfinite, (trained, *evaluated)))
        if not all(gather_object([finite])):
            name = first_not_finite(model, partial(loss, training=not math.isfinite(trained)))
            _raise_together(None if finite else _not_finite(name, dtype))
        _raise_together(_mismatch(trained, evaluated, TOLERANCES.get(dtype, 1e-2)))
        _raise_together(_changed(before, _fingerprint(model)))


@contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """All dropout, jitter and noise of the model is zero within, whether modules or configurations hold it."""
    holders: dict[int, Any] = {id(module): module for module in model.modules()}
    configs = [value for module in model.modules() for value in vars(module).values()]
    holders |= {id(value): value for value in configs if isinstance(value, PreTrainedConfig)}
    found = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, float) and value != 0 and _is_random(holder, name)
    ]
    for holder, name, _ in found:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)


def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the module whose output is the first in a pass with a number that is not finite; None where none is."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
            found.append(name)

    with _watched(model, look):
        run()
    return found[0] if found else None


class GradientMonitor:
    """Notes which trained tensors get a gradient in a backward pass. All zeros are one, none at all is not.

    Hooks on the tensors are the same under data parallelism and under ZeRO, where `.grad` is not to be seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self.reached: set[str] = set()
        adapters = [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
        self.idle = set(adapters)
        self._handles = [
            tensor.register_hook(partial(self._reach, name))  # type: ignore[no-untyped-call]
            for name, tensor in self.trained.items()
        ]
        for name in adapters:
            self._handles.append(model.get_submodule(name).register_forward_pre_hook(partial(self._call, name)))

    def check(self) -> None:
        """To be called after the backward pass. Adapters on modules that the model does not call are only named.

        Raises:
            UserError: a trained tensor got no gradient, on all processes.
        """
        for handle in self._handles:
            handle.remove()
        missing = [name for name in self.trained if name not in self.reached]
        idle = [name for name in missing if any(name.startswith(f"{adapter}.") for adapter in self.idle)]
        missing = [name for name in missing if name not in idle]
        problem: Problem | None = None
        if missing:
            problem = (
                f"{len(missing)} of {len(self.trained)} trained tensors get no gradient: {_listed(missing)}",
                "they would stay as they are: freeze them, or mend the model's forward; where it leaves out weights in "
                "some steps by design, --ddp_find_unused_parameters True",
            )
        _raise_together(problem)
        if idle and is_first_process():
            note = f"adapters that the model never calls stay as they are: {_listed(idle)}"
            say(note, style="yellow")

    def _reach(self, name: str, _: torch.Tensor) -> None:
        self.reached.add(name)

    def _call(self, name: str, *_: Any) -> None:
        self.idle.discard(name)


def _check_fp16(model: nn.Module, run: Callable[[], object]) -> None:
    """Refuse a model that comes near the end of fp16 in a pass."""
    peaks: list[tuple[str, torch.Tensor]] = []

    def look(name: str, output: Any) -> None:
        halves = [tensor for tensor in _tensors(output) if tensor.dtype == torch.float16 and tensor.numel()]
        peaks.extend((name, tensor.abs().max()) for tensor in halves)

    with _watched(model, look):
        run()
    values = torch.stack([peak for _, peak in peaks]).tolist() if peaks else []
    problem: Problem | None = None
    for (name, _), value in zip(peaks, values, strict=True):
        if not value <= FP16_LIMIT:  # nor is NaN
            problem = (
                f"fp16 is too narrow for this model: {name or 'the model'} puts out {value:.3g}, fp16 ends at 65504",
                "--precision bf16 where the GPU has it, else --precision fp32",
            )
            break
    _raise_together(problem)


def _is_random(holder: Any, name: str) -> bool:
    return any(part in name for part in RANDOM_SETTINGS) or (name == "p" and isinstance(holder, DROPOUTS))


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """A sum of each tensor, as text, that shows whether a pass has changed it. Weights in parts (ZeRO-3) have none."""
    if is_deepspeed_zero3_enabled():
        return {}
    tensors = dict(model.named_parameters())
    sums = [tensor.detach().sum(dtype=torch.float64) for tensor in tensors.values()]
    return {name: value.hex() for name, value in zip(tensors, torch.stack(sums).tolist(), strict=True)}


def _not_finite(name: str | None, dtype: torch.dtype) -> Problem:
    where = f"; the first output that is not finite is that of {name or 'the whole model'}" if name is not None else ""
    fp16 = "fp16 overflows easily: --precision bf16 or fp32; else " if dtype == torch.float16 else ""
    return f"the loss of the first training rows is not finite{where}", f"{fp16}check the model's weights for NaN"


def _mismatch(trained: float, evaluated: list[float], tolerance: float) -> Problem | None:
    first = evaluated[0]
    repeated = max(evaluated, key=lambda loss: abs(loss - first))
    remedy = "use an implementation of the model that computes one thing; --guards False trains all the same"
    if abs(repeated - first) > tolerance:
        losses = ", ".join(f"{loss:.4f}" for loss in evaluated)
        return f"the model's loss changes from one evaluation of the same rows to the next: {losses}", remedy
    if abs(trained - first) > tolerance:
        return (
            f"the model computes something else in training than in evaluation: loss {trained:.4f} against "
            f"{first:.4f} on the same rows without dropout, {abs(trained - first):.4f} apart",
            remedy,
        )
    return None


def _changed(before: dict[str, str], after: dict[str, str]) -> Problem | None:
    names = [name for name in before | after if before.get(name) != after.get(name)]
    if not names:
        return None
    return (
        f"evaluating the model changes its weights: {_listed(names)}",
        "use an implementation of the model that leaves them alone; --guards False trains all the same",
    )


@contextmanager
def _watched(model: nn.Module, look: Callable[[str, Any], None]) -> Iterator[None]:
    """`look` sees the name and the output of every module that is called within, the inner ones first."""

    def hook(name: str, _: nn.Module, __: Any, output: Any) -> None:
        look(name, output)

    handles = [part.register_forward_hook(partial(hook, name)) for name, part in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of numbers with a point in a module's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _raise_together(problem: Problem | None) -> None:
    """Raise what the first of the processes has found, on all of them."""
    found = [one for one in gather_object([problem]) if one is not None]
    if found:
        raise UserError(*found[0])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
