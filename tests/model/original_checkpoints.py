"""Small Baichuan checkpoints as their makers publish them: original names of tensors and fields, auto_map, pickles."""

import functools
import io
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch

from novelgpt.settings.paths import SAMPLES
from tests.model.original_weights import CODE, Shards, fill, write_json, write_weights

Position = Literal["rope", "alibi"]

SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "positions": 256}
HEADS = {"rope": {"hidden_size": 32, "num_attention_heads": 4}, "alibi": {"hidden_size": 40, "num_attention_heads": 5}}
# Ids of Baichuan2's first pieces: the last two are the marks of a question and of an answer.
USER_ID, ASSISTANT_ID = 195, 196
FIRST_RESERVED_ID, FIRST_RESERVED = 101, 12
PIECES = 1500


def write_original_baichuan(
    folder: Path,
    position: Position = "rope",
    norm_head: bool = False,
    shards: Shards = "bin",
    golden: bool = False,
    explicit: bool = True,
    **sizes: int,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint folder.

    Args:
        folder: made if it is not there.
        position: "rope" for the 7B models, "alibi" for the 13B ones.
        norm_head: whether it is a Baichuan2.
        shards: kind of file; sharded ones have an index.
        golden: weights from a sine, for which the original code's outputs are known; else random, the same each time.
        explicit: whether config.json names positions and head, which tiny sizes would not tell.
        **sizes: fields of the configuration, and "positions".

    Returns:
        The tensors under their original names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SIZES | HEADS[position] | {"vocab_size": PIECES} | sizes
    tensors = original_tensors(golden, sizes)
    # Published pickles of Baichuan-7B hold a buffer that is made, not learned.
    frequencies = torch.arange(sizes["hidden_size"] // sizes["num_attention_heads"] // 2).float()
    extra = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone()
        for layer in range(sizes["num_hidden_layers"] if position == "rope" and not norm_head else 0)
    }
    write_weights(folder, tensors | extra, shards)
    config = original_config(position, norm_head, sizes)
    if explicit:
        config |= {"position_embedding": position, "norm_head": norm_head}
    write_json(folder / "config.json", config)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "generation_config.json", {"_from_model_config": True, "transformers_version": "4.29.2"} | ends)
    write_original_tokenizer(folder, capital=position == "rope" and not norm_head)
    for name in ("configuration_baichuan", "modeling_baichuan"):
        (folder / f"{name}.py").write_text(CODE, encoding="utf-8")
    return tensors


def original_tensors(golden: bool, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """The tensors of any of the four models; only sizes differ."""
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for layer in range(sizes["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.W_pack": (3 * width, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items()
        }
    return fill(shapes, 5, golden, "norm")


def original_config(position: Position, norm_head: bool, sizes: dict[str, int]) -> dict[str, Any]:
    """config.json as published: the field of the length and the spelling of the class differ by model."""
    class_name = "BaichuanForCausalLM" if position == "alibi" or norm_head else "BaiChuanForCausalLM"
    lengths = {"max_position_embeddings": sizes["positions"], "model_max_length": sizes["positions"]}
    if position == "alibi":
        del lengths["max_position_embeddings"]
    elif not norm_head:
        del lengths["model_max_length"]
    return {
        "architectures": [class_name],
        "auto_map": {
            "AutoConfig": f"configuration_baichuan.{class_name.removesuffix('ForCausalLM')}Config",
            "AutoModelForCausalLM": f"modeling_baichuan.{class_name}",
        },
        "model_type": "baichuan",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.29.2",
        "use_cache": True,
        "_from_model_config": True,
        **{name: value for name, value in sizes.items() if name != "positions"},
        **lengths,
        **({"gradient_checkpointing": [False], "z_loss_weight": 0} if position == "alibi" else {}),
    }


def write_original_tokenizer(folder: Path, capital: bool = False) -> None:
    """tokenizer.model with Baichuan2's first ids, and a tokenizer_config.json that asks for remote code.

    Args:
        folder: where to.
        capital: the class has the name that the first model gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    name = "BaiChuanTokenizer" if capital else "BaichuanTokenizer"
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": [f"tokenization_baichuan.{name}", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        "tokenizer_class": name,
    }
    added = {key: {"__type": "AddedToken", "content": token, **flags} for key, token in specials.items()}
    write_json(folder / "tokenizer_config.json", settings | added)
    write_json(folder / "special_tokens_map.json", {key: {"content": specials[key], **flags} for key in specials})
    (folder / "tokenization_baichuan.py").write_text(CODE, encoding="utf-8")


@functools.cache
def tokenizer_model() -> bytes:
    """A small sentencepiece BPE with the settings of Baichuan2's, trained on the samples."""
    text = (SAMPLES / "novels" / "deng_ta_xia_de_xin.txt").read_text(encoding="utf-8")
    symbols = [f"<piece_{number}>" for number in range(3, FIRST_RESERVED_ID)]
    symbols[5 - 3], symbols[6 - 3] = "\n", "\t"
    symbols += [f"<reserved_{FIRST_RESERVED + number}>" for number in range(ASSISTANT_ID - FIRST_RESERVED_ID + 3)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
