"""Answers of the rows, and the loss of their references."""

from __future__ import annotations

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from novelgpt.model.generation import Answer, answer_end_ids, answer_prompts
from novelgpt.scoring.perplexity import row_sums
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.text.collator import Collator
from novelgpt.training.forward_checks import head_is_last
from novelgpt.training.loss import attach_chunked_loss
from predict.rows import PromptRow


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[PromptRow],
    generation: GenerationArguments,
    batch_size: int,
    show_progress: bool = True,
) -> list[Answer]:
    """Answers in the order of `rows`, drawn from the seed of `generation`."""
    set_seed(generation.seed)
    prompts = [row.prompt_ids for row in rows]
    with torch.inference_mode():
        return answer_prompts(
            model, tokenizer, prompts, generation, batch_size, answer_end_ids(model, tokenizer), show_progress
        )


def reference_sums(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[PromptRow], batch_size: int
) -> numpy.ndarray:
    """[rows with a reference, 3] sums of their references under the model, as `row_sums` gives them."""
    encoded = [row for row in (row.encoded_reference(tokenizer) for row in rows) if row is not None]
    collate = Collator(int(tokenizer.pad_token_id))
    attach_chunked_loss(model, head_is_last(model))
    sums = [numpy.zeros((0, 3))]
    for start in range(0, len(encoded), batch_size):
        batch = collate([vars(row) for row in encoded[start : start + batch_size]])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            outputs = model(**batch, use_cache=False)
        sums.append(row_sums(outputs.token_losses, outputs.token_hits, batch["labels"]).cpu().numpy())
    return numpy.concatenate(sums)
