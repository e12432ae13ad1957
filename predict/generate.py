"""Answers to rows as they come, three ways behind one signature; and the loss of the references.

Each way takes, last, all rows and the numbers of those to answer, batch by batch (`AnswerRows`, once the model or the
server is bound), and yields {number: answer} as soon as some are ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
from predict.rows import PromptRow

AnswerRows = Callable[[Sequence[PromptRow], Sequence[Sequence[int]]], Iterator[dict[int, Answer]]]
"""(all rows, batches of row numbers to answer) -> answers by number, as they come."""


def in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationArguments,
    rows: Sequence[PromptRow],
    batches: Sequence[Sequence[int]],
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
    rows: Sequence[PromptRow],
    batches: Sequence[Sequence[int]],
) -> Iterator[dict[int, Answer]]:
    """Answer by continuous batching: a new prompt starts whenever an answer ends."""
    ends = answer_end_ids(model, tokenizer)
    numbers = [number for batch in batches for number in batch]
    if numbers:
        prompts = [rows[number].prompt_ids for number in numbers]
        for place, one in answer_continuously(model, tokenizer, prompts, generation, batch_size, ends):
            yield {numbers[place]: one}


def through_endpoint(
    client: EndpointClient, concurrency: int, rows: Sequence[PromptRow], batches: Sequence[Sequence[int]]
) -> Iterator[dict[int, Answer]]:
    """Answer by a server, `concurrency` requests at once. The seed of a row depends only on its number."""
    numbers = [number for batch in batches for number in batch]
    requests = [
        EndpointRequest(f"row {row.id}", row.prompt if row.plain else row.asked, number, row.thinking)
        for number, row in ((number, rows[number]) for number in numbers)
    ]
    for index, one in client.answers(requests, concurrency):
        yield {numbers[index]: one}


def reference_sums(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow], batch_size: int
) -> numpy.ndarray:
    """[rows, 3] sums of each row's reference under the model, as `row_sums` returns them; 0 where it has none."""
    encoded = [(number, row.encoded_reference(tokenizer)) for number, row in enumerate(rows)]
    present = [(number, row) for number, row in encoded if row is not None]
    # Longest first: what does not fit into memory fails at once, and little is padded.
    present.sort(key=lambda pair: -len(pair[1].input_ids))
    collate = Collator(int(tokenizer.pad_token_id))
    attach_chunked_loss(model, head_is_last(model))
    sums = numpy.zeros((len(rows), 3))
    for start in range(0, len(present), batch_size):
        chosen = present[start : start + batch_size]
        batch = collate([vars(row) for _, row in chosen])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            outputs = model(**batch, use_cache=False)
        found = row_sums(outputs.token_losses, outputs.token_hits, batch["labels"])
        sums[[number for number, _ in chosen]] = found.cpu().numpy()
    return sums
