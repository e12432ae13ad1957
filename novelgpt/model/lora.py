"""Settings of an adapter, on the experts of a mixture too, which transformers 5 holds as parameters, not modules."""

from __future__ import annotations

import copy

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from transformers import PreTrainedModel

from novelgpt.settings.arguments import LoraArguments
from novelgpt.settings.errors import UserError


def lora_config(
    model: PreTrainedModel, lora: LoraArguments, rows: dict[str, list[int]] | None = None
) -> tuple[LoraConfig, list[str]]:
    """Settings that peft can put an adapter on `model` with, and lines on what was settled for its experts.

    Args:
        model: the base.
        lora: what is asked for.
        rows: of embeddings and heads that are trained as they are, by module.

    Raises:
        UserError: what is asked for does not go together with experts.
    """
    everything = lora.lora_targets == ["all-linear"]
    parameters = [] if everything else modules_left(model, lora.lora_targets)[1]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if everything else [name for name in lora.lora_targets if name not in parameters],
        target_parameters=parameters or None,
        trainable_token_indices=rows or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    return config, _settle_experts(model, config)


def expert_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that hold the weights of all experts of a layer, as experts.gate_up_proj."""
    return {".".join(name.split(".")[-2:]) for name, weight in model.named_parameters() if weight.dim() == 3}


def _settle_experts(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Take the dropout out of settings that put an adapter on experts, and say whether they do.

    Names of the experts' layers as older checkpoints have them (gate_proj, up_proj, …) stand for the parameters that
    hold them now. No dropout comes before those, as peft adds the update to the weights themselves: where there are
    some, there is none in the whole adapter.

    Args:
        model: the base.
        config: its dropout is changed.

    Returns:
        Lines on what was settled; none for a base without experts.

    Raises:
        UserError: the names, or DoRA, do not go together with experts.
    """
    stacks = expert_parameters(model)
    if not stacks:
        return []
    tried = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(tried, model, get_model_conversion_mapping(model))
    except ValueError as error:
        raise UserError(f"--lora_targets: {error}", "name them together, or none of them") from error
    whole = set(tried.target_parameters or ())
    lines = []
    if not any(_is_end_of(name, stack) for name in whole for stack in stacks):
        lines.append(
            f"mixture of experts: LoRA leaves the experts as they are; --lora_targets … {' '.join(sorted(stacks))} "
            "adapts them as well"
        )
    if whole and config.use_dora:
        raise UserError(
            f"--use_dora does not go together with adapters on experts ({', '.join(sorted(whole))})",
            "leave it out, or name other modules: --lora_targets q_proj k_proj v_proj o_proj",
        )
    if whole and config.lora_dropout:
        config.lora_dropout = 0.0
        lines.append(
            f"mixture of experts: LoRA without dropout, as it adapts whole parameters: {', '.join(sorted(whole))}"
        )
    return lines


def modules_left(model: PreTrainedModel, targets: list[str]) -> tuple[list[str], list[str]]:
    """Names that stand for modules, and names of parameters; names that peft knows how to convert are in neither.

    Args:
        model: the base.
        targets: names, not "all-linear".
    """
    stacks = expert_parameters(model)
    modules = [name for name, _ in model.named_modules()]
    parameters = [
        target
        for target in targets
        if any(_is_end_of(target, stack) for stack in stacks) and not any(_is_end_of(target, name) for name in modules)
    ]
    left = [target for target in targets if target not in parameters]
    if stacks:
        tried = LoraConfig(task_type="CAUSAL_LM", target_modules=left)
        try:
            convert_peft_config_for_transformers(tried, model, get_model_conversion_mapping(model))
        except ValueError:  # told by `_settle_experts`
            return [], parameters
        left = [target for target in left if target in (tried.target_modules or ())]
    return left, parameters


def _is_end_of(target: str, name: str) -> bool:
    """Whether a name is another one, or its end after a dot."""
    return f".{name}".endswith(f".{target}")
