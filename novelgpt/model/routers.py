"""The loss that keeps the experts of a mixture evenly used, beside the cross-entropy (arXiv:2101.03961)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from novelgpt.settings.errors import UserError

# What transformers names it in the modules of the architectures that have it, and what it takes there.
FUNCTION = "load_balancing_loss_func"
PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
# What most architectures were trained with, which a remedy may name.
USUAL = 0.001


@dataclass(frozen=True)
class RouterBalance:
    """How much the balancing loss of a model's routers counts, and transformers' own function for it.

    Attributes:
        coefficient: factor before it is added to the cross-entropy, above 0.
        function: (router logits of all layers, each [tokens, experts]; number of experts; experts of a token; mask
            [rows, tokens] of what is no padding, or None) -> []. As many as the experts of a token where all are used
            alike, up to the number of all where the same few are taken.
        experts: of a layer.
        chosen: experts of a token.
    """

    coefficient: float
    function: Callable[..., torch.Tensor]
    experts: int
    chosen: int

    def loss(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        """[] of one forward pass, not yet multiplied by the coefficient.

        Raises:
            UserError: it has no gradient.
        """
        loss = self.function(router_logits, self.experts, self.chosen, mask)
        if not loss.requires_grad:
            raise UserError(
                "the routers' balancing loss has no gradient, as activation checkpointing cuts it off",
                "take use_reentrant false in --activation_checkpointing_kwargs, or --router_aux_loss_coef 0",
            )
        return loss


def router_balance(model: PreTrainedModel, coefficient: float | None = None) -> RouterBalance | None:
    """How the routers of a model are kept balanced in training; None where nothing does.

    Args:
        model: a causal language model, as a rule without routers.
        coefficient: 0 for no balancing; None for what config.json asks for: its router_aux_loss_coef where
            output_router_logits is true, as in transformers.

    Raises:
        UserError: a coefficient, and no such loss in this architecture.
    """
    config = model.config.get_text_config()
    function = vars(sys.modules[type(model).__module__]).get(FUNCTION)
    if coefficient is None:
        asked = bool(vars(config).get("output_router_logits")) and function is not None
        coefficient = float(vars(model).get("router_aux_loss_coef") or 0.0) if asked else 0.0
    if not coefficient:
        return None
    if function is None or list(inspect.signature(function).parameters) != PARAMETERS:
        raise UserError(
            f"--router_aux_loss_coef {coefficient:g}: {type(model).__name__} has no balancing loss of routers",
            "leave it out, or set it to 0",
        )
    held: dict[str, Any] = vars(model)
    return RouterBalance(coefficient, function, held["num_experts"], held["num_experts_per_tok"])


def explain_balance(model: PreTrainedModel, balance: RouterBalance | None) -> str | None:
    """A line on what is done for the routers, None for models that have none to balance."""
    if balance is not None:
        return f"mixture of {balance.experts} experts: {balance.coefficient:g} x the routers' balancing loss is added"
    if FUNCTION not in vars(sys.modules[type(model).__module__]):
        return None
    usual = vars(model).get("router_aux_loss_coef") or USUAL
    return f"mixture of experts: the routers' balancing loss is off; --router_aux_loss_coef {usual:g} adds it"
