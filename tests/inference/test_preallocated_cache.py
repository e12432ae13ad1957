"""The cache with room ahead holds what transformers' own holds: the same states, so the same logits, bit by bit."""

import random
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from novelgpt.inference.preallocated_cache import GROWTH, MIN_GROWTH_TOKENS, PreallocatedLayer, preallocated_cache
from novelgpt.model import attention
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.modeling import BaichuanForCausalLM
from novelgpt.model.qwen1.configuration import QWenConfig
from novelgpt.model.qwen1.modeling import QWenLMHeadModel

LENGTHS = (3, 21, 14, 1)
NEW_TOKENS = 70  # more than one buffer's room
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 96}
GENERATION = {"max_new_tokens": NEW_TOKENS, "eos_token_id": 1000, "pad_token_id": 0}


def qwen3(implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = Qwen3Config(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    return Qwen3ForCausalLM._from_config(config, attn_implementation=implementation).to(dtype)


def baichuan(position: str) -> PreTrainedModel:
    config = BaichuanConfig(**SIZES, intermediate_size=64, position_embedding=position, norm_head=True)
    return BaichuanForCausalLM(config)


def qwen1() -> PreTrainedModel:
    return QWenLMHeadModel(QWenConfig(**SIZES, kv_channels=8, intermediate_size=128, seq_length=256))


def gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=kinds
    )
    return Gemma3ForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "grouped heads": qwen3,
    "grouped heads, eager": lambda: qwen3("eager"),
    "grouped heads, packed": lambda: qwen3(attention.PACKED_ATTENTION),
    "grouped heads, bf16": lambda: qwen3(dtype=torch.bfloat16),
    "Baichuan, rotary": lambda: baichuan("rope"),
    "Baichuan, ALiBi": lambda: baichuan("alibi"),
    "Qwen v1": qwen1,
    "sliding and full": gemma3,
}


def left_padded() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    mask = torch.tensor([[0] * (max(LENGTHS) - length) + [1] * length for length in LENGTHS])
    return {"input_ids": torch.randint(1, 90, mask.shape) * mask, "attention_mask": mask}


def generate(model: PreTrainedModel, cache: DynamicCache | None, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits of each step) under one seed."""
    config = GenerationConfig(**(GENERATION | more), return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(4)
    made = model.generate(**left_padded(), generation_config=config, past_key_values=cache)
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("choice", [{}, {"num_beams": 3, "repetition_penalty": 1.3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", MODELS)
def test_every_step_has_the_logits_of_transformers_cache(name: str, choice: dict[str, object]) -> None:
    torch.manual_seed(2)
    model = MODELS[name]().eval()
    cache = preallocated_cache(model, max(LENGTHS) + NEW_TOKENS)
    assert cache is not None
    tokens, logits = generate(model, cache, **choice)
    expected_tokens, expected = generate(model, DynamicCache(config=model.config), **choice)
    assert torch.equal(tokens, expected_tokens)
    assert len(logits) == NEW_TOKENS
    assert torch.equal(logits, expected)


def test_an_adapter_that_is_not_merged_generates_with_it() -> None:
    torch.manual_seed(2)
    options = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(qwen3(), options).eval()
    tokens, logits = generate(model, preallocated_cache(model, 91))
    expected_tokens, expected = generate(model, None)
    assert torch.equal(tokens, expected_tokens) and torch.equal(logits, expected)


def states(tokens: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, and values whose heads are of another size."""
    return torch.randn(rows, 2, tokens, 8).to(dtype), torch.randn(rows, 2, tokens, 6).to(dtype)


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_changes_leaves_the_same_states(seed: int) -> None:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    ours, theirs = PreallocatedLayer(choose.choice([30, 80, 1000])), DynamicLayer()
    rows = 4
    for _ in range(60):
        change = choose.choice(["update"] * 6 + ["crop", "reorder", "repeat", "select", "reset"])
        length = theirs.get_seq_length()
        if change == "update" or not length:
            rows = rows if length else 4
            new = states(choose.choice([1, 1, 1, 5, 40]), rows)
            handed, expected = ours.update(*new), theirs.update(*new)
            assert all(torch.equal(one, other) for one, other in zip(handed, expected, strict=True))
        elif change == "reset" or rows > 30:
            for layer in (ours, theirs):
                layer.reset()
        else:
            index = torch.tensor(choose.choices(range(rows), k=rows))
            kept = torch.tensor(sorted(choose.sample(range(rows), k=max(1, rows - 1))))
            crop = -choose.randrange(0, length)
            for layer in (ours, theirs):
                match change:
                    case "crop":
                        layer.crop(crop)
                    case "reorder":
                        layer.reorder_cache(index)
                    case "repeat":
                        layer.batch_repeat_interleave(2)
                    case "select":
                        layer.batch_select_indices(kept)
            rows = len(theirs.keys)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_room_is_bounded_and_seldom_renewed(dtype: torch.dtype) -> None:
    layer, most = PreallocatedLayer(max_tokens=900), 900
    layer.update(*states(100, dtype=dtype))
    buffers = set()
    for tokens in range(101, 1001):
        layer.update(*states(1, dtype=dtype))
        for buffer in (layer.key_buffer, layer.value_buffer):
            assert buffer is not None and buffer.dtype == dtype
            room = buffer.shape[2]
            assert tokens <= room <= max(tokens, most)
            assert room - tokens <= max(MIN_GROWTH_TOKENS, tokens * GROWTH)
        assert layer.key_buffer is not None
        buffers |= {layer.key_buffer.shape[2]} if tokens <= most else set()
    # From 100 to 900 tokens: 32 more at a time up to 256, then an eighth more.
    assert len(buffers) <= 16


def test_beams_are_chosen_with_their_room() -> None:
    layer = PreallocatedLayer(max_tokens=100)
    layer.update(*states(40))
    layer.reorder_cache(torch.tensor([1, 1, 0, 3]))
    chosen = layer.key_buffer
    layer.update(*states(1))
    assert layer.key_buffer is chosen


def test_other_kinds_of_layers_stay_as_they_are() -> None:
    mixed = preallocated_cache(gemma3(), 100)
    assert mixed is not None
    assert [type(layer) for layer in mixed.layers] == [DynamicSlidingWindowLayer, PreallocatedLayer]
    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert preallocated_cache(mamba, 100) is None
    quantized = qwen3()
    assert quantized.generation_config is not None
    quantized.generation_config.cache_implementation = "quantized"
    assert preallocated_cache(quantized, 100) is None
