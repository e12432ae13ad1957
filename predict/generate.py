"""Answers to rows as they come, three ways behind one signature; and the loss of the references.

Each way takes, last, all rows and the numbers of those to answer, batch by batch (`AnswerRows`, once the model or the
server is bound), and yields {number: answer} as soon as some are ready.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from novelgpt.inference.endpoint_client import EndpointClient, EndpointRequest
from novelgpt.inference.generation import Answer, answer_batch, answer_continuously, answer_end_ids
from novelgpt.model.forward_checks import head_is_last
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.scoring.perplexity import row_sums
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.text.collator import Collator
from predict.rows import PromptRow, PromptRows


class NumberedRows(Protocol):
    """Rows that are asked for by number: a list, or `PromptRows`, which are on disk."""

    def __getitem__(self, number: int, /) -> PromptRow:
        """The row of that number."""
        ...


AnswerRows = Callable[[NumberedRows, Iterable[Sequence[int]]], Iterator[dict[int, Answer]]]
"""(all rows, batches of row numbers to answer) -> answers by number, as they come."""


def in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationArguments,
    rows: NumberedRows,
    batches: Iterable[Sequence[int]],
) -> Iterator[dict[int, Answer]]:
    """Answer batch by batch. Each batch has its own seed, so that sampled answers can be reproduced."""
    ends = answer_end_ids(model, tokenizer)
    for batch in batches:
        set_seed((generation.seed + batch[0]) % 2**32)
        prompts = [rows[number].prompt_ids for number in batch]
        with torch.inference_mode():
            answers = answer_batch(model, tokenizer, prompts, generation, ends)
        yield dict(zip(batch, answers, strict=True))


def continuously(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationArguments,
    batch_size: int,
    rows: NumberedRows,
    batches: Iterable[Sequence[int]],
) -> Iterator[dict[int, Answer]]:
    """Answer by continuous batching: a new prompt starts whenever an answer ends."""
    ends = answer_end_ids(model, tokenizer)
    numbers = array("q", chain.from_iterable(batches))
    if numbers:
        prompts = (rows[number].prompt_ids for number in numbers)
        longest = max(len(rows[number].prompt_ids) for number in numbers)
        for place, one in answer_continuously(model, tokenizer, prompts, longest, generation, batch_size, ends):
            yield {numbers[place]: one}


def through_endpoint(
    client: EndpointClient, concurrency: int, rows: NumberedRows, batches: Iterable[Sequence[int]]
) -> Iterator[dict[int, Answer]]:
    """Answer by a server, `concurrency` requests at once. The seed of a row depends only on its number."""
    numbers = array("q", chain.from_iterable(batches))

    def requests() -> Iterator[EndpointRequest]:
        for number in numbers:
            row = rows[number]
            yield EndpointRequest(f"row {row.id}", row.prompt if row.plain else row.asked, number, row.thinking)

    for index, one in client.answers(requests(), concurrency):
        yield {numbers[index]: one}


def reference_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: PromptRows,
    numbers: numpy.ndarray,
    batch_size: int,
) -> numpy.ndarray:
    """[numbers, 3] sums of references under the model, as `row_sums` returns them; 0 where a row has none.

    Args:
        model: that the references are for.
        tokenizer: of it.
        rows: all of them.
        numbers: of those to look at.
        batch_size: rows at once.
    """
    lengths = numpy.frombuffer(rows.full_lengths, numpy.int64)[numbers]
    # Longest first: what does not fit into memory fails at once, and little is padded.
    order = numpy.argsort(-lengths, kind="stable")[: numpy.count_nonzero(lengths)]
    collate = Collator(int(tokenizer.pad_token_id))
    attach_chunked_loss(model, head_is_last(model))
    sums = numpy.zeros((len(numbers), 3))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        encoded = [rows[number].encoded_reference(tokenizer) for number in numbers[chosen].tolist()]
        batch = collate([vars(row) for row in encoded if row is not None])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            outputs = model(**batch, use_cache=False)
        found = row_sums(outputs.token_losses, outputs.token_hits, batch["labels"])
        sums[chosen] = found.cpu().numpy()
    return sums
