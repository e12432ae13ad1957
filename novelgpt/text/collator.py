"""Rows to batches: the one collator of all pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from novelgpt.text.conversation import IGNORE_INDEX

# A row's number among the training rows, where they carry one, and those of a batch: not for the model.
NUMBER, NUMBERS = "number", "numbers"
# [rows, tokens] bool: what is no padding, in packed rows.
TOKEN_MASK = "token_mask"


@dataclass
class Collator:
    """Pad rows on the right to the longest one. Padding is told by position, so the padding token may be any id.

    >>> rows = [{"input_ids": [5, 9], "labels": [-100, 9]}, {"input_ids": [7], "labels": [7]}]
    >>> batch = Collator(pad_token_id=9)(rows)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 9], [7, 9]], [[-100, 9], [7, -100]])

    Batches hold "input_ids", "labels", each [rows, tokens] int64, and either "attention_mask" (rows of one document
    each) or, where rows hold several, "position_ids", which restart at each document and at the padding, with the
    borders that attention must not cross in transformers' terms: "cu_seq_lens_q" and "cu_seq_lens_k", [documents + 1]
    int32, where documents start in the rows laid end to end, then the number of all tokens; "max_length_q" and
    "max_length_k", tokens of the longest. Where rows carry a "number", "numbers" lists them, to be taken out before the
    model gets the batch. With `mask_packs`, packed rows have a "token_mask" as well, [rows, tokens] bool, for the
    statistics of routers: no attention needs it.
    """

    pad_token_id: int
    mask_packs: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows are {"input_ids", "labels"} and, where they are packed, "position_ids"."""
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": _pad([row["input_ids"] for row in rows], longest, self.pad_token_id),
            "labels": _pad([row["labels"] for row in rows], longest, IGNORE_INDEX),
        }
        if all(NUMBER in row for row in rows):
            batch[NUMBERS] = [row[NUMBER] for row in rows]
        if not all("position_ids" in row for row in rows):
            return batch | {"attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], longest, 0)}
        positions = torch.stack(
            [torch.cat([row["position_ids"], torch.arange(longest - len(row["position_ids"]))]) for row in rows]
        )
        starts = (positions == 0).flatten().nonzero()[:, 0]
        borders = torch.cat([starts, torch.tensor([positions.numel()])]).to(torch.int32)
        most = int(borders.diff().max())
        if self.mask_packs:
            batch[TOKEN_MASK] = _pad([[1] * len(row["input_ids"]) for row in rows], longest, 0).bool()
        return batch | {
            "position_ids": positions,
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": most,
            "max_length_k": most,
        }


def _pad(rows: list[Any], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded
