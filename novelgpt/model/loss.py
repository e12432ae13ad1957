"""The loss of causal language modelling without [batch, sequence, vocabulary].

At the vocabulary of Qwen (151,936) the head and its loss are most of a step of a small model and most of the memory of
any. Here the head sees only trained positions, a chunk at a time, and the gradients of each chunk are computed in the
forward pass, while its logits are at hand: logits are never kept, and never computed twice.
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
from novelgpt.model.repetition_weights import RepetitionWeights, repetition_weights
from novelgpt.model.routers import RouterBalance
from novelgpt.text.conversation import IGNORE_INDEX

# Bytes of one chunk of logits: large enough for matrix products to run near their best.
CHUNK_BYTES = {"cpu": 160 * 2**20, "cuda": 512 * 2**20}
# Bytes of one part of the product that is the head's gradient.
PRODUCT_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
# Logits that are converted to fp32 at once: on CPUs few enough to stay in the cache, on GPUs 32 times as many.
CACHED_LOGITS = 2**21
# Probabilities below this have lost digits in fp32; their logarithms are computed from the logits instead.
TINY = 1e-30


@dataclass
class TokenLoss(ModelOutput):
    """What a model with `attach_chunked_loss` returns for labelled rows.

    Attributes:
        loss: [] the sum (in nats) over trained tokens, each times its weight, divided by `num_items_in_batch` or,
            without it, by the sum of the weights given, of pseudo-repetitions by the number of tokens; where gradients
            are computed, with the balancing loss of routers.
        aux_loss: [] the balancing loss alone, times the share of `num_items_in_batch` that these rows have: over all
            micro-batches and processes of a step, a mean weighted as the tokens are. Without gradient and coefficient.
        token_losses: [trained tokens] fp32, row by row, without weights, where no gradients are computed.
        token_hits: [trained tokens] bool, whether the likeliest token was right, where no gradients are computed.
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    token_hits: torch.Tensor | None = None


def attach_chunked_loss(
    model: PreTrainedModel, head_is_last: bool = True, balance: RouterBalance | None = None
) -> None:
    """Let `model(labels=…)` return a TokenLoss. Without labels, it returns logits as before.

    Beside labels it takes `num_items_in_batch`, by which the sum of losses is divided, and `loss_weights`, [rows,
    tokens]: the weight of predicting the label at the same place, by default 1; or, of pseudo-repetitions,
    `repeat_periods`, [rows, tokens]: how far before a token its last copy is, or 0. Where gradients are computed, the
    loss is then that of `repetition_weights`, after a pass without gradients; where all periods are 0, the usual loss,
    after the same pass: where weights are sharded (ZeRO-3, FSDP), all processes must do as many.

    The forward methods of the model and of its head are replaced on the instance, so that wrappers (peft, DDP,
    DeepSpeed) and their hooks still work: ZeRO-3 gathers the head's weights when the head is called.

    Args:
        model: a causal language model.
        head_is_last: whether the head's output is what the model returns. If not (soft caps, scaled logits), all logits
            are computed and the loss is a plain cross-entropy.
        balance: adds the balancing loss of routers where gradients are computed; None leaves it out. It takes padding
            from "attention_mask", in packed rows from "token_mask".
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    full_forward: Callable[..., Any] = model.forward
    head_forward: Callable[..., torch.Tensor] = head.forward

    def forward(
        model: PreTrainedModel,
        *arguments: Any,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_mask: torch.Tensor | None = None,
        repeat_periods: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if labels is None:
            return full_forward(*arguments, **options)
        repetition: RepetitionWeights | None = None
        if repeat_periods is not None and torch.is_grad_enabled():
            if loss_weights is not None:
                raise ValueError("loss_weights and repeat_periods exclude each other: both are weights of tokens")
            # Both passes draw the same dropout and noise, and leave the generators where one pass does.
            with torch.no_grad(), torch.random.fork_rng([labels.device] if labels.is_cuda else []):
                now = forward(model, *arguments, labels=labels, token_mask=token_mask, **options)
            if repeat_periods.any():
                repetition = repetition_weights(now.token_losses, labels, repeat_periods)
                loss_weights = repetition.weights
        options.pop("return_dict", None)
        if balance is not None:
            options["output_router_logits"] = torch.is_grad_enabled()
        outputs = (model.get_decoder() if head_is_last else full_forward)(*arguments, **options)
        # The token at t is predicted from t - 1.
        trained = labels[:, 1:] != IGNORE_INDEX
        targets = labels[:, 1:][trained]
        weights = None if loss_weights is None else loss_weights[:, 1:][trained].float()
        own_items = len(targets) if weights is None or repetition is not None else weights.sum()
        items = own_items if num_items_in_batch is None else num_items_in_batch
        # Where there are no items, the loss is that of none: 0.
        scale = 1.0 / (items + (items == 0))
        if head_is_last:
            loss = head(outputs.last_hidden_state[:, :-1][trained], targets=targets, scale=scale, weights=weights)
        else:
            loss = _plain_loss(outputs.logits[:, :-1][trained], targets, scale, weights)
        if repetition is not None:
            loss.loss = loss.loss + repetition.difference * scale
        if balance is None or not torch.is_grad_enabled():
            return loss
        mask = token_mask if token_mask is not None else options.get("attention_mask")
        # These rows count as much as their trained tokens do among those of the step.
        share = balance.loss(outputs.router_logits, mask) * (own_items * scale)
        return TokenLoss(loss=loss.loss + balance.coefficient * share, aux_loss=share.detach())

    def forward_head(
        head: nn.Module,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        scale: torch.Tensor | float = 1.0,
        weights: torch.Tensor | None = None,
    ) -> Any:
        if targets is None:
            return head_forward(hidden)
        if not torch.is_grad_enabled():
            return _evaluate(head, head_forward, hidden, targets, scale, weights)
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return TokenLoss(loss=_differentiate(head, head_forward, targets, scale, weights, hidden, *trained))

    # `generate` and the Trainer read in the signature what the model takes.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    head.forward = MethodType(forward_head, head)  # type: ignore[method-assign]
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def _plain_loss(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float, weights: torch.Tensor | None
) -> TokenLoss:
    """The loss of [trained tokens, vocabulary] logits, computed at once."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    loss = (losses if weights is None else losses * weights).sum() * scale
    if torch.is_grad_enabled():
        return TokenLoss(loss=loss)
    return TokenLoss(loss=loss, token_losses=losses, token_hits=logits.argmax(-1) == targets)


@torch.compiler.disable
def _evaluate(
    head: nn.Module,
    head_forward: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
    weights: torch.Tensor | None,
) -> TokenLoss:
    """The loss of `head_forward(hidden)` against targets, each token's with it, in chunks; see `_HeadLoss`."""
    losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    weight, device = next(head.parameters()), hidden.device.type
    for chunk in _chunks(len(hidden), len(weight), _compute_dtype(weight.dtype, device), device):
        logits = head_forward(hidden[chunk])
        rows = _fp32_rows(logits.shape[1], device)
        blocks = (tensor.split(rows) for tensor in (logits, targets[chunk], losses[chunk], hits[chunk]))
        for part, wanted, part_losses, part_hits in zip(*blocks, strict=True):
            part = part.float()
            part_losses.copy_(functional.cross_entropy(part, wanted, reduction="none"))
            part_hits.copy_(part.argmax(-1) == wanted)
    loss = (losses if weights is None else losses * weights).sum() * scale
    return TokenLoss(loss=loss, token_losses=losses, token_hits=hits)


class _HeadLoss(torch.autograd.Function):
    """The scaled sum of losses, with the gradients of hidden states and of the head's trained parameters.

    Takes the module that turns hidden states into logits; its own forward; [tokens] ids of targets, of which there may
    be none; the factor of the sum of losses; [tokens] weights of the losses in it, or None where all are 1; [tokens,
    width] hidden states; and the head's trained parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        head_forward: Callable[..., torch.Tensor],
        targets: torch.Tensor,
        scale: torch.Tensor | float,
        weights: torch.Tensor | None,
        hidden: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        weight, device = next(head.parameters()), hidden.device.type
        dtype = _compute_dtype(weight.dtype, device)
        chunks = _chunks(len(hidden), len(weight), dtype, device)
        # Of the gradient in hidden states, in fp32: the weights could take it out of the range of fp16.
        factor = scale if weights is None else scale * weights[:, None]
        if isinstance(head, nn.Linear) and head.bias is None and type(head).forward is nn.Linear.forward:
            loss, grad_hidden, grad_weight = _product_gradients(
                weight.to(dtype), weight.requires_grad, hidden, targets, scale, weights, chunks
            )
            grads = [] if grad_weight is None else [grad_weight.to(weight.dtype)]
        elif isinstance(head, NormHead) and type(head).forward is NormHead.forward:
            loss, grad_hidden, grads = _norm_head_gradients(head, dtype, hidden, targets, scale, weights, chunks)
        else:
            loss, grad_hidden, grads = _module_gradients(head_forward, hidden, targets, scale, weights, chunks, trained)
            factor = scale
        ctx.grad_hidden, ctx.grads, ctx.factor, ctx.dtype = grad_hidden, grads, factor, hidden.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Passed on, not shared: autograd copies gradients that something else holds.
        grad_hidden, grads = ctx.grad_hidden, ctx.grads
        del ctx.grad_hidden, ctx.grads
        grad_hidden = (grad_hidden.float() * (grad_loss * ctx.factor)).to(ctx.dtype)
        # On CPUs, finding that there is nothing to scale is cheaper than a pass over the head's gradient.
        if grad_loss.is_cuda or grad_loss != 1:
            for grad in grads:
                grad.mul_(grad_loss)
        return None, None, None, None, None, grad_hidden, *grads


# Its chunks are few and large: nothing to gain for the compiler, and a loop to unroll.
_differentiate = torch.compiler.disable(_HeadLoss.apply)


def _product_gradients(
    factor: torch.Tensor,
    trained: bool,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
    weights: torch.Tensor | None,
    chunks: list[slice],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The loss of the logits `hidden @ factor.t()`, which are computed in the factor's number format.

    Args:
        factor: [vocabulary, width].
        trained: whether its gradient is needed.
        hidden: [tokens, width].
        targets: [tokens].
        scale: factor of the sum of losses.
        weights: [tokens], of the losses in the sum; None where all are 1.
        chunks: of the tokens.

    Returns:
        The scaled loss; its gradient in hidden states without scale and weights; and, if trained, its scaled one in the
        factor, fp32.
    """
    device, dtype = hidden.device, factor.dtype
    rows = max(1, PRODUCT_BYTES.get(device.type, PRODUCT_BYTES["cuda"]) // (dtype.itemsize * factor.shape[1]))
    early: Any = scale
    if dtype == torch.float16:
        # It would underflow under the scale of thousands of tokens; there it comes last. Weights of pseudo-repetitions
        # have either sign, and their sum may be next to 0.
        items = len(hidden) if weights is None else weights.abs().sum()
        early = 1.0 / (items + (items == 0))
    losses = torch.empty(len(targets), dtype=torch.float32, device=device)
    grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=device)
    make = torch.empty if chunks else torch.zeros
    grad_factor = make(factor.shape, dtype=torch.float32, device=device) if trained else None
    # Allocated once, in few sizes: large blocks that come and go in all sizes leave holes that none fits into.
    most = chunks[0].stop if chunks else 0
    buffer = factor.new_empty(most if most < 256 else -(-most // 128) * 128, len(factor))
    with torch.autocast(device.type, enabled=False):
        for chunk in chunks:
            states = hidden[chunk].to(dtype)
            logits = torch.mm(states, factor.t(), out=buffer[: len(states)])
            losses[chunk] = _turn_into_gradients(logits, targets[chunk, None])
            torch.mm(logits, factor, out=grad_hidden[chunk])
            if grad_factor is None:
                continue
            states = (states * (early if weights is None else early * weights[chunk, None])).to(dtype)
            # A few rows of the vocabulary at a time: no second [vocabulary, width] in the product's own number format,
            # and on CPUs it is added while it is in the cache.
            for total, part in zip(grad_factor.split(rows), logits.t().split(rows), strict=True):
                (total.add_ if chunk.start else total.copy_)(part @ states)
    if grad_factor is not None and dtype == torch.float16:
        grad_factor *= scale / early
    loss = (losses if weights is None else losses * weights).sum() * scale
    return loss, grad_hidden, grad_factor


def _turn_into_gradients(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens] fp32 losses of [tokens, vocabulary] logits, which become their gradients: softmax minus one-hot.

    Targets are [tokens, 1].
    """
    rows = _fp32_rows(logits.shape[1], logits.device.type)
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for part, wanted, part_losses in zip(logits.split(rows), targets.split(rows), losses.split(rows), strict=True):
        probabilities = torch.softmax(part, -1, dtype=torch.float32)
        target_probabilities = probabilities.gather(-1, wanted)
        part_losses.copy_(-target_probabilities.log()[:, 0])
        tiny = (target_probabilities[:, 0] < TINY).nonzero()[:, 0]
        if len(tiny):
            part_losses[tiny] = functional.cross_entropy(part[tiny].float(), wanted[tiny, 0], reduction="none")
        probabilities.scatter_add_(-1, wanted, torch.full_like(target_probabilities, -1.0))
        part.copy_(probabilities)
    return losses


def _norm_head_gradients(
    head: NormHead,
    dtype: torch.dtype,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
    weights: torch.Tensor | None,
    chunks: list[slice],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """As `_product_gradients`, for logits `hidden @ (W / ||W||).t()`, each row of W divided by its own norm.

    The normalised rows n are computed once per step, and the gradient G in them becomes that in W at the end, in place
    and a few rows at a time: (G - n <n, G>) / ||W||, the part of G orthogonal to the row.
    """
    rows = _fp32_rows(head.weight.shape[1], head.weight.device.type)
    parts = list(zip(head.weight.split(rows), head.row_norms()[:, None].split(rows), strict=True))
    factor = torch.empty(head.weight.shape, dtype=dtype, device=head.weight.device)
    for normalised, (weight, norms) in zip(factor.split(rows), parts, strict=True):
        normalised.copy_(weight.float() / norms)
    loss, grad_hidden, grad_weight = _product_gradients(
        factor, head.weight.requires_grad, hidden, targets, scale, weights, chunks
    )
    if grad_weight is None:
        return loss, grad_hidden, []
    for grad, (weight, norms) in zip(grad_weight.split(rows), parts, strict=True):
        directions = weight.float() / norms
        grad.sub_(directions * (directions * grad).sum(-1, keepdim=True)).div_(norms)
    return loss, grad_hidden, [grad_weight.to(head.weight.dtype)]


def _module_gradients(
    head_forward: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
    weights: torch.Tensor | None,
    chunks: list[slice],
    trained: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """As `_product_gradients`, for any head: the graph of each chunk is built, differentiated and freed.

    The gradient in hidden states has its weights.
    """
    grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    grads = [torch.zeros_like(parameter) for parameter in trained]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk in chunks:
        with torch.enable_grad():
            states = hidden[chunk].detach().requires_grad_()
            logits = head_forward(states).float()
            if weights is None:
                part = functional.cross_entropy(logits, targets[chunk], reduction="sum")
            else:
                part = (functional.cross_entropy(logits, targets[chunk], reduction="none") * weights[chunk]).sum()
            grad_states, *grad_parts = torch.autograd.grad(part, [states, *trained])
        loss += part.detach()
        grad_hidden[chunk] = grad_states
        for grad, grad_part in zip(grads, grad_parts, strict=True):
            grad += grad_part * scale
    return loss * scale, grad_hidden, grads


def _chunks(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> list[slice]:
    """Slices of the tokens whose logits take CHUNK_BYTES at most."""
    most = max(32, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (dtype.itemsize * vocabulary))
    # Chunks of similar size: a short last one would cost as much as a full one in passes over the head's gradient.
    size = -(-tokens // max(1, -(-tokens // most)))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size))]


def _fp32_rows(columns: int, device: str) -> int:
    """How many rows of so many numbers are converted to fp32 at once."""
    return max(1, CACHED_LOGITS * (1 if device == "cpu" else 32) // columns)


def _compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Number format of the head's products: autocast's if it is on, else that of the weight."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
