"""A Baichuan with rotary positions as a Llama, which transformers and vLLM load without code for Baichuan.

    python -m novelgpt.export.llama CHECKPOINT OUTPUT

For serving. The head of a Baichuan2 is normalised once, so training what comes out is no longer training a Baichuan2;
its LoRA adapters do not fit (merge them before). Models with ALiBi (13B) have no Llama of the same function.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from novelgpt.export.full_checkpoint import (
    export_checkpoint,
    print_notes,
    read_export_words,
    read_full_config,
    with_settings,
)
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.fast_tokenizer import as_fast_tokenizer
from novelgpt.model.baichuan.modeling import BaichuanForCausalLM, NormHead
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.text.baichuan_tokenizer import BaichuanTokenizer

PARTS = ("q_proj", "k_proj", "v_proj")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export the checkpoint that the command line names."""
    program = "python -m novelgpt.export.llama"
    words = read_export_words(program, "A Baichuan with rotary positions as a Llama.", "Llama", argv)
    config = read_full_config(ModelArguments(words.checkpoint, "sdpa"))
    check_has_llama(config, words.checkpoint)
    export_checkpoint(words, as_llama, portable_tokenizer, "Llama")
    limits = ["LoRA adapters of the Baichuan do not fit the Llama"]
    if config.norm_head:
        limits.append("its head was normalised once: to train further, train the Baichuan2 and export again")
    print_notes(limits)


def check_has_llama(config: PreTrainedConfig, name: str) -> None:
    """Make sure that a Llama of the same function exists.

    Raises:
        UserError: the model is no Baichuan, or one with ALiBi.
    """
    if not isinstance(config, BaichuanConfig):
        raise UserError(f"{name} is a {config.model_type}, no Baichuan", "other models need no export to Llama")
    if config.position_embedding == "alibi":
        raise UserError(
            f"{name} has ALiBi, which adds to attention scores by distance; Llama turns queries and keys instead, "
            "and no weights make the one out of the other",
            "use the 13B models through transformers with this toolkit; the 7B models can be exported",
        )


def as_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same function as a Llama. Uses up the model: the two share tensors, and its fused matrices are gone.

    Args:
        model: a BaichuanForCausalLM with rotary positions, in fp32 for an exact head.
    """
    assert isinstance(model, BaichuanForCausalLM)
    config = llama_config(model.config)
    for layer in model.model.layers:
        attention = layer.self_attn
        parts = attention.W_pack.weight.detach().chunk(3)
        del attention.W_pack
        for name, part in zip(PARTS, parts, strict=True):
            attention.register_module(name, _linear(part.clone()))
        del parts
    if isinstance(model.lm_head, NormHead):
        norms = model.lm_head.row_norms().detach()[:, None]
        model.lm_head.weight.detach().div_(norms)
    with torch.device("meta"):
        llama = LlamaForCausalLM._from_config(config, attn_implementation=model.config._attn_implementation)
    llama.load_state_dict(model.state_dict(), assign=True)
    # Not a weight, and without numbers where the module was made.
    llama.model.rotary_emb = LlamaRotaryEmbedding(config)
    llama.generation_config = model.generation_config
    return llama.eval()


def llama_config(config: BaichuanConfig) -> LlamaConfig:
    """The Llama of the same sizes."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def portable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that loads without this toolkit and gives the same ids; where there is none, the tokenizer itself."""
    if not isinstance(tokenizer, BaichuanTokenizer):
        return tokenizer
    fast = as_fast_tokenizer(tokenizer)
    if fast is None:
        print_notes(["no fast tokenizer of the same ids was found: the export's tokenizer needs this toolkit to load"])
        return tokenizer
    return with_settings(fast, tokenizer)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


if __name__ == "__main__":
    main()
