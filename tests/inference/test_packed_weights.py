"""A model with packed weights computes what the same model with plain ones does, and holds them once."""

import copy
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from novelgpt.inference.loading import load_for_inference
from novelgpt.inference.packed_weights import PackedLinear, pack_weights
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.modeling import BaichuanForCausalLM
from novelgpt.model.loading import load_model
from novelgpt.settings.arguments import ModelArguments
from tests.rounding import assert_close

SIZES = {"vocab_size": 500, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}


def qwen2(tied: bool) -> PreTrainedModel:
    """Whose projections have biases."""
    config = Qwen2Config(**SIZES, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=tied)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def baichuan2() -> PreTrainedModel:
    """Whose output layer is of its own kind."""
    return BaichuanForCausalLM(BaichuanConfig(**SIZES, num_attention_heads=6, position_embedding="rope"))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Qwen2": lambda: qwen2(False), "Qwen2, tied": lambda: qwen2(True), "Baichuan2": baichuan2,
}  # fmt: skip
PACKED = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def held(model: nn.Module) -> int:
    """Numbers in its weights, packed or not, each storage once."""
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in model.parameters()}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return sum(tensors.values()) + sum(module.in_features * module.out_features for module in packed)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]().eval()
    packed = copy.deepcopy(plain)
    pack_weights(packed)
    assert any(isinstance(module, PackedLinear) for module in packed.modules()) == PACKED
    if PACKED:
        assert not any(type(module) is nn.Linear for module in packed.modules())
    for rows, tokens in ((1, 1), (1, 7), (3, 40), (40, 1)):
        ids = torch.randint(0, 500, (rows, tokens))
        assert_close(packed(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_held_once(name: str) -> None:
    plain = MODELS[name]()
    packed = copy.deepcopy(plain)
    pack_weights(packed)
    head = packed.get_output_embeddings()
    again = head.weight.numel() if isinstance(head, PackedLinear) else 0  # others share or read them
    assert held(packed) == held(plain) + again
    assert packed.dtype == torch.float32 and packed.device.type == "cpu"


def test_weights_of_another_type_stay_as_they_are() -> None:
    model = qwen2(False).to(torch.bfloat16)
    pack_weights(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("absent", ["_reorder_linear_weight", "_linear_pointwise"])
def test_weights_stay_plain_where_torch_lacks_one_of_its_private_ops(
    absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    ops = {"_reorder_linear_weight": None, "_linear_pointwise": None}
    del ops[absent]
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**ops))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    model = qwen2(False)
    pack_weights(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.skipif(torch.cuda.is_available() or not PACKED, reason="models are generated with as they are here")
def test_what_is_loaded_to_generate_is_packed(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    arguments = ModelArguments(str(base_folder))
    plain, packed = load_model(arguments, tokenizer).eval(), load_for_inference(arguments, tokenizer)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    ids = torch.arange(10, 60)[None]
    with torch.inference_mode():
        assert_close(packed(ids).logits, plain(ids).logits)
