"""The loss of causal language modelling without [batch, sequence, vocabulary].

At the vocabulary of Qwen (151,936) the head and its loss are most of a step of a small model and most of the memory of
any. Here the head sees only positions that are trained, a chunk at a time, and each chunk's gradients are made in the
forward pass, while its logits are at hand: they are never kept, and never computed twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from novelgpt.model.baichuan.modeling import NormHead
from novelgpt.model.routers import RouterBalance
from novelgpt.text.conversation import IGNORE_INDEX

# Bytes of one chunk of logits: large enough that matrix products run near their best.
CHUNK_BYTES = {"cpu": 160 * 2**20, "cuda": 512 * 2**20}
# Bytes of one part of the product that is the head's gradient.
PRODUCT_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
# Logits that are made fp32 at once: on CPUs few enough to stay in the cache, on GPUs 32 times as many.
CACHED_LOGITS = 2**21
# Probabilities below this have lost digits in fp32; their logarithms are made from the logits instead.
TINY = 1e-30


@dataclass
class TokenLoss(ModelOutput):
    """What a model with `attach_chunked_loss` returns for labelled rows.

    Attributes:
        loss: [] the sum (of nats) over trained tokens divided by `num_items_in_batch`, or their mean without it; where
            gradients are made, with the balancing loss of routers.
        aux_loss: [] the balancing loss alone, times the share of `num_items_in_batch` that these rows have: over all
            micro-batches and processes of a step, a mean weighted by trained tokens. Without gradient and coefficient.
        token_losses: [trained tokens] fp32, row by row, where no gradients are made.
        token_hits: [trained tokens] bool, whether the likeliest token was right, where no gradients are made.
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    token_hits: torch.Tensor | None = None


def attach_chunked_loss(
    model: PreTrainedModel, head_is_last: bool = True, balance: RouterBalance | None = None
) -> None:
    """Let `model(labels=…)` return a TokenLoss. Without labels, it returns logits as ever.

    The model's forward and its head's are replaced on the instance, so that wrappers (peft, DDP, DeepSpeed) and their
    hooks go on working: ZeRO-3 gathers the head's weights when the head is called.

    Args:
        model: a causal language model.
        head_is_last: whether the head's output is what the model returns. If not (soft caps, scaled logits), all logits
            are made and the loss is a plain cross-entropy.
        balance: adds the balancing loss of routers where gradients are made; None leaves it out. What is padding is
            told by "attention_mask", in packed rows by "token_mask".
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    whole_forward: Callable[..., Any] = model.forward
    head_forward: Callable[..., torch.Tensor] = head.forward

    def forward_head(
        head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor | None = None, scale: torch.Tensor | float = 1.0
    ) -> Any:
        if targets is None:
            return head_forward(hidden)
        return head_loss(head, head_forward, hidden, targets, scale)

    def forward(
        model: PreTrainedModel,
        *arguments: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if labels is None:
            return whole_forward(*arguments, **options)
        options.pop("return_dict", None)
        balanced = balance is not None and torch.is_grad_enabled()
        if balance is not None:
            options["output_router_logits"] = balanced
        if not head_is_last:
            outputs = whole_forward(*arguments, **options)
            loss = _plain_loss(outputs.logits, labels, num_items_in_batch)
        else:
            outputs = model.get_decoder()(*arguments, **options)
            hidden, targets = _trained(outputs.last_hidden_state, labels)
            loss = head(hidden, targets=targets, scale=_scale(targets, num_items_in_batch))
        if balance is None or not balanced:
            return loss
        mask = token_mask if token_mask is not None else options.get("attention_mask")
        return _with_balance(loss, balance, balance.loss(outputs.router_logits, mask), labels, num_items_in_batch)

    # `generate` and the Trainer read in the signature what the model takes.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    head.forward = MethodType(forward_head, head)  # type: ignore[method-assign]
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def _with_balance(
    loss: TokenLoss,
    balance: RouterBalance,
    of_routers: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> TokenLoss:
    """The loss with the balancing loss of the same rows, which counts as much as they do among those of the step."""
    assert loss.loss is not None
    targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
    share = of_routers * (len(targets) * _scale(targets, num_items_in_batch))
    return TokenLoss(loss=loss.loss + balance.coefficient * share, aux_loss=share.detach())


def _trained(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[trained tokens, …] of [rows, tokens, …] outputs, and their targets: the token at t is told from t - 1."""
    trained = labels[:, 1:] != IGNORE_INDEX
    return outputs[:, :-1][trained], labels[:, 1:][trained]


def _scale(targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """One by the number of items; by one where there are none, as no loss divided by nothing is no loss."""
    items = len(targets) if num_items_in_batch is None else num_items_in_batch
    return 1.0 / (items.clamp(min=1) if isinstance(items, torch.Tensor) else max(1, items))


def _plain_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> TokenLoss:
    logits, targets = _trained(logits, labels)
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    loss = losses.sum() * _scale(targets, num_items_in_batch)
    if torch.is_grad_enabled():
        return TokenLoss(loss=loss)
    return TokenLoss(loss=loss, token_losses=losses, token_hits=logits.argmax(-1) == targets)


@torch.compiler.disable  # its chunks are few and large: nothing to win, and a loop for the compiler to unroll
def head_loss(
    head: nn.Module,
    head_forward: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
) -> TokenLoss:
    """Cross-entropy of `head_forward(hidden)` against targets, in chunks.

    Args:
        head: the module that turns hidden states into logits; its parameters get gradients.
        head_forward: its own forward.
        hidden: [tokens, width].
        targets: [tokens] token ids; there may be none.
        scale: factor of the sum of losses.
    """
    if torch.is_grad_enabled():
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return TokenLoss(loss=_HeadLoss.apply(head, head_forward, targets, scale, hidden, *trained))
    losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    for chunk in _chunks(head, hidden):
        logits = head_forward(hidden[chunk])
        for block in _blocks(logits):
            part, wanted = logits[block].float(), targets[chunk][block]
            losses[chunk][block] = functional.cross_entropy(part, wanted, reduction="none")
            hits[chunk][block] = part.argmax(-1) == wanted
    return TokenLoss(loss=losses.sum() * scale, token_losses=losses, token_hits=hits)


class _HeadLoss(torch.autograd.Function):
    """The scaled sum of losses, with the gradients of hidden states and of the head's trained parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        head_forward: Callable[..., torch.Tensor],
        targets: torch.Tensor,
        scale: torch.Tensor | float,
        hidden: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        if isinstance(head, nn.Linear) and head.bias is None and type(head).forward is nn.Linear.forward:
            loss, grad_hidden, grads = _linear_gradients(head.weight, hidden, targets, scale)
        elif isinstance(head, NormHead) and type(head).forward is NormHead.forward:
            loss, grad_hidden, grads = _norm_head_gradients(head, hidden, targets, scale)
        else:
            loss, grad_hidden, grads = _module_gradients(head, head_forward, hidden, targets, scale, trained)
        ctx.grad_hidden, ctx.grads, ctx.scale, ctx.dtype = grad_hidden, grads, scale, hidden.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Handed over, not shared: autograd copies gradients that somebody else holds.
        grad_hidden, grads = ctx.grad_hidden, ctx.grads
        del ctx.grad_hidden, ctx.grads
        grad_hidden = (grad_hidden.float() * (grad_loss * ctx.scale)).to(ctx.dtype)
        # On CPUs, telling that there is nothing to scale is cheaper than a pass over the head's gradient.
        if grad_loss.is_cuda or grad_loss != 1:
            for grad in grads:
                grad.mul_(grad_loss)
        return None, None, None, None, grad_hidden, *grads


def _linear_gradients(
    weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The scaled loss, its unscaled gradient in hidden states, and its scaled gradient in the weight if it is trained.

    Args:
        weight: [vocabulary, width].
        hidden: [tokens, width].
        targets: [tokens].
        scale: factor of the sum of losses.
    """
    factor = weight.to(_compute_dtype(weight))
    loss, grad_hidden, grad_weight = _product_gradients(factor, weight.requires_grad, hidden, targets, scale)
    return loss, grad_hidden, [] if grad_weight is None else [grad_weight.to(weight.dtype)]


def _norm_head_gradients(
    head: NormHead, hidden: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """As `_linear_gradients`, for logits `hidden @ (W / ||W||).t()`, each row of W by its own norm.

    The normalised rows n are made once a step, and the gradient G in them becomes that in W at the end, in place and a
    few rows at a time: (G - n <n, G>) / ||W||, what is left of G across the row.
    """
    weight = head.weight
    norms = head.row_norms()[:, None]
    rows = max(1, _cached_numbers(weight) // weight.shape[1])
    blocks = [slice(begin, begin + rows) for begin in range(0, len(weight), rows)]
    factor = torch.empty(weight.shape, dtype=_compute_dtype(weight), device=weight.device)
    for block in blocks:
        factor[block] = weight[block].float() / norms[block]
    loss, grad_hidden, grad_weight = _product_gradients(factor, weight.requires_grad, hidden, targets, scale)
    if grad_weight is None:
        return loss, grad_hidden, []
    for block in blocks:
        directions = weight[block].float() / norms[block]
        part = grad_weight[block]
        part -= directions * (directions * part).sum(-1, keepdim=True)
        part /= norms[block]
    return loss, grad_hidden, [grad_weight.to(weight.dtype)]


def _product_gradients(
    factor: torch.Tensor, trained: bool, hidden: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The scaled loss of the logits `hidden @ factor.t()`, made in the factor's number format.

    Returns:
        It, its unscaled gradient in hidden states, and, if trained, its scaled one in the factor, which is fp32.
    """
    device, dtype = hidden.device.type, factor.dtype
    chunks = _chunks(factor, hidden)
    # fp16 would lose what the scale of thousands of tokens leaves of it; there it comes last.
    early = 1.0 / max(1, len(hidden)) if dtype == torch.float16 else scale
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    grad_factor = torch.empty(factor.shape, dtype=torch.float32, device=factor.device) if trained else None
    with torch.autocast(device, enabled=False):
        # Made once and of few sizes: large blocks that come and go in all sizes leave holes that none fits into.
        rows = chunks[0].stop if chunks else 0
        buffer = factor.new_empty(rows if rows < 256 else -(-rows // 128) * 128, len(factor))
        for chunk in chunks:
            states = hidden[chunk].to(dtype)
            logits = torch.mm(states, factor.t(), out=buffer[: len(states)])
            losses[chunk] = _losses_and_gradients(logits, targets[chunk])
            torch.mm(logits, factor, out=grad_hidden[chunk])
            if grad_factor is not None:
                _add_products(grad_factor, logits, (states * early).to(dtype), first=chunk.start == 0)
    if grad_factor is not None and not chunks:
        grad_factor.zero_()
    if grad_factor is not None and dtype == torch.float16:
        grad_factor *= scale / early
    return losses.sum() * scale, grad_hidden, grad_factor


def _add_products(total: torch.Tensor, logits: torch.Tensor, states: torch.Tensor, first: bool) -> None:
    """Add `logits.t() @ states` to the fp32 total (or write it, if first), a few rows of the vocabulary at a time.

    The product comes in the type of its factors: in parts, it costs no second [vocabulary, width], and on CPUs it is
    added while it lies in the cache.
    """
    device = total.device.type
    rows = max(1, PRODUCT_BYTES.get(device, PRODUCT_BYTES["cuda"]) // (states.element_size() * states.shape[1]))
    for begin in range(0, len(total), rows):
        part = logits[:, begin : begin + rows].t() @ states
        if first:
            total[begin : begin + rows] = part
        else:
            total[begin : begin + rows] += part


def _losses_and_gradients(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens] fp32 losses of [tokens, vocabulary] logits, which become their gradients: softmax minus one-hot."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for block in _blocks(logits):
        part, wanted = logits[block], targets[block, None]
        probabilities = torch.softmax(part, -1, dtype=torch.float32)
        target_probabilities = probabilities.gather(-1, wanted)
        losses[block] = -target_probabilities.log()[:, 0]
        tiny = (target_probabilities[:, 0] < TINY).nonzero()[:, 0]
        if len(tiny):
            losses[block.start + tiny] = functional.cross_entropy(part[tiny].float(), wanted[tiny, 0], reduction="none")
        probabilities.scatter_add_(-1, wanted, torch.full_like(target_probabilities, -1.0))
        part.copy_(probabilities)
    return losses


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of the rows of logits that are made fp32 at once."""
    size = max(1, _cached_numbers(logits) // logits.shape[1])
    return [slice(begin, begin + size) for begin in range(0, len(logits), size)]


def _cached_numbers(tensor: torch.Tensor) -> int:
    """How many numbers to make fp32 at once, on the device of a tensor."""
    return CACHED_LOGITS * (1 if tensor.device.type == "cpu" else 32)


def _module_gradients(
    head: nn.Module,
    head_forward: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
    trained: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """As `_linear_gradients`, for any head: each chunk's graph is made, used and forgotten."""
    grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    grads = [torch.zeros_like(parameter) for parameter in trained]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(head, hidden):
        with torch.enable_grad():
            states = hidden[chunk].detach().requires_grad_()
            part = functional.cross_entropy(head_forward(states).float(), targets[chunk], reduction="sum")
            grad_states, *grad_parts = torch.autograd.grad(part, [states, *trained])
        loss += part.detach()
        grad_hidden[chunk] = grad_states
        for grad, grad_part in zip(grads, grad_parts, strict=True):
            grad += grad_part * scale
    return loss * scale, grad_hidden, grads


def _chunks(head: nn.Module | torch.Tensor, hidden: torch.Tensor) -> list[slice]:
    """Slices of the tokens whose logits take CHUNK_BYTES at most."""
    weight = head if isinstance(head, torch.Tensor) else next(head.parameters())
    device = hidden.device.type
    size = torch.finfo(_compute_dtype(weight)).bits // 8
    most = max(32, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (size * weight.shape[0]))
    # Chunks of like size: a short last one would cost as much as a whole one in passes over the head's gradient.
    tokens = -(-len(hidden) // max(1, -(-len(hidden) // most)))
    return [slice(begin, min(begin + tokens, len(hidden))) for begin in range(0, len(hidden), max(1, tokens))]


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Of the head's products: autocast's if it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
