"""Export of a Baichuan with rotary positions as a Llama, which transformers and vLLM load without code for Baichuan.

    python -m novelgpt.export.llama CHECKPOINT OUTPUT

For serving. The head of a Baichuan2 is normalised once, so training the export no longer trains a Baichuan2; LoRA
adapters do not fit it (merge them first). There is no equivalent Llama for models with ALiBi (13B).
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from novelgpt.export.full_checkpoint import export_checkpoint, print_notes, with_settings
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.fast_tokenizer import as_fast_tokenizer
from novelgpt.model.baichuan.modeling import BaichuanForCausalLM, NormHead
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.text.baichuan_tokenizer import BaichuanTokenizer


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export the checkpoint that the command line names."""
    config = export_checkpoint("novelgpt.export.llama", "Llama", argv, check_has_llama, as_llama, portable_tokenizer)
    limits = ["LoRA adapters of the Baichuan do not fit the Llama"]
    if config.norm_head:
        limits.append("its head was normalised once: to train further, train the Baichuan2 and export again")
    print_notes(limits)


def check_has_llama(config: PreTrainedConfig, name: str) -> None:
    """Raise a UserError unless there is an equivalent Llama: for other models than Baichuan, and for ALiBi."""
    if not isinstance(config, BaichuanConfig):
        raise UserError(f"{name} is a {config.model_type}, not a Baichuan", "other models need no export to Llama")
    if config.position_embedding == "alibi":
        raise UserError(
            f"{name} has ALiBi, which adds to attention scores by distance; Llama turns queries and keys instead, "
            "and no weights make the one out of the other",
            "use the 13B models through transformers with this toolkit; the 7B models can be exported",
        )


def as_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """Convert to an equivalent Llama. Uses up the model: the two share tensors, and its fused matrices are deleted.

    Args:
        model: a BaichuanForCausalLM with rotary positions, in fp32 for an exact head.
    """
    assert isinstance(model, BaichuanForCausalLM)
    baichuan: BaichuanConfig = model.config
    config = LlamaConfig(
        vocab_size=baichuan.vocab_size,
        hidden_size=baichuan.hidden_size,
        intermediate_size=baichuan.intermediate_size,
        num_hidden_layers=baichuan.num_hidden_layers,
        num_attention_heads=baichuan.num_attention_heads,
        num_key_value_heads=baichuan.num_attention_heads,
        hidden_act=baichuan.hidden_act,
        max_position_embeddings=baichuan.max_position_embeddings,
        initializer_range=baichuan.initializer_range,
        rms_norm_eps=baichuan.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": baichuan.rope_theta},
        tie_word_embeddings=False,
        pad_token_id=baichuan.pad_token_id,
        bos_token_id=baichuan.bos_token_id,
        eos_token_id=baichuan.eos_token_id,
    )
    for layer in model.model.layers:
        attention = layer.self_attn
        packed = attention.W_pack.weight.detach()
        del attention.W_pack
        for name, part in zip(("q_proj", "k_proj", "v_proj"), packed.chunk(3), strict=True):
            linear = torch.nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(part.clone(), requires_grad=False)
            attention.register_module(name, linear)
        del packed, part
    if isinstance(model.lm_head, NormHead):
        model.lm_head.weight.detach().div_(model.lm_head.row_norms().detach()[:, None])
    with torch.device("meta"):
        llama = LlamaForCausalLM._from_config(config, attn_implementation=model.config._attn_implementation)
    llama.load_state_dict(model.state_dict(), assign=True)
    # Not a weight, and left empty by the meta device.
    llama.model.rotary_emb = LlamaRotaryEmbedding(config)
    llama.generation_config = model.generation_config
    return llama.eval()


def portable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Convert to a tokenizer of the same ids that loads without this toolkit; if there is none, return the original."""
    if not isinstance(tokenizer, BaichuanTokenizer):
        return tokenizer
    fast = as_fast_tokenizer(tokenizer)
    if fast is None:
        print_notes(["no fast tokenizer of the same ids was found: the export's tokenizer needs this toolkit to load"])
        return tokenizer
    return with_settings(fast, tokenizer)


if __name__ == "__main__":
    main()
