"""Bases of several families with random weights, each with a tokenizer of its own class and added special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("qwen2", "qwen3", "llama", "gpt2", "qwen3_moe")
ADDED = ["<人物>", "<对白>"]
ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def write_tiny_base(family: str, embedded: Path, folder: Path, positions: int = 512) -> Path:
    """Write a base.

    Args:
        family: one of FAMILIES.
        embedded: the tiny-random base, whose byte-level vocabulary is taken.
        folder: where to.
        positions: that the model knows.
    """
    tokenizer = _tokenizer(family, embedded)
    tokenizer.add_special_tokens({"extra_special_tokens": ADDED})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = _model(family, len(tokenizer), positions)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)  # so that positions make a difference
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _model(family: str, vocabulary: int, positions: int) -> PreTrainedModel:
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=positions))
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions,
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=dict(LLAMA3)))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters=dict(ROPE)))
    sizes |= {"head_dim": 8}
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True, rope_parameters=dict(ROPE)))
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, rope_parameters=dict(ROPE)))


def _tokenizer(family: str, embedded: Path) -> PreTrainedTokenizerBase:
    model = json.loads((embedded / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    if family == "llama":
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"天地玄黄helowrd"]
        return LlamaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    if family == "gpt2":
        return GPT2Tokenizer(vocab=vocabulary | {"<|endoftext|>": len(vocabulary)}, merges=merges)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"<|endoftext|>": len(vocabulary)}, merges=merges)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    return tokenizer
