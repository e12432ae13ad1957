"""After fine-tuning: does the model end its answers to prompts that it was trained on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.inference.generation import answer_end_ids, answer_prompts
from novelgpt.settings.arguments import GenerationArguments, TrainArguments
from novelgpt.settings.terminal import say
from novelgpt.training.sample_predictions import documents_of, preserve_mode_and_rng, weights_are_sharded

# Share of answers that should end.
ENOUGH = 0.95
# Tokens of the longest answer, unless an option gives a limit.
MAX_NEW_TOKENS = 512
# Rows inspected for each prompt.
ROWS_PER_PROMPT = 20


@dataclass
class TrainedPrompt:
    """A prompt of the training rows, and how many tokens its answer has, the end token included."""

    prompt_ids: list[int]
    answer_tokens: int


def check_stops(
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    model: PreTrainedModel,
    training: TrainArguments,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Answer training prompts greedily, print how many answers ended, and return {"stopped": their share in [0, 1]}.

    All processes call this and get the same. They share the prompts, but where weights are sharded (ZeRO-3, FSDP) all
    of them answer all. Raw text has no prompts: nothing is answered, and nothing returned.

    Args:
        tokenizer: of the rows.
        train: the training rows.
        model: the bare one, without the wrappers of data parallelism; adapters belong to it.
        training: number of prompts, longest answer, and, except on CPUs, the batch size of generation.
        accelerator: of the training, whose autocast is used.
    """
    ends = answer_end_ids(model, tokenizer)
    longest = training.stop_check_max_new_tokens or MAX_NEW_TOKENS
    prompts, is_text = trained_prompts(train, training.stop_check, ends, longest)
    if training.stop_check and not prompts and not is_text and accelerator.is_main_process:
        say(
            f"stop check: none of the training rows inspected holds a complete first answer of at most {longest} "
            "tokens. A longer --max_length keeps ends of answers; --stop_check_max_new_tokens takes longer ones.",
            style="yellow",
        )
    if not prompts:
        return {}
    limit = training.stop_check_max_new_tokens
    limit = limit or min(MAX_NEW_TOKENS, 2 * max(prompt.answer_tokens for prompt in prompts))
    sharded = weights_are_sharded(accelerator)
    mine = prompts if sharded else prompts[accelerator.process_index :: accelerator.num_processes]
    batch_size = len(prompts) if accelerator.device.type == "cpu" else training.per_device_eval_batch_size
    with preserve_mode_and_rng(model), accelerator.autocast(), torch.no_grad():
        answers = answer_prompts(
            model, tokenizer, [prompt.prompt_ids for prompt in mine],
            GenerationArguments(max_new_tokens=limit), batch_size, ends,
        )  # fmt: skip
    ended = [answer.completion_tokens for answer in answers if answer.finish_reason == "stop"]
    counts = (len(answers), len(ended), ended.count(1))
    answered, stopped, empty = map(sum, zip(*([counts] if sharded else gather_object([counts])), strict=True))
    share = stopped / answered
    if accelerator.is_main_process:
        line = f"stopped: {stopped} of {answered} training prompts ({100 * share:.0f} %)"
        line += f", {empty} of them without a word" if empty else ""
        if share >= ENOUGH:
            say(line)
        else:
            say(
                line,
                f"  The others reached {limit} tokens. Train longer (--num_train_epochs, --learning_rate), see "
                "in the row printed before training that answers end in a green end token of the template, or allow "
                "longer answers (--stop_check_max_new_tokens).",
                style="red",
            )
    return {"stopped": share}


def trained_prompts(
    train: Dataset[Any], count: int, ends: list[int], max_tokens: int
) -> tuple[list[TrainedPrompt], bool]:
    """The prompts of the first answers of `count` training conversations, spread evenly over the rows.

    Only complete answers count, which end in one of `ends` within `max_tokens`; those at most half as long are taken
    where there are any, so that a model may write more than it was trained on. At most ROWS_PER_PROMPT rows per prompt
    are inspected.

    Returns:
        The prompts, and whether the rows are raw text, which has none.
    """
    rows = len(train)  # type: ignore[arg-type]
    inspected = min(rows, ROWS_PER_PROMPT * count)
    indices = [number * rows // inspected for number in range(inspected)]
    documents = [document for index in indices for document in documents_of(train[index])]
    # The first token of a text is predicted from nothing; no chat template makes prompts of one token.
    conversations = [document for document in documents if document.runs[0][0] > 1]
    complete = []
    for document in conversations:
        start, end = document.runs[0]
        # By its label: where a template puts nothing after an answer, the input there starts the next question.
        if int(document.labels[end - 1]) in ends:
            complete.append(TrainedPrompt(document.tokens[:start].tolist(), end - start))
    short = [prompt for prompt in complete if 2 * prompt.answer_tokens <= max_tokens]
    pool = short or [prompt for prompt in complete if prompt.answer_tokens <= max_tokens]
    wanted = min(count, len(pool))
    return [pool[number * len(pool) // wanted] for number in range(wanted)], bool(documents) and not conversations
