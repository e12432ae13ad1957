"""Loading a base or a checkpoint through AutoModel, without remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError


def load_model(
    model: ModelArguments, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32, qlora: bool = False
) -> PreTrainedModel:
    """The causal language model of a folder or hub name.

    Args:
        model: where it lies and which attention it uses.
        tokenizer: its tokenizer, whose ids must fit the embedding.
        dtype: of the weights; fp32 for full training, where small updates would be lost in bf16.
        qlora: hold the weights in 4 bits.

    Raises:
        UserError: nothing to load, an unknown architecture, 4 bits without their package, or a vocabulary that does
            not fit.
    """
    options = {"quantization_config": _four_bits()} if qlora else {}
    # Absolute, as checkpoints and adapters note where their base lies.
    source = str(Path(model.model).absolute()) if Path(model.model).is_dir() else model.model
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation=_attention(model, config),
            trust_remote_code=False, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"no model can be loaded from {model.model}: {str(error).strip().splitlines()[0]}",
            "check --model: a folder with config.json and safetensors, or a hub name",
        ) from error
    rows = loaded.config.vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {model.model} has {len(tokenizer)} tokens, the model's embedding {rows}",
            "use the tokenizer that belongs to the model",
        )
    loaded.config.use_cache = False
    return loaded


def _attention(model: ModelArguments, config: PreTrainedConfig) -> str | None:
    """The kernel asked for; transformers' choice where the architecture cannot take ours."""
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model.attention == PACKED_ATTENTION and (architecture is None or not architecture.is_backend_compatible()):
        return None
    return model.attention


def load_for_generation(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A full checkpoint, or a base with an adapter merged into it in memory, ready to generate.

    Merged, since an unmerged adapter adds two products to each layer of each token.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    base = adapter_base(model.model)
    loaded = load_model(ModelArguments(base or model.model, model.attention), tokenizer, dtype)
    if base is not None:
        loaded = PeftModel.from_pretrained(loaded, model.model).merge_and_unload()
    loaded.config.use_cache = True
    loaded.eval()
    return loaded.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]


def adapter_base(folder: str) -> str | None:
    """The base that an adapter folder was trained on; None where the folder is no adapter."""
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        return None
    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _four_bits() -> object:
    if not torch.cuda.is_available():
        raise UserError("--qlora needs a CUDA device", "leave --qlora out, or run on a machine with a GPU")
    try:
        import bitsandbytes  # noqa: F401  only to tell early that it is missing
    except ImportError as error:
        raise UserError("--qlora needs the package bitsandbytes", "pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )
