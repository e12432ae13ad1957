"""Batched generation, and the loss of the references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from novelgpt.scoring.perplexity import row_sums
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import end_token_ids
from predict.rows import PromptRow


@dataclass
class Answer:
    """What the model wrote: its text, why it ended ("stop" or "length"), and its tokens, end token included."""

    text: str
    finish_reason: str
    completion_tokens: int


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[PromptRow],
    generation: GenerationArguments,
    batch_size: int,
    show_progress: bool = True,
) -> list[Answer]:
    """Answers in the order of `rows`. Batches hold prompts of like length, padded on the left."""
    set_seed(generation.seed)
    ends = sorted({*end_token_ids(tokenizer), *_own_ends(model)})
    config = _generation_config(generation, ends, int(tokenizer.pad_token_id))
    answers: dict[int, Answer] = {}
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].prompt_ids))
    with tqdm(total=len(rows), desc="answers", unit="row", disable=not show_progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            prompts = _left_padded([rows[index].prompt_ids for index in chosen], int(tokenizer.pad_token_id))
            prompts = {name: tensor.to(model.device) for name, tensor in prompts.items()}
            with torch.inference_mode():
                sequences = model.generate(  # type: ignore[operator]
                    **prompts, generation_config=config
                )
            for index, ids in zip(chosen, sequences[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
                answers[index] = _answer(ids, ends, tokenizer)
            bar.update(len(chosen))
    return [answers[index] for index in range(len(rows))]


def reference_sums(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[PromptRow], batch_size: int
) -> numpy.ndarray:
    """[rows with a reference, 3] sums of their references under the model, as `row_sums` gives them."""
    encoded = [row for row in (row.encoded_reference(tokenizer) for row in rows) if row is not None]
    collate = Collator(int(tokenizer.pad_token_id))
    sums = [numpy.zeros((0, 3))]
    for start in range(0, len(encoded), batch_size):
        batch = collate([vars(row) for row in encoded[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        with torch.inference_mode():
            sums.append(row_sums(model(**batch, use_cache=False).logits, labels).cpu().numpy())
    return numpy.concatenate(sums)


def _own_ends(model: PreTrainedModel) -> list[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    if own is None:
        return []
    return list(own) if isinstance(own, (list, tuple)) else [own]


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
