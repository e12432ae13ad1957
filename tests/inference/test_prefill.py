"""Prompts that are read piece by piece are answered as those that are read alone."""

import random
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from novelgpt.inference.generation import answer_batch
from novelgpt.inference.preallocated_cache import CPU_STEP_TOKENS, left_padded, preallocated_cache, prefill
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.modeling import BaichuanForCausalLM
from novelgpt.settings.arguments import GenerationArguments
from tests.rounding import assert_close

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "initializer_range": 0.2}
NEVER = [2**31 - 1]


def qwen3(vocabulary: int) -> PreTrainedModel:
    config = Qwen3Config(**SIZES, vocab_size=vocabulary, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    return Qwen3ForCausalLM(config)


def adapted(vocabulary: int) -> PreTrainedModel:
    options = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(qwen3(vocabulary), options)


def baichuan(position: str) -> Callable[[int], PreTrainedModel]:
    def make(vocabulary: int) -> PreTrainedModel:
        config = BaichuanConfig(
            **SIZES, vocab_size=vocabulary, intermediate_size=64, position_embedding=position, norm_head=False
        )
        return BaichuanForCausalLM(config)

    return make


MODELS = {"Qwen3": qwen3, "adapter": adapted, "rotary": baichuan("rope"), "ALiBi": baichuan("alibi")}


def prompts_of(lengths: list[int], vocabulary: int) -> list[list[int]]:
    choose = random.Random(5)
    return [choose.choices(range(10, vocabulary), k=length) for length in lengths]


LENGTHS = [1, 150, 149, 80, 2, 151, 90, 33, 150, 7, 148, 60]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(6)
    return MODELS[request.param](len(tokenizer)).eval()


def test_the_cache_holds_the_states_of_all_tokens_but_the_last(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = prompts_of(LENGTHS, len(tokenizer))
    batch = left_padded(prompts, 0)
    assert batch["input_ids"].numel() > CPU_STEP_TOKENS
    cache, whole = preallocated_cache(model, 200), DynamicCache(config=model.config)
    assert cache is not None
    with torch.no_grad():
        prefill(model, prompts, 0, cache, beams=2)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**batch, position_ids=positions, past_key_values=whole, use_cache=True)
    present = batch["attention_mask"][:, None, :-1, None].bool()
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        for states, expected in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert states.shape[2] == max(LENGTHS) - 1
            assert torch.equal(states[0::2], states[1::2])
            read, wanted = (part.masked_fill(~present, 0) for part in (states[::2], expected[:, :, :-1]))
            assert_close(read, wanted)


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_prompts_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, beams: int
) -> None:
    prompts = prompts_of(LENGTHS, len(tokenizer))
    settings = GenerationArguments(max_new_tokens=12, num_beams=beams, repetition_penalty=1.2)
    with torch.no_grad():
        together = answer_batch(model, tokenizer, prompts, settings, NEVER)
        for number in (0, 1, 4, 7, 11):
            assert answer_batch(model, tokenizer, [prompts[number]], settings, NEVER) == [together[number]]


def test_what_fits_into_one_piece_is_left_to_generate(tokenizer: PreTrainedTokenizerBase) -> None:
    cache = preallocated_cache(chosen := qwen3(len(tokenizer)), 200)
    assert cache is not None
    prefill(chosen, prompts_of([CPU_STEP_TOKENS // 4] * 4, len(tokenizer)), 0, cache, beams=1)
    assert cache.get_seq_length() == 0
    prefill(chosen, [[5]] * (CPU_STEP_TOKENS + 1), 0, cache, beams=1)
    assert cache.get_seq_length() == 0
