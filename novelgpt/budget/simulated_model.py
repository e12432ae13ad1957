"""Training steps of a model on fake tensors: every allocation is counted, none is made."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy
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

# Chunks of the head that are simulated: the first, which allocates its gradient, and those after it, which add to it.
FEW = 3
# Layers that are simulated: the first, one that stands for all inner ones, and the last.
KEPT_LAYERS = 3
# Settings that change the logits after the head.
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Of a weight in 4 bits, with the scales of its blocks of 64, which are kept in 8 bits.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class SimulatedModel:
    """The model of a run, on fake tensors. Of many equal layers, three are simulated.

    Args:
        model: where its configuration lies, and its attention.
        device: of the run; "cuda" only where there is one.
        dtype: of the weights of the base.
        prepare: turns the base into what trains, as by attaching an adapter; may raise UserError.
        four_bits: the base's linear layers except the head are held in 4 bits.
        cast_all: dtype that all weights are then cast to, as DeepSpeed does; None leaves them.

    Attributes:
        device: of the run.
        trained: elements and bytes of each trained tensor, of all layers.
        saved: bytes that `save_pretrained` writes: all weights, or those of the adapter.
        shared: bytes of tied weights' second names, as of a head that is the embedding.
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
        self.saved, self.shared = _saved_and_shared(self._model)
        self.saved += sum(parameter.nbytes for parameter in inner if parameter.requires_grad or self._model is base)
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
        packed: bool,
        autocast: torch.dtype | None,
        checkpointing: dict[str, Any] | None = None,
        accumulated: bool = False,
        evaluation: bool = False,
    ) -> LiveBytes:
        """Simulate `track_step` on `rows` rows of `tokens` tokens, all trained."""
        live = LiveBytes()
        live.inner += self._left_out
        for size, trained in self._missing:
            live.add(size, "weights")
            if accumulated and trained:
                live.add(size, "gradients")
        if checkpointing is not None:
            # Fake tensors hold no random states.
            given = checkpointing.get("activation_checkpointing_kwargs") or {"use_reentrant": False}
            checkpointing = checkpointing | {"activation_checkpointing_kwargs": given | {"preserve_rng_state": False}}
        with self._mode, _untouched_surroundings(), _few_chunks(), _sections(self._layers, live):
            batch = worst_batch(rows, tokens, packed, self.device)
            return track_step(
                self._model, batch, autocast, checkpointing, accumulated, evaluation, simulated=True, live=live
            )


def _fill(model: nn.Module, device: torch.device) -> None:
    """Allocate all parameters and buffers of a meta model. Tied weights stay one tensor."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            part.register_parameter(name, filled.setdefault(parameter, empty))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device=device))


def _saved_and_shared(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the tensors that are saved, tied ones counted once, and those of their second names."""
    if isinstance(model, PeftModel):
        return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model).values()), 0
    tensors = list(model.state_dict(keep_vars=True).values())
    saved = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
    return saved, sum(tensor.nbytes for tensor in tensors) - saved


def _shortened(base: PreTrainedModel) -> tuple[list[nn.Module], int]:
    """Keep three layers of a model whose layers are all equal.

    Returns:
        The layers that are kept, and the number of the others; none of both where layers differ or are not found.
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
    """Name the sections of a step by the first, inner and last layers."""
    forward, backward = ("first forward", INNER[0], "last forward"), ("first backward", INNER[1], "last backward")

    def enter(name: str) -> None:
        # What checkpointing recomputes is part of the backward pass.
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

    with contextlib.ExitStack() as hooks:
        for layer, before, after in zip(layers, forward, backward, strict=False):
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, before=before: enter(before)))
            hooks.enter_context(layer.register_forward_hook(lambda _, __, output, after=after: leave(after, output)))
        yield


def changes_logits(config: PretrainedConfig) -> bool:
    """Whether a setting of the model changes the logits of its head."""
    return any(vars(config).get(name) not in (None, 1, 1.0) for name in LOGIT_SETTINGS)


def worst_batch(rows: int, tokens: int, packed: bool, device: torch.device) -> dict[str, Any]:
    """Build a batch as the collator's, without padding, that trains every token.

    Args:
        rows: in the batch.
        tokens: of a row.
        packed: rows are packs of two documents each; otherwise they have a mask, as rows of unequal length do.
        device: of the batch.
    """
    ids = torch.ones(rows, tokens, dtype=torch.int64, device=device)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if not packed:
        return batch | {"attention_mask": torch.ones_like(ids)}
    half = max(1, tokens // 2)
    starts = [row * tokens + start for row in range(rows) for start in ((0, half) if tokens > 1 else (0,))]
    # Attention on CPUs reads the boundaries, which fake tensors do not hold.
    ends = numpy.array([*starts, rows * tokens])
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
    """Run forward and backward of a model with the chunked loss, and record live bytes. Gradients are cleared after it.

    Args:
        model: as the Trainer gets it.
        batch: of the collator, on the model's device.
        autocast: compute dtype, None for that of the weights.
        checkpointing: options of `activation_checkpointing_enable`; None keeps the activations.
        accumulated: gradients of an earlier micro-batch are there.
        evaluation: forward only.
        simulated: tensors are fake.
        live: records; None for a new one.

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
        head = base.get_output_embeddings()
        assert isinstance(head, nn.Module)
        with (
            head.register_forward_pre_hook(lambda *_: setattr(live, "part", "loss")),
            head.register_forward_hook(lambda *_: setattr(live, "part", "activations")),
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
def _untouched_surroundings() -> Iterator[None]:
    """Print nothing, keep random states, and let ZeRO-3 shard no weights as they are made."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference


@contextlib.contextmanager
def _few_chunks() -> Iterator[None]:
    """Limit the head to its first chunks, as all take the same, and a long batch has hundreds of them."""
    chunks = loss._chunks
    loss._chunks = lambda *arguments: chunks(*arguments)[:FEW]
    try:
        yield
    finally:
        loss._chunks = chunks


class _FourBitLinear(nn.Module):
    """A linear layer with the memory of one in 4 bits: packed weights, dequantized for each product."""

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
    """Replace the frozen linear layers, except the head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and not child.weight.requires_grad:
                setattr(parent, name, _FourBitLinear(child))
