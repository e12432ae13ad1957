"""Attaching a LoRA adapter to a base, through peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from novelgpt.settings.arguments import LoraArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process


def base_dtype() -> torch.dtype:
    """Of the frozen base: bf16 on GPUs that have it, else fp32. The adapter's own weights are fp32 in any case."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def attach_lora(model: PreTrainedModel, lora: LoraArguments) -> PeftModel:
    """The model with a fresh adapter, which alone is trained.

    Raises:
        UserError: no module has a name of `lora_targets`.
    """
    targets: str | list[str] = lora.lora_targets
    if lora.lora_targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    if lora.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if part._parameters})
        raise UserError(f"--lora_targets {' '.join(lora.lora_targets)}: {error}",
                        f"take some of {', '.join(names)}, or all-linear") from error  # fmt: skip
    # With activation checkpointing, adapters get no gradient unless the embedding's output asks for one.
    adapted.enable_input_require_grads()
    if is_first_process():
        adapted.print_trainable_parameters()
    return adapted  # type: ignore[return-value]
