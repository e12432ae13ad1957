"""Tokens a second of prediction: batches and continuous batching against `generate` called for one prompt at a time.

    python benchmarks/predict_throughput.py [--prompts 64] [--new_tokens 128] [--json FILE]

A Qwen3-like model with random weights answers prompts of mixed length, greedily, without ever ending: so each way makes
the same number of tokens, which must be the same tokens. Ways take turns; each figure is the median of its rounds. The
last comparison is of a model into which an adapter was merged against the same model without one.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from results import at_least, make_console, make_parser, result, show_results, write_results
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from novelgpt.model.embedded_base import build_embedded_base
from novelgpt.model.generation import answer_continuously, answer_prompts
from novelgpt.model.merging import merge_adapter
from novelgpt.settings.arguments import GenerationArguments, ModelArguments
from novelgpt.settings.paths import EMBEDDED_BASE
from novelgpt.text.tokenizer import load_tokenizer

SPEED_TARGET = 12.0
NEVER = [2**31 - 1]  # no token has this number: no answer ends before its last token
Model = PreTrainedModel


def make_model(hidden_size: int, layers: int, vocabulary: int, seed: int) -> Model:
    """Random weights, spread widely enough that the likeliest token is no close call."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        initializer_range=0.05,
    )
    return Qwen3ForCausalLM(config).eval()


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


def main() -> None:
    """Check that all ways write the same, time them, print the table."""
    parser = make_parser("tokens a second of prediction")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    console = make_console()
    if not EMBEDDED_BASE.is_dir():
        build_embedded_base(EMBEDDED_BASE)
    tokenizer = load_tokenizer(ModelArguments(str(EMBEDDED_BASE)))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    model = make_model(arguments.hidden_size, arguments.layers, len(tokenizer), seed=1)
    generator = random.Random(1)
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    prompts = [generator.choices(words, k=generator.randint(16, 256)) for _ in range(arguments.prompts)]
    settings = GenerationArguments(max_new_tokens=arguments.new_tokens)
    size = arguments.batch_size

    def batches(chosen: Model = model) -> list[str]:
        return [answer.text for answer in answer_prompts(chosen, tokenizer, prompts, settings, size, NEVER)]

    def continuous() -> list[str]:
        answers = dict(answer_continuously(model, tokenizer, prompts, settings, size, NEVER))
        return [answers[number].text for number in range(len(prompts))]

    names = "one by one", f"batches of {size}", f"continuous, {size} at once"
    ways = (lambda: one_by_one(model, prompts, arguments.new_tokens, tokenizer), batches, continuous)
    seconds, texts = take_turns(dict(zip(names, ways, strict=True)), arguments.rounds)
    same = [text == other for name in names[1:] for text, other in zip(texts[names[0]], texts[name], strict=True)]
    tokens = len(prompts) * arguments.new_tokens
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{len(prompts)} prompts of 16 to 256 tokens, {arguments.new_tokens} new tokens each, {parameters / 1e6:.0f} M "
        f"parameters, {torch.get_num_threads()} threads; {sum(same)} of {len(same)} texts equal those of one by one"
    )
    for name, value in seconds.items():
        console.print(f"  {name:<28}{tokens / value:>10,.0f} tokens/s  {seconds[names[0]] / value:>6.1f} times")

    another = make_model(arguments.hidden_size, arguments.layers, len(tokenizer), seed=1)
    merged = merge_adapter(get_peft_model(another, LoraConfig(r=16, target_modules="all-linear")))
    pair, _ = take_turns({"full": batches, "merged": lambda: batches(merged)}, 2 * arguments.rounds + 1)
    results = [
        at_least("tokens/s, batches / one by one", seconds[names[0]] / seconds[names[1]], "ratio", SPEED_TARGET),
        at_least("texts equal to those of one by one", sum(same) / len(same), "share", 1.0),
        result("time, merged LoRA / full model", pair["merged"] / pair["full"], "ratio", 1.02),
    ]
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
