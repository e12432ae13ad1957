"""What must hold of a model before its first step: a few forward passes on a real micro-batch, and one backward pass.

Every process takes part in every pass, as sharded weights (ZeRO-3) need, and all of them raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from novelgpt.budget.memory import compute_dtype
from novelgpt.model.lora import base_model
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process, raise_on_all_ranks
from novelgpt.settings.terminal import say
from novelgpt.training.plan import Autocast
from novelgpt.training.sample_predictions import preserve_mode_and_rng

# How far losses of the same batch may lie apart, in nats, by the number format of the computation.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Evaluation is repeated: stale caches of weights show from the second pass on.
EVALUATIONS = 3
# fp16 ends at 65,504.
FP16_LIMIT = 6e4
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Parts of the names under which modules and configurations keep how random they are in training.
RANDOM_SETTINGS = ("drop", "jitter", "noise")
# Names listed in a message.
MAX_NAMES = 5


def first_rows(count: int, training: TrainArguments) -> list[int]:
    """Indices of the first micro-batch of this process, of `count` training rows in their own order."""
    first = training.process_index * training.per_device_train_batch_size
    return [index % count for index in range(first, first + training.per_device_train_batch_size)]


def probe_first_rows(model: nn.Module, batch: dict[str, Any], training: TrainArguments, autocast: Autocast) -> None:
    """Check the vocabulary, then the forward passes of a micro-batch of this process.

    Raises:
        UserError: see `check_vocabulary` and `check_forward`.
    """
    base = base_model(model)
    check_vocabulary(base, batch)
    check_forward(model, batch, compute_dtype(training) or base.dtype, autocast)


@raise_on_all_ranks()
def check_vocabulary(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """Check that every token of the batch, and every label, has a row in the embedding.

    Raises:
        UserError: otherwise, on all processes.
    """
    embedding = next((part for part in model.get_input_embeddings().modules() if isinstance(part, nn.Embedding)), None)
    rows = model.config.get_text_config().vocab_size if embedding is None else embedding.num_embeddings
    highest = max(int(batch[name].max()) for name in ("input_ids", "labels"))
    if highest >= rows:
        raise UserError(
            f"the training rows hold token {highest}, and the model's embedding has {rows} rows",
            "use the tokenizer that belongs to the model",
        )


def check_forward(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype, autocast: Autocast) -> None:
    """Check that a pass in training mode and EVALUATIONS in evaluation mode give one finite loss, and change no weight.

    Dropout and other random draws are off meanwhile. Modes, random states and settings are restored, and no gradients
    are computed. Where the loss is not finite, one more pass finds the first module whose output is not.

    Args:
        model: the bare one, without the wrappers of data parallelism; it returns a loss for labelled rows.
        batch: a micro-batch of this process, on its device.
        dtype: of the computation; with fp16, outputs near its limit are refused as well.
        autocast: the context of each pass.

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
            which = f"; the first output that is not finite is that of {name or 'the model'}"
            fp16 = "fp16 overflows easily: --precision bf16 or fp32; else " if dtype == torch.float16 else ""
            with raise_on_all_ranks():
                if not finite:
                    raise UserError(
                        f"the loss of the first training rows is not finite{'' if name is None else which}",
                        f"{fp16}check the model's weights for NaN",
                    )
        with raise_on_all_ranks():
            _check_losses(trained, evaluated, TOLERANCES.get(dtype, 1e-2))
            after = _fingerprint(model)
            changed = [name for name in before if before[name] != after[name]]
            if changed:
                raise UserError(
                    f"evaluating the model changes its weights: {_listed(changed)}",
                    "use an implementation of the model that leaves them alone; --guards False trains all the same",
                )


@contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """Set all dropout, jitter and noise of the model to zero within, whether modules or configurations hold it."""
    holders: dict[int, Any] = {id(module): module for module in model.modules()}
    configs = [value for module in model.modules() for value in vars(module).values()]
    holders |= {id(value): value for value in configs if isinstance(value, PreTrainedConfig)}
    found = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, float) and value != 0
        and (any(part in name for part in RANDOM_SETTINGS) or (name == "p" and isinstance(holder, DROPOUTS)))
    ]  # fmt: skip
    for holder, name, _ in found:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)


def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the first module in a pass whose output holds a number that is not finite; None where none does."""
    found: list[str] = []

    def inspect(name: str, output: Any) -> None:
        if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
            found.append(name)

    with _outputs_seen(model, inspect):
        run()
    return found[0] if found else None


@contextmanager
def check_gradients(model: nn.Module) -> Iterator[None]:
    """Check that the backward pass within gives every trained tensor a gradient. All zeros are one, none at all is not.

    Hooks on the tensors work alike under data parallelism and under ZeRO, where `.grad` is not visible. Adapters on
    modules that the model does not call are only named.

    Raises:
        UserError: a trained tensor got no gradient, on all processes.
    """
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    missing = dict.fromkeys(trained)
    uncalled = {name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}

    def reach(name: str, _: torch.Tensor) -> None:
        missing.pop(name, None)

    def call(name: str, *_: Any) -> None:
        uncalled.discard(name)

    handles = [tensor.register_hook(partial(reach, name)) for name, tensor in trained.items()]  # type: ignore[no-untyped-call]
    handles += [model.get_submodule(name).register_forward_pre_hook(partial(call, name)) for name in uncalled]
    yield
    for handle in handles:
        handle.remove()
    idle = [name for name in missing if any(name.startswith(f"{adapter}.") for adapter in uncalled)]
    cut_off = [name for name in missing if name not in idle]
    with raise_on_all_ranks():
        if cut_off:
            raise UserError(
                f"{len(cut_off)} of {len(trained)} trained tensors get no gradient: {_listed(cut_off)}",
                "they would stay as they are: freeze them, or fix the model's forward; where it leaves out weights in "
                "some steps by design, --ddp_find_unused_parameters True",
            )
    if idle and is_first_process():
        say(f"adapters that the model never calls stay as they are: {_listed(idle)}", style="yellow")


@raise_on_all_ranks()
def _check_fp16(model: nn.Module, run: Callable[[], object]) -> None:
    """Refuse a model whose outputs come near the limit of fp16 in a pass."""
    peaks: list[tuple[str, torch.Tensor]] = []

    def inspect(name: str, output: Any) -> None:
        halves = [tensor for tensor in _tensors(output) if tensor.dtype == torch.float16 and tensor.numel()]
        peaks.extend((name, tensor.abs().max()) for tensor in halves)

    with _outputs_seen(model, inspect):
        run()
    values = torch.stack([peak for _, peak in peaks]).tolist() if peaks else []
    for (name, _), value in zip(peaks, values, strict=True):
        if not value <= FP16_LIMIT:  # nor is NaN
            raise UserError(
                f"fp16 is too narrow for this model: {name or 'the model'} outputs {value:.3g}, fp16 ends at 65504",
                "--precision bf16 where the GPU has it, else --precision fp32",
            )


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """A sum of each tensor, as text, that shows whether a pass has changed it. Sharded weights (ZeRO-3) have none."""
    if is_deepspeed_zero3_enabled():
        return {}
    tensors = dict(model.named_parameters())
    sums = [tensor.detach().sum(dtype=torch.float64) for tensor in tensors.values()]
    return {name: value.hex() for name, value in zip(tensors, torch.stack(sums).tolist(), strict=True)}


def _check_losses(trained: float, evaluated: list[float], tolerance: float) -> None:
    first = evaluated[0]
    farthest = max(evaluated, key=lambda loss: abs(loss - first))
    remedy = "use an implementation of the model that computes one thing; --guards False trains all the same"
    if abs(farthest - first) > tolerance:
        losses = ", ".join(f"{loss:.4f}" for loss in evaluated)
        raise UserError(f"the model's loss changes from one evaluation of the same rows to the next: {losses}", remedy)
    if abs(trained - first) > tolerance:
        raise UserError(
            f"the model computes something else in training than in evaluation: loss {trained:.4f} against "
            f"{first:.4f} on the same rows without dropout, {abs(trained - first):.4f} apart",
            remedy,
        )


@contextmanager
def _outputs_seen(model: nn.Module, inspect: Callable[[str, Any], None]) -> Iterator[None]:
    """Let `inspect` see the name and the output of every module that is called within, inner ones first."""

    def hook(name: str, _: nn.Module, __: Any, output: Any) -> None:
        inspect(name, output)

    handles = [part.register_forward_hook(partial(hook, name)) for name, part in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
