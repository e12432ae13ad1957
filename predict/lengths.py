"""Prompts, answers and references against the positions of the model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from predict.rows import PromptRow


def check_lengths(
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    max_new_tokens: int,
) -> None:
    """Refuse rows that go beyond the positions a model knows: some fail there, others write on without sense.

    Args:
        rows: with the tokens of their prompts.
        tokenizer: of the model.
        positions: that the model knows; None for no end.
        max_new_tokens: of the longest answer.

    Raises:
        UserError: names the first such row, and the limit.
    """
    if positions is None:
        return
    beyond = [row for row in rows if len(row.prompt_ids) + max_new_tokens > positions]
    if beyond:
        others = f", and so have {len(beyond) - 1} others" if len(beyond) > 1 else ""
        room = positions - max(len(row.prompt_ids) for row in beyond)
        shorter = f"--max_new_tokens {room} leaves room for all; or " if room > 0 else ""
        raise UserError(
            f"row {beyond[0].id}: its prompt of {len(beyond[0].prompt_ids)} tokens has no room for an answer of "
            f"{max_new_tokens} within the {positions} positions that the model knows{others}",
            f"{shorter}shorten the prompts or leave those rows out; a model whose positions were stretched says so in "
            "its config.json",
        )
    for row in rows:
        reference = row.encoded_reference(tokenizer)
        if reference is not None and len(reference.input_ids) > positions:
            raise UserError(
                f"row {row.id}: prompt and reference take {len(reference.input_ids)} tokens, more than the "
                f"{positions} positions that the model knows, so the reference has no loss",
                "shorten the reference or leave the row out",
            )
