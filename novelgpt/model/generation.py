"""Prompts of tokens to answers, in batches: for prediction and for samples during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.settings.arguments import GenerationArguments
from novelgpt.text.conversation import end_token_ids


@dataclass
class Answer:
    """What the model wrote: its text, why it ended ("stop" or "length"), and its tokens, end token included."""

    text: str
    finish_reason: str
    completion_tokens: int


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    generation: GenerationArguments,
    batch_size: int,
    ends: list[int],
    show_progress: bool = False,
) -> list[Answer]:
    """Answers in the order of `prompts`. Batches hold prompts of like length, padded on the left.

    The caller chooses inference mode, evaluation mode, autocast and, where answers are drawn, the seed. Weights that
    several processes share (ZeRO-3) need all of them here, with as many batches each.

    Args:
        model: one that generates; adapters too.
        tokenizer: its tokenizer.
        prompts: token ids, at least one each.
        generation: how tokens are chosen; its seed is left to the caller.
        batch_size: prompts answered at once.
        ends: tokens that end an answer.
        show_progress: whether to show a bar.
    """
    pad = int(tokenizer.pad_token_id)
    config = _generation_config(generation, ends, pad)
    answers: dict[int, Answer] = {}
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with tqdm(total=len(prompts), desc="answers", unit="row", disable=not show_progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _left_padded([prompts[index] for index in chosen], pad)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            sequences = model.generate(  # type: ignore[operator]
                **batch, generation_config=config
            )
            for index, ids in zip(chosen, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                answers[index] = _answer(ids, ends, tokenizer)
            bar.update(len(chosen))
    return [answers[index] for index in range(len(prompts))]


def answer_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the template and the tokenizer, and those that the model names."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return sorted({*end_token_ids(tokenizer), *named})


def _generation_config(generation: GenerationArguments, ends: list[int], pad: int) -> GenerationConfig:
    """Only what the user chose: the model's own defaults would change greedy answers silently."""
    sampling: dict[str, Any] = {}
    if generation.do_sample:
        sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k}
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        do_sample=generation.do_sample,
        num_beams=generation.num_beams,
        repetition_penalty=generation.repetition_penalty,
        no_repeat_ngram_size=generation.no_repeat_ngram_size,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,  # models in training have it off
        **sampling,
    )


def _left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def _answer(ids: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    assert isinstance(text, str)
    return Answer(text, "length" if end is None else "stop", len(kept) + (end is not None))
