"""After fine-tuning: does the model end its answers? Asked with prompts that it was trained on."""

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
from novelgpt.training.sample_predictions import Document, documents_of, preserve_mode_and_rng, weights_are_shared

# Share of answers that should end.
ENOUGH = 0.95
# Tokens of the longest answer, where nothing is said.
MOST_NEW_TOKENS = 512
# Rows that are looked at for each prompt.
ROWS_A_PROMPT = 20


@dataclass
class TrainedPrompt:
    """A prompt of the training rows, and how many tokens its answer has, the end token included."""

    prompt_ids: list[int]
    answer_tokens: int


@dataclass
class _Count:
    """How many answers were made, how many of them ended, and how many ended before they began."""

    answers: int
    stopped: int
    empty: int


def check_stops(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    training: TrainArguments,
    accelerator: Accelerator,
) -> float | None:
    """Answer training prompts greedily, print how many answers ended, and return their share in [0, 1].

    Every process calls this and gets the same. The prompts are shared out among the processes, but where weights are
    shared (ZeRO-3, FSDP) all of them answer all. Raw text has no prompts: nothing is asked, and None returned.

    Args:
        model: the bare one, without the wrappers of data parallelism; adapters belong to it.
        tokenizer: what made the rows.
        train: the training rows.
        training: how many prompts, the longest answer, and, but on CPUs, how many are answered at once.
        accelerator: of the training, whose autocast is used.
    """
    ends = answer_end_ids(model, tokenizer)
    most = training.stop_check_max_new_tokens
    prompts, is_text = trained_prompts(train, training.stop_check, ends, most or MOST_NEW_TOKENS)
    if training.stop_check and not prompts and not is_text and accelerator.is_main_process:
        say(
            f"stop check: no training row that was looked at holds a whole first answer of at most "
            f"{most or MOST_NEW_TOKENS} tokens. A longer --max_length keeps ends of answers; "
            f"--stop_check_max_new_tokens takes longer ones.",
            style="yellow",
        )
    if not prompts:
        return None
    limit = most or min(MOST_NEW_TOKENS, 2 * max(prompt.answer_tokens for prompt in prompts))
    mine = prompts
    if not weights_are_shared(accelerator):
        mine = prompts[accelerator.process_index :: accelerator.num_processes]
    batch_size = len(prompts) if accelerator.device.type == "cpu" else training.per_device_eval_batch_size
    with preserve_mode_and_rng(model), accelerator.autocast(), torch.no_grad():
        answers = answer_prompts(
            model, tokenizer, [prompt.prompt_ids for prompt in mine],
            GenerationArguments(max_new_tokens=limit), batch_size, ends,
        )  # fmt: skip
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    count = _Count(len(answers), len(stopped), sum(answer.completion_tokens == 1 for answer in stopped))
    counts = [count] if weights_are_shared(accelerator) else gather_object([count])
    return _report(counts, limit, show=accelerator.is_main_process)


def trained_prompts(
    train: Dataset[Any], count: int, ends: list[int], most_tokens: int
) -> tuple[list[TrainedPrompt], bool]:
    """The prompts of the first answers of `count` training conversations, spread evenly over the rows.

    Only whole answers count, which end in one of `ends` within `most_tokens`; those at most half as long are taken
    where there are any, so that a model may write more than it was taught. At most ROWS_A_PROMPT rows a prompt are
    looked at.

    Returns:
        The prompts, and whether the rows are raw text, which has none.
    """
    rows = len(train)  # type: ignore[arg-type]
    looked_at = min(rows, ROWS_A_PROMPT * count)
    indices = [number * rows // looked_at for number in range(looked_at)]
    documents = [document for index in indices for document in documents_of(train[index])]
    # The first token of a text has nothing that could tell it; no chat template makes prompts of one token.
    conversations = [document for document in documents if document.runs[0][0] > 1]
    whole = [prompt for document in conversations if (prompt := _first_prompt(document, ends)) is not None]
    short = [prompt for prompt in whole if 2 * prompt.answer_tokens <= most_tokens]
    pool = short or [prompt for prompt in whole if prompt.answer_tokens <= most_tokens]
    wanted = min(count, len(pool))
    return [pool[number * len(pool) // wanted] for number in range(wanted)], bool(documents) and not conversations


def _first_prompt(document: Document, ends: list[int]) -> TrainedPrompt | None:
    """Of the document's first answer; None where the answer was cut."""
    begin, end = document.runs[0]
    # By its label: where a template puts nothing after an answer, the input there is what begins the next question.
    if int(document.labels[end - 1]) not in ends:
        return None
    return TrainedPrompt(document.tokens[:begin].tolist(), end - begin)


def _report(counts: list[_Count], limit: int, show: bool) -> float:
    """Share of the answers that stopped, of all processes; one shows it, and what to do where it is low."""
    answers, stopped, empty = (sum(vars(count)[name] for count in counts) for name in ("answers", "stopped", "empty"))
    share = stopped / answers
    line = f"stopped: {stopped} of {answers} training prompts ({100 * share:.0f} %)"
    if empty:
        line += f", {empty} of them without a word"
    if not show:
        return share
    if share >= ENOUGH:
        say(line)
        return share
    say(
        line,
        f"  The others ran on to {limit} tokens. Train longer (--num_train_epochs, --learning_rate), see "
        "in the row printed before training that answers end in a green end token of the template, or wait longer "
        "(--stop_check_max_new_tokens).",
        style="red",
    )
    return share
