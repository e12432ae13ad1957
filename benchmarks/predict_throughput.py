"""Tokens a second of prediction: batches and continuous batching against `generate` called for one prompt at a time.

    python benchmarks/predict_throughput.py [--prompts 64] [--new_tokens 128] [--model small] [--json FILE]

A model with random weights answers prompts of mixed length, greedily, without ever ending: so each way makes the same
number of tokens, which must be the same tokens. Ways take turns; each figure is the median of its rounds. One by one,
only every fourth prompt by length is answered: the same mix, in a quarter of the time. "One by one" is `generate` of a
model as transformers loads it; all other ways have the packed weights that `predict` gives a model on a CPU, one by one
too in the line that says so. The process starts anew with the settings of memory that scripts/launch.sh makes. The last
comparison is of a model into which an adapter was merged against the same model without one.

The default model has layers of the sizes of Qwen2.5-0.5B, 6 of its 24: its 380 MB of weights fit into no cache of a
processor, as with any model that is of use. `--model small` is a Qwen3-like one of 26 M.

What bounds the ratio: a prompt is read in products of many rows, which cost the same both ways; at that, batches save
nothing. To write a token, one row alone waits for all weights to come from memory, which rows together do once for all:
they are bound by the arithmetic, and by their own keys and values, which are read for each row as before. With r
seconds of reading for each new token, w of writing it alone and b in a batch, the ratio is (r + w) / (r + b): it grows
with the length of the answers (`predict` writes up to 512 tokens) and with the number of rows, until keys and values
outweigh the weights. The line "reading prompts" says what r is here. More cores make b and r smaller, but not w, which
the memory decides.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from results import at_least, make_console, make_parser, result, show_results, write_results
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from novelgpt.inference.generation import answer_continuously, answer_prompts
from novelgpt.inference.packed_weights import pack_weights
from novelgpt.model.lora import merge_adapter
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, ModelArguments
from novelgpt.settings.small_bases import TINY_RANDOM
from novelgpt.text.token_bytes import is_whole, token_bytes

SPEED_TARGET = 12.0
NEVER = [2**31 - 1]  # no token has this number: no answer ends before its last token
BATCH_SIZES = (32, 64)
ALONE_EVERY = 4
# New tokens where a merged model is compared with a full one: the products are the same at each of them.
MERGED_NEW_TOKENS = 32
# As scripts/launch.sh sets them; glibc reads them when a process starts.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30)}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6,
                "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "small": {"model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
}  # fmt: skip
Model = PreTrainedModel


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Random weights, spread widely enough that the likeliest token is no close call.

    It is never a part of a character: those cannot follow everywhere in batches, which the other ways do not know.
    """
    torch.manual_seed(1)
    config = AutoConfig.for_model(**SHAPES[name], vocab_size=len(tokenizer), initializer_range=0.05)
    model: Model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    assert head is not None
    with torch.no_grad():
        head.weight[parts_of_characters(tokenizer)] = 0
    return model.eval()


def parts_of_characters(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that hold some bytes of a character."""
    vocabulary = enumerate(token_bytes(tokenizer))
    return [token for token, data in vocabulary if data is not None and not is_whole(data)]


def make_prompts(count: int, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Of 16 to 256 tokens each, drawn evenly; the longest first."""
    generator = random.Random(1)
    words = sorted({*range(len(tokenizer))} - {*tokenizer.all_special_ids, *parts_of_characters(tokenizer)})
    prompts = [generator.choices(words, k=generator.randint(16, 256)) for _ in range(count)]
    return sorted(prompts, key=len, reverse=True)


def one_by_one(
    model: Model, prompts: list[list[int]], new_tokens: int, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """What a loop over rows does."""
    pad = tokenizer.pad_token_id
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=NEVER, pad_token_id=pad)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
        texts.append(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True))
    return texts


def take_turns(ways: dict[str, Callable[[], list[str]]], rounds: int) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Median seconds of each way, and its texts."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts = {}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            texts[name] = way()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}, texts


def share_equal(texts: dict[str, list[str]], alone: str, together: Sequence[str]) -> float:
    """Of the texts made together, the share equal to those made alone, or else to those of the first way."""
    pairs = [
        pair
        for name in together
        for reference, own in (
            (texts[alone], texts[name][ALONE_EVERY // 2 :: ALONE_EVERY]),
            (texts[together[0]], texts[name]),
        )
        for pair in zip(reference, own, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def main() -> None:
    """Time all ways, check that they write the same, print the table."""
    parser = make_parser("tokens a second of prediction")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
    console = make_console()
    tokenizer = load_tokenizer(ModelArguments(TINY_RANDOM))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    plain, model = (make_model(arguments.model, tokenizer) for _ in range(2))
    pack_weights(model)
    prompts = make_prompts(arguments.prompts, tokenizer)
    some = prompts[ALONE_EVERY // 2 :: ALONE_EVERY]

    def batches(size: int, new_tokens: int, chosen: Model) -> list[str]:
        settings = GenerationArguments(max_new_tokens=new_tokens)
        with torch.inference_mode():
            return [answer.text for answer in answer_prompts(chosen, tokenizer, prompts, settings, size, NEVER)]

    def continuous() -> list[str]:
        settings = GenerationArguments(max_new_tokens=arguments.new_tokens)
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        longest_first, longest = [prompts[number] for number in order], len(prompts[order[0]])
        answered = answer_continuously(model, tokenizer, longest_first, longest, settings, BATCH_SIZES[0], NEVER)
        texts = {order[place]: answer.text for place, answer in answered}
        return [texts[number] for number in range(len(prompts))]

    alone, reading = f"one by one ({len(some)} prompts)", "reading prompts, 1 new token"
    together = {f"batches of {size}": partial(batches, size, arguments.new_tokens, model) for size in BATCH_SIZES}
    together[f"continuous, {BATCH_SIZES[0]} at once"] = continuous
    packed = f"the same, packed ({len(some)} prompts)"
    ways = {
        name: partial(one_by_one, chosen, some, arguments.new_tokens, tokenizer)
        for name, chosen in ((alone, plain), (packed, model))
    }
    ways |= together
    ways[reading] = partial(batches, BATCH_SIZES[0], 1, model)
    seconds, texts = take_turns(ways, arguments.rounds)
    equal = share_equal(texts, alone, list(together))
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    console.print(
        f"{len(prompts)} prompts of {len(prompts[-1])} to {len(prompts[0])} tokens, {mean_length(prompts):.0f} on "
        f"average ({mean_length(some):.0f} one by one); {arguments.new_tokens} new tokens each; "
        f"{parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads; {equal:.0%} of the texts are equal"
    )
    speeds = {name: len(prompts) * arguments.new_tokens / seconds[name] for name in together}
    speeds = {name: len(some) * arguments.new_tokens / seconds[name] for name in (alone, packed)} | speeds
    for name, value in speeds.items():
        console.print(f"  {name:<32}{value:>10,.1f} tokens/s  {value / speeds[alone]:>6.1f} times")
    console.print(f"  {reading:<32}{seconds[reading]:>10.1f} s for all {len(prompts)} prompts")

    results = [
        at_least(f"tokens/s, {name} / one by one", speeds[name] / speeds[alone], "ratio", SPEED_TARGET)
        for name in together
        if name.startswith("batches")
    ]
    merged = merged_time(arguments, model, make_model(arguments.model, tokenizer), batches)
    results += [
        at_least("texts equal to those of one by one", equal, "share", 1.0),
        result("time, merged LoRA / full model", merged, "ratio", 1.02),
    ]
    show_results(results, console)
    write_results(results, arguments.json)


def merged_time(
    arguments: argparse.Namespace, model: Model, another: Model, batches: Callable[[int, int, Model], list[str]]
) -> float:
    """Seconds of another model of the same weights, into which an adapter is merged, over those of the model."""
    merged = merge_adapter(get_peft_model(another, LoraConfig(r=16, target_modules="all-linear")))
    pack_weights(merged)
    pair = {"full": model, "merged": merged}
    ways = {name: partial(batches, BATCH_SIZES[0], MERGED_NEW_TOKENS, chosen) for name, chosen in pair.items()}
    seconds, _ = take_turns(ways, 3 * arguments.rounds + 1)
    return seconds["merged"] / seconds["full"]


def mean_length(prompts: list[list[int]]) -> float:
    """Tokens."""
    return statistics.fmean(map(len, prompts))


if __name__ == "__main__":
    main()
