"""The loss that balances the load of the experts of a mixture, beside the cross-entropy (arXiv:2101.03961)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from novelgpt.settings.errors import UserError

# Its name in the modules of transformers' architectures that have it, and its parameters there.
FUNCTION = "load_balancing_loss_func"
PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
# The coefficient that most architectures were trained with.
USUAL = 0.001


@dataclass(frozen=True)
class RouterBalance:
    """The weight of the balancing loss of a model's routers, and transformers' own function for it.

    Attributes:
        coefficient: factor before it is added to the cross-entropy, above 0.
        function: (router logits of all layers, each [tokens, experts]; number of experts; experts of a token; mask
            [rows, tokens] of what is not padding, or None) -> []. From the number of experts of a token, where all are
            used evenly, to the number of all, where the same few are used.
        experts: of a layer.
        chosen: experts of a token.
    """

    coefficient: float
    function: Callable[..., torch.Tensor]
    experts: int
    chosen: int

    def loss(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        """The loss, [], of one forward pass, not yet multiplied by the coefficient.

        Raises:
            UserError: the loss has no gradient.
        """
        loss = self.function(router_logits, self.experts, self.chosen, mask)
        if not loss.requires_grad:
            raise UserError(
                "the routers' balancing loss has no gradient, as activation checkpointing cuts it off",
                "take use_reentrant false in --activation_checkpointing_kwargs, or --router_aux_loss_coef 0",
            )
        return loss


def router_balance(model: PreTrainedModel, coefficient: float | None = None) -> RouterBalance | None:
    """The balancing of the routers of a model in training; None where there is none.

    Args:
        model: a causal language model, usually without routers.
        coefficient: 0 for no balancing; None for that of config.json: its router_aux_loss_coef where
            output_router_logits is true, as in transformers.

    Raises:
        UserError: a coefficient is given, and the architecture has no such loss.
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
    """A line on the balancing of routers, None for models that have none."""
    if balance is not None:
        return f"mixture of {balance.experts} experts: {balance.coefficient:g} x the routers' balancing loss is added"
    if FUNCTION not in vars(sys.modules[type(model).__module__]):
        return None
    usual = vars(model).get("router_aux_loss_coef") or USUAL
    return f"mixture of experts: the routers' balancing loss is off; --router_aux_loss_coef {usual:g} adds it"
