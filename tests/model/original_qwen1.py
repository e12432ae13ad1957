"""Small Qwen v1 checkpoints as their makers publish them: names of tensors and fields, qwen.tiktoken, auto_map."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from tests.model.original_weights import CODE, Shards, fill, write_json, write_weights

Style = Literal["later", "first"]

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 96,  # the layers are half as wide
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 256,
    "max_position_embeddings": 1024,
}
FIRST_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "vocab_size": "padded_vocab_size",
}
# Pieces of text that get a token of their own, as far as the vocabulary reaches.
CHARACTERS = "的一了是不我在人有他这个上们来到时大地为子中你说问题回答第海文字好"
SPECIAL_TOKENS = 208
AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenLMHeadModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}


def write_original_qwen1(
    folder: Path, shards: Shards = "safetensors", style: Style = "later", golden: bool = False, **sizes: int
) -> dict[str, torch.Tensor]:
    """Write a checkpoint folder.

    Args:
        folder: made if it is not there.
        shards: kind of file, in one piece or in three with an index.
        style: names of the fields in config.json, those of the first release or the later ones.
        golden: weights from a sine, for which the original code's outputs are known; else random, the same each time.
        **sizes: instead of those in `SIZES`.

    Returns:
        The tensors under their original names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SIZES | sizes
    tensors = original_tensors(golden, sizes)
    write_weights(folder, tensors, shards)
    write_json(folder / "config.json", original_config(style, sizes))
    ranks = rank_file(sizes["vocab_size"] - SPECIAL_TOKENS)
    (folder / "qwen.tiktoken").write_bytes(ranks)
    end_of_text = len(ranks.splitlines())  # the first id after them
    ends = {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
    write_json(folder / "generation_config.json", {"chat_format": "raw", "max_new_tokens": 512, "top_k": 0} | ends)
    tokenizer = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    settings = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer", "auto_map": tokenizer}
    write_json(folder / "tokenizer_config.json", settings)
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen"):
        (folder / f"{name}.py").write_text(CODE, encoding="utf-8")
    return tensors


def original_tensors(golden: bool, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """19 tensors for two layers."""
    width, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    attended, inner = sizes["num_attention_heads"] * sizes["kv_channels"], sizes["intermediate_size"] // 2
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.ln_f.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for layer in range(sizes["num_hidden_layers"]):
        shapes |= {
            f"transformer.h.{layer}.{name}": shape
            for name, shape in {
                "ln_1.weight": (width,),
                "attn.c_attn.weight": (3 * attended, width),
                "attn.c_attn.bias": (3 * attended,),
                "attn.c_proj.weight": (width, attended),
                "ln_2.weight": (width,),
                "mlp.w1.weight": (inner, width),
                "mlp.w2.weight": (inner, width),
                "mlp.c_proj.weight": (width, inner),
            }.items()
        }
    return fill(shapes, 3, golden, "ln_")


def original_config(style: Style, sizes: dict[str, int]) -> dict[str, Any]:
    """config.json as published."""
    config: dict[str, Any] = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": AUTO_MAP,
        "model_type": "qwen",
        "bf16": False,
        "fp16": False,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
    }
    if style == "later":
        return config | sizes | {"attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "tokenizer_class": "QWenTokenizer"}
    renamed = {FIRST_NAMES.get(name, name): size for name, size in sizes.items()}
    return config | renamed | {"n_inner": None, "resid_pdrop": 0.1, "attn_pdrop": 0.0, "activation": "swiglu"}


def rank_file(ranks: int) -> bytes:
    """qwen.tiktoken with so many ranks, at least 256: all bytes, then pieces of `CHARACTERS`, each made of two."""
    tokens = [bytes([value]) for value in range(256)]
    for piece in _pieces():
        if len(tokens) >= ranks:
            break
        if piece not in tokens:
            tokens.append(piece)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _pieces() -> Iterator[bytes]:
    yield b"12"  # which no text gives, as each digit is a piece of its own
    for character in CHARACTERS:
        encoded = character.encode()
        yield encoded[:2]
        yield encoded
