"""Batched generation, for prediction and for samples during training."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from novelgpt.inference.preallocated_cache import GREEDY, left_padded, preallocated_cache, prefill
from novelgpt.inference.valid_text import WINDOW, ValidText
from novelgpt.model.loading import longest_row
from novelgpt.model.tokenizer import configured_ends
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted
from novelgpt.text.conversation import end_token_ids
from novelgpt.text.encoding import decode_answer
from novelgpt.text.token_bytes import BROKEN

# That continuous batching is given at once: many more than it answers at once.
MAX_REQUESTS = 4096


@dataclass
class Answer:
    """What a model generated.

    Attributes:
        text: without the end token, and without reasoning that a server returns separately.
        finish_reason: "stop" or "length", or another reason of a server ("content_filter", "tool_calls", …).
        completion_tokens: end token included; 0 if a server does not report them.
        prompt_tokens: as a server reports them; else 0.
        reasoning: of a server that returns it separately.
    """

    text: str
    finish_reason: str
    completion_tokens: int
    prompt_tokens: int = 0
    reasoning: str = ""


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    generation: GenerationArguments,
    batch_size: int,
    ends: list[int],
) -> list[Answer]:
    """Answer prompts in batches of similar length; answers are in the order of `prompts`.

    As `answer_batch`, but answers end where the model's positions do. With weights that are partitioned over processes
    (ZeRO-3), all of them have to call this with prompts of the same lengths.

    Args:
        model: one that generates; adapters too.
        tokenizer: its tokenizer.
        prompts: token ids, at least one each.
        generation: how tokens are chosen; the caller sets the seed.
        batch_size: prompts answered at once.
        ends: tokens that end an answer.
    """
    answers: dict[int, Answer] = {}
    positions = longest_row(model.config)
    for batch in plan_batches(list(map(len, prompts)), batch_size):
        chosen = [prompts[number] for number in batch]
        room = generation.max_new_tokens if positions is None else positions - len(chosen[0])
        bounded = replace(generation, max_new_tokens=max(1, min(generation.max_new_tokens, room)))
        answers |= zip(batch, answer_batch(model, tokenizer, chosen, bounded, ends), strict=True)
    return [answers[number] for number in range(len(prompts))]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[array[int]]:
    """Indices of prompts in batches of similar length, the longest first: too little memory shows at once."""
    order = array("q", numpy.argsort(-numpy.asarray(lengths, numpy.int64), kind="stable").tobytes())
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    generation: GenerationArguments,
    ends: list[int],
) -> list[Answer]:
    """Answer prompts in one left-padded batch.

    The caller sets inference mode, evaluation mode, autocast and, for sampling, the seed.
    """
    pad = int(tokenizer.pad_token_id)
    # If single tokens may not repeat, padding must not be one of them: it may be the end token.
    before = None if generation.no_repeat_ngram_size == 1 else pad
    batch = {name: tensor.to(model.device) for name, tensor in left_padded(prompts, before).items()}
    cache = preallocated_cache(model, batch["input_ids"].shape[1] + generation.max_new_tokens)
    if cache is not None:
        prefill(model, prompts, pad, cache, generation.num_beams)
    sequences = model.generate(  # type: ignore[operator]
        **batch,
        generation_config=generation_config(generation, ends, pad),
        logits_processor=LogitsProcessorList([ValidText(tokenizer)]),
        past_key_values=cache,
    )
    return [_answer(ids, ends, tokenizer) for ids in sequences[:, batch["input_ids"].shape[1] :].tolist()]


def check_continuous(generation: GenerationArguments) -> None:
    """Refuse the settings that transformers' continuous batching ignores.

    Raises:
        UserError: names the setting.
    """
    for name, neutral in (("num_beams", 1), ("no_repeat_ngram_size", 0), ("repetition_penalty", 1.0)):
        value = vars(generation)[name]
        if value != neutral:
            raise UserError(
                "continuous batching has neither beams nor no_repeat_ngram_size nor repetition_penalty: "
                f"--{name} {value} would do nothing",
                "take --backend batches, or leave it out",
            )


def answer_continuously(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[list[int]],
    longest: int,
    generation: GenerationArguments,
    batch_size: int,
    ends: list[int],
) -> Iterator[tuple[int, Answer]]:
    """Yield (index of the prompt, answer) as answers finish, by transformers' continuous batching.

    Keys and values of all prompts are in one paged cache, and a new prompt starts when an answer ends, so that short
    answers do not wait for long ones.

    Args:
        model: one that generates, without beams.
        tokenizer: its tokenizer.
        prompts: token ids, at least one each, in the order in which they start, best the longest first; of a long
            iterator, `MAX_REQUESTS` are in memory.
        longest: tokens of the longest prompt.
        generation: how tokens are chosen; `seed` is that of all samples.
        batch_size: prompts answered at once.
        ends: tokens that end an answer.

    Raises:
        UserError: the settings or the model's attention do not support it.
    """
    check_continuous(generation)
    if not model._supports_sdpa or not model._can_set_attn_implementation():
        raise UserError(
            f"continuous batching cannot replace the attention of {type(model).__name__}", "take --backend batches"
        )
    config = generation_config(generation, ends, int(tokenizer.pad_token_id))
    with model.continuous_batching_context_manager(  # type: ignore[operator]
        generation_config=config, continuous_batching_config=_paging(model, longest, generation, batch_size)
    ) as manager:
        coming = enumerate(prompts)
        left = 0
        while True:
            # Request ids are ours, as the manager may reorder prompts.
            for number, prompt in itertools.islice(coming, MAX_REQUESTS - left):
                left += 1
                manager.add_request(
                    prompt, request_id=str(number), max_new_tokens=generation.max_new_tokens, eos_token_id=ends
                )
            if not left:
                return
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError(f"continuous batching ended with {counted(left, 'answer')} missing")
                continue
            if not output.is_finished():
                continue
            if output.error is not None:
                raise RuntimeError(f"continuous batching: {output.error}")
            left -= 1
            yield int(output.request_id), _answer(output.generated_tokens, ends, tokenizer)


def _paging(
    model: PreTrainedModel, longest: int, generation: GenerationArguments, batch_size: int
) -> ContinuousBatchingConfig:
    """Pages for `batch_size` prompts at once; on a GPU, sizes are derived from its memory."""
    if model.device.type == "cuda":
        return ContinuousBatchingConfig(seed=generation.seed)
    page_size = 32
    pages = -(-(longest + generation.max_new_tokens) // page_size)
    return ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=batch_size * pages,
        max_batch_tokens=max(512, batch_size),
        max_requests_per_batch=batch_size,
        use_cuda_graph=False,
        seed=generation.seed,
    )


def answer_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the template and the tokenizer, and those in the generation config."""
    return sorted({*end_token_ids(tokenizer), *configured_ends(model.generation_config)})


def generation_config(generation: GenerationArguments, ends: list[int], pad: int) -> GenerationConfig:
    """Settings for transformers, without the model's own defaults, which would silently change greedy answers."""
    sampling: dict[str, Any] = GREEDY
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
        use_cache=True,  # off in models that are trained
        **sampling,
    )


def _answer(ids: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[:end]
    text = decode_answer(kept, tokenizer, ends)
    if end is None and text.endswith(BROKEN):
        # The limit cut a character. SentencePiece decodes neighbouring byte tokens to characters all or none.
        shorter = (decode_answer(kept[: len(kept) - cut], tokenizer, ends) for cut in range(WINDOW + 1))
        text = max((one.rstrip(BROKEN) for one in shorter), key=len)
    return Answer(text, "length" if end is None else "stop", len(kept) + (end is not None))
