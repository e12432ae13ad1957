"""Rows to batches: the one collator of all pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.pseudo_repetitions import PERIODS

# Names of a numbered row: the row itself, and its number among the training rows; and the numbers of a batch.
ROW, NUMBER, NUMBERS = "row", "number", "numbers"
# [rows, tokens] bool: what is not padding, in packed rows.
TOKEN_MASK = "token_mask"


@dataclass
class Collator:
    """Pad rows on the right to the longest one. Padding is known by its position, so its token may be any id.

    >>> rows = [{"input_ids": [5, 9], "labels": [-100, 9]}, {"input_ids": [7], "labels": [7]}]
    >>> batch = Collator(pad_token_id=9)(rows)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 9], [7, 9]], [[-100, 9], [7, -100]])

    Batches hold "input_ids", "labels", each [rows, tokens] int64, and either "attention_mask" (rows of one document
    each) or, where rows hold several, "position_ids", which restart at each document and at the padding, with the
    boundaries that attention must not cross, named as in transformers: "cu_seq_lens_q" and "cu_seq_lens_k",
    [documents + 1] int32, where documents start in the rows laid end to end, then the number of all tokens;
    "max_length_q" and "max_length_k", tokens of the longest. Of rows that are {"row", "number"}, "numbers" lists the
    numbers, to be removed before the model gets the batch. With `mask_packs`, packed rows also have a "token_mask",
    [rows, tokens] bool, for the statistics of routers; attention does not need it. Where a row has "loss_weights",
    the batch has them, [rows, tokens] float32: those of other rows are 1 where there is a label, else 0. Where a row is
    made of pseudo-repetitions, or in any case with `always_periods`, the batch has "repeat_periods", 0 elsewhere.
    """

    pad_token_id: int
    mask_packs: bool = False
    always_periods: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of {"input_ids", "labels"}, "loss_weights" if weighted, and "position_ids" if packed."""
        numbers = [row[NUMBER] for row in rows if ROW in row]
        rows = [row.get(ROW, row) for row in rows]
        batch: dict[str, Any] = {
            name: pad_sequence(
                [torch.as_tensor(row[name], dtype=torch.int64) for row in rows], batch_first=True, padding_value=padding
            )
            for name, padding in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX))
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        longest = batch["input_ids"].shape[1]
        mask = torch.arange(longest) < lengths[:, None]
        given = [row.get("loss_weights") for row in rows]
        if any(weights is not None for weights in given):
            batch["loss_weights"] = (batch["labels"] != IGNORE_INDEX).to(torch.float32)
            for line, weights in zip(batch["loss_weights"], given, strict=True):
                if weights is not None:
                    line[: len(weights)] = torch.as_tensor(weights, dtype=torch.float32)
        if self.always_periods or any(PERIODS in row for row in rows):
            batch[PERIODS] = torch.zeros_like(batch["labels"])
            for line, row in zip(batch[PERIODS], rows, strict=True):
                if PERIODS in row:
                    line[: len(row[PERIODS])] = row[PERIODS]
        if numbers:
            batch[NUMBERS] = numbers
        if not all("position_ids" in row for row in rows):
            return batch | {"attention_mask": mask.to(torch.int64)}
        if self.mask_packs:
            batch[TOKEN_MASK] = mask
        positions = torch.stack(
            [torch.cat([row["position_ids"], torch.arange(longest - len(row["position_ids"]))]) for row in rows]
        )
        starts = (positions == 0).flatten().nonzero()[:, 0]
        boundaries = torch.cat([starts, torch.tensor([positions.numel()])]).to(torch.int32)
        longest_document = int(boundaries.diff().max())
        return batch | {
            "position_ids": positions,
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest_document,
            "max_length_k": longest_document,
        }
