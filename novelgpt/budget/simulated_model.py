"""A model that has shapes but no numbers, and the steps of training on it: every allocation, none of the memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration

from novelgpt.budget.live_bytes import INNER, Assumptions, LiveBytes
from novelgpt.model import attention as _attention  # noqa: F401  registers "packed"
from novelgpt.model import loss
from novelgpt.model.loading import read_config
from novelgpt.model.lora import base_model
from novelgpt.settings.arguments import ModelArguments

# Chunks of the head that are simulated: the first, which begins its gradient, and those after it, which add to it.
FEW = 3
# Layers that are simulated of many: the first, one that stands for all within, and the last.
KEPT_LAYERS = 3
# Settings that do something to the logits after the head.
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Of a weight in 4 bits, with the scales of its blocks of 64, which are kept in 8 bits.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class SimulatedModel:
    """The model of a run, on tensors without numbers. Of many layers that are alike, three are simulated.

    Args:
        model: where its configuration lies, and its attention.
        device: of the run; "cuda" only where there is one.
        dtype: of the weights of the base.
        prepare: what the run makes of the base, as attaching an adapter; it may raise UserError.
        four_bits: the base's linear layers but the head are held in 4 bits.
        cast_all: number format that all weights are then cast to, as DeepSpeed does; None leaves them.

    Attributes:
        device: of the run.
        trained: numbers and bytes of the trained tensors of all layers.
        saved: bytes of what `save_pretrained` writes: all weights, or those of the adapter.
        shared: bytes of the weights that have a second name, as a head that is the embedding.
    """

    def __init__(
        self,
        model: ModelArguments,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[PreTrainedModel], nn.Module] | None = None,
        four_bits: bool = False,
        cast_all: torch.dtype | None = None,
    ) -> None:
        config = read_config(model)
        # Flash attention keeps what torch's own kernels keep, and cannot be simulated.
        kernel = "sdpa" if model.attention == "flash_attention_2" else model.attention
        self.device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"), _untouched_surroundings():
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
            base.config.use_cache = False
            self._layers, self._left_out = _shortened(base)
            self._model: nn.Module = base if prepare is None else prepare(base)
            if four_bits:
                _hold_in_four_bits(self._model, base.get_output_embeddings())
            if cast_all is not None:
                self._model.to(cast_all)
        with self._mode:
            _fill(self._model, device)
        loss.attach_chunked_loss(base, not changes_logits(base.config))
        inner = list(self._layers[1].parameters()) * self._left_out if self._left_out else []
        self.saved = _saved_bytes(self._model) + sum(
            parameter.nbytes for parameter in inner if parameter.requires_grad or self._model is base
        )
        self.shared = _shared_bytes(self._model)
        self._missing = [(parameter.nbytes, parameter.requires_grad) for parameter in inner]
        self.trained = [
            (parameter.numel(), parameter.nbytes)
            for parameter in [*self._model.parameters(), *inner]
            if parameter.requires_grad
        ]

    def step(
        self,
        rows: int,
        tokens: int,
        borders: bool,
        autocast: torch.dtype | None,
        checkpointing: dict[str, Any] | None = None,
        accumulated: bool = False,
        evaluation: bool = False,
    ) -> LiveBytes:
        """What `track_step` notes of a micro-step on `rows` rows of `tokens` tokens, all trained."""
        live = LiveBytes()
        live.inner += self._left_out
        for size, trained in self._missing:
            live.add(size, "weights")
            if accumulated and trained:
                live.add(size, "gradients")
        if checkpointing is not None:
            # States of random number generators are numbers, which nothing has here.
            given = checkpointing.get("activation_checkpointing_kwargs") or {"use_reentrant": False}
            checkpointing = checkpointing | {"activation_checkpointing_kwargs": given | {"preserve_rng_state": False}}
        with self._mode, _untouched_surroundings(), _few_chunks(), _sections(self._layers, live):
            batch = worst_batch(rows, tokens, borders, self.device)
            return track_step(
                self._model, batch, autocast, checkpointing, accumulated, evaluation, simulated=True, live=live
            )


def _fill(model: nn.Module, device: torch.device) -> None:
    """Give all parameters and buffers of a meta model storage. Tied weights and shared parts stay the same tensor."""
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((part, name))
    shared = [places for places in holders.values() if len(places) > 1]
    for part in model.modules():
        part.to_empty(device=device, recurse=False)
    for (first, first_name), *others in shared:
        for part, name in others:
            setattr(part, name, getattr(first, first_name))


def _saved_bytes(model: nn.Module) -> int:
    """Of the tensors that are saved; those that share their values count once."""
    if isinstance(model, PeftModel):
        return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model).values())
    tensors = [*model.parameters(), *model.buffers()]
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors if id(tensor) in saved)


def _shared_bytes(model: nn.Module) -> int:
    if isinstance(model, PeftModel):
        return 0
    tensors = list(model.state_dict(keep_vars=True).values())
    return sum(tensor.nbytes for tensor in tensors) - sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _shortened(base: PreTrainedModel) -> tuple[list[nn.Module], int]:
    """Leave three layers of a model whose layers are all alike.

    Returns:
        The layers that are left, and how many are not; none of both where layers differ or cannot be told.
    """
    count = base.config.get_text_config().num_hidden_layers
    if len(set(getattr(base.config.get_text_config(), "layer_types", None) or [])) > 1:
        return [], 0
    for parent in base.get_decoder().modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count and count > KEPT_LAYERS:
                if len({_signature(layer) for layer in child}) > 1:
                    return [], 0
                kept = child[:KEPT_LAYERS]
                setattr(parent, name, kept)
                return list(kept), count - KEPT_LAYERS
    return [], 0


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    return type(layer), *((name, tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items())


@contextlib.contextmanager
def _sections(layers: list[nn.Module], live: LiveBytes) -> Iterator[None]:
    """Name the sections of a step, by the layers that are the first, those within, and the last."""
    forward, backward = ("first forward", INNER[0], "last forward"), ("first backward", INNER[1], "last backward")

    def enter(name: str) -> None:
        # What checkpointing computes again is a part of the backward pass.
        if name in backward or live.section not in backward:
            live.section = name

    def leave(name: str, output: Any) -> None:
        if live.section in backward:
            return
        if name == "last backward":
            live.section = "head"
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _: enter(name))

    handles = []
    for layer, before, after in zip(layers, forward, backward, strict=False):
        handles.append(layer.register_forward_pre_hook(lambda *_, before=before: enter(before)))
        handles.append(layer.register_forward_hook(lambda _, __, output, after=after: leave(after, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def changes_logits(config: PretrainedConfig) -> bool:
    """Whether a setting of the model does something to what its head makes."""
    return any(vars(config).get(name) not in (None, 1, 1.0) for name in LOGIT_SETTINGS)


def worst_batch(rows: int, tokens: int, borders: bool, device: torch.device) -> dict[str, Any]:
    """A batch of the collator that has no padding and trains every token.

    Args:
        rows: in the batch.
        tokens: of a row.
        borders: rows are packs, of two documents each; otherwise they have a mask, as rows of unequal length do.
        device: where it lies.
    """
    ids = torch.ones(rows, tokens, dtype=torch.int64, device=device)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if not borders:
        return batch | {"attention_mask": torch.ones_like(ids)}
    half = max(1, tokens // 2)
    starts = [row * tokens + start for row in range(rows) for start in ((0, half) if tokens > 1 else (0,))]
    # Attention on CPUs reads the borders, which a simulated tensor could not tell.
    ends = _Borders([*starts, rows * tokens])
    known = torch.tensor(ends, dtype=torch.int32, device=device) if device.type == "cuda" else ends
    positions = torch.arange(tokens, device=device).expand(rows, tokens)
    positions = torch.cat([positions[:, :half], positions[:, : tokens - half]], 1)
    longest = tokens - half if tokens > 1 else 1
    return batch | {
        "position_ids": positions,
        "cu_seq_lens_q": known,
        "cu_seq_lens_k": known,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class _Borders(list[int]):
    """Numbers that are read as those of a tensor are."""

    def tolist(self) -> list[int]:
        """The numbers."""
        return list(self)


def track_step(
    model: nn.Module,
    batch: dict[str, Any],
    autocast: torch.dtype | None,
    checkpointing: dict[str, Any] | None = None,
    accumulated: bool = False,
    evaluation: bool = False,
    simulated: bool = False,
    live: LiveBytes | None = None,
) -> LiveBytes:
    """Run forward and backward of a model with the chunked loss, and note what lives when. Gradients are gone after it.

    Args:
        model: as the Trainer gets it.
        batch: as the collator makes it, on the model's device.
        autocast: number format of the computation, None for that of the weights.
        checkpointing: options of `activation_checkpointing_enable`; None keeps the activations.
        accumulated: gradients of an earlier micro-batch are there.
        evaluation: forward only.
        simulated: tensors have no numbers.
        live: takes the notes.

    Returns:
        Bytes of "weights", "copies", "gradients", "activations" (with everything passing) and "loss".
    """
    base = base_model(model)
    model.train(not evaluation)
    if checkpointing is None:
        base.activation_checkpointing_disable()
    else:
        base.activation_checkpointing_enable(**checkpointing)
    live = live or LiveBytes()
    with live, Assumptions() if simulated else contextlib.nullcontext():
        live.claim([*model.parameters(), *model.buffers()], "weights")
        if accumulated:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        device = batch["input_ids"].device.type
        with (
            _head_is_loss(base, live),
            torch.set_grad_enabled(not evaluation),
            torch.autocast(device, dtype=autocast, enabled=autocast is not None),
        ):
            output = model(**batch, num_items_in_batch=batch["labels"].numel())
        if not evaluation:
            output.loss.backward()
        del output
        live.claim([parameter.grad for parameter in model.parameters() if parameter.grad is not None], "gradients")
        model.zero_grad()
    return live


@contextlib.contextmanager
def _head_is_loss(base: PreTrainedModel, live: LiveBytes) -> Iterator[None]:
    """What the head makes belongs to the part "loss"."""

    def change(part: str) -> Callable[..., None]:
        return lambda *_: setattr(live, "part", part)

    head = base.get_output_embeddings()
    assert isinstance(head, nn.Module)
    handles = [head.register_forward_pre_hook(change("loss")), head.register_forward_hook(change("activations"))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _untouched_surroundings() -> Iterator[None]:
    """Nothing printed, no random number drawn, and no weights shared among processes as they are made (ZeRO-3)."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference


@contextlib.contextmanager
def _few_chunks() -> Iterator[None]:
    """The head sees the first chunks only, as all take the same, and a long batch has hundreds of them."""
    chunks = loss._chunks
    loss._chunks = lambda *arguments: chunks(*arguments)[:FEW]
    try:
        yield
    finally:
        loss._chunks = chunks


class _FourBitLinear(nn.Module):
    """The memory of a linear layer in 4 bits: packed weights, made whole for each product and then forgotten."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        size = int(layer.weight.numel() * FOUR_BIT_BYTES)
        self.weight = nn.Parameter(layer.weight.new_empty(size, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return _FourBitProduct.apply(states, self.out_features, self.bias)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, features: int, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.shape, ctx.dtype = (features, states.shape[-1]), torch.bfloat16
        whole = states.new_empty(ctx.shape, dtype=ctx.dtype)
        return functional.linear(states.to(ctx.dtype), whole, bias).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = gradient.new_empty(ctx.shape, dtype=ctx.dtype)
        return (gradient.to(ctx.dtype) @ whole).to(gradient.dtype), None, None


def _hold_in_four_bits(model: nn.Module, head: nn.Module | None) -> None:
    """Replace the frozen linear layers, but the head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and not child.weight.requires_grad:
                setattr(parent, name, _FourBitLinear(child))
