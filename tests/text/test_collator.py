"""Padding is known by position."""

import doctest
import random
from typing import Any

import torch

import novelgpt.text.collator
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX


def test_doctest() -> None:
    outcome = doctest.testmod(novelgpt.text.collator)
    assert outcome.attempted > 0 and outcome.failed == 0


def test_padding_by_position_whatever_the_padding_token() -> None:
    draw = random.Random(3)
    for _ in range(50):
        pad = draw.randint(0, 4)
        rows = []
        for _ in range(draw.randint(1, 5)):
            ids = [draw.randint(0, 4) for _ in range(draw.randint(1, 9))]
            rows.append({"input_ids": ids, "labels": [draw.choice([token, IGNORE_INDEX]) for token in ids]})
        before = repr(rows)
        batch = Collator(pad)(rows)
        assert repr(rows) == before
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        longest = max(len(row["input_ids"]) for row in rows)
        for index, row in enumerate(rows):
            rest = longest - len(row["input_ids"])
            assert batch["input_ids"][index].tolist() == row["input_ids"] + [pad] * rest
            assert batch["labels"][index].tolist() == row["labels"] + [IGNORE_INDEX] * rest
            assert batch["attention_mask"][index].tolist() == [1] * len(row["input_ids"]) + [0] * rest
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_weights_are_padded_with_zero_and_one_where_a_row_has_none() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "loss_weights": [0.0, 0.25, 3.0]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "loss_weights": None},
    ]
    batch = Collator(0)(rows)
    assert batch["loss_weights"].dtype == torch.float32
    assert batch["loss_weights"].tolist() == [[0, 0.25, 3, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert "loss_weights" not in Collator(0)(rows[1:])


def test_padding_of_packed_rows_is_a_document_of_its_own() -> None:
    rows = [
        {"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([-100, 6, -100, 8]),
         "position_ids": torch.tensor([0, 1, 0, 1])},
        {"input_ids": torch.tensor([9]), "labels": torch.tensor([-100]), "position_ids": torch.tensor([0])},
    ]  # fmt: skip
    batch = Collator(pad_token_id=9)(rows)
    assert {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8], [9, 9, 9, 9]],
        "labels": [[-100, 6, -100, 8], [-100, -100, -100, -100]],
        "position_ids": [[0, 1, 0, 1], [0, 0, 1, 2]],
        "cu_seq_lens_q": [0, 2, 4, 5, 8],
        "cu_seq_lens_k": [0, 2, 4, 5, 8],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert batch["cu_seq_lens_q"].dtype == torch.int32
