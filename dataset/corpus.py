"""Raw text to packed blocks, for continued pretraining."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.readers import read_text_rows
from novelgpt.settings.arguments import CorpusArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.text.packing import PackedBlocks
from novelgpt.text.statistics import show_counts, show_row
from novelgpt.text.tokenizer import document_end_id, encode


def read_corpus(data: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedBlocks, PackedBlocks]:
    """Blocks to train on and blocks to evaluate on, with a table of what became of the text.

    Raises:
        UserError: what `read_text_rows` raises, or text too short to train on.
    """
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length} leaves no token to predict", "take at least 2")
    train = _pack(data.train_files, data, tokenizer)
    if data.valid_files:
        valid = _pack(data.valid_files, data, tokenizer)
    else:
        kept = math.ceil(len(train) * data.valid_fraction)
        if not 0 < kept < len(train):
            raise UserError(
                f"{len(train)} blocks of {data.max_length} tokens cannot be split into training and evaluation "
                f"with --valid_fraction {data.valid_fraction}",
                "name --valid_files, lower --max_length, or bring more text",
            )
        border = len(train) - kept
        train, valid = train.subset(range(border)), train.subset(range(border, border + kept))
    if is_first_process():
        show_counts({"train": train.counts(), "valid": valid.counts()})
        row = train[0]
        show_row(row["input_ids"].tolist(), row["labels"].tolist(), tokenizer, most_tokens=120)
    return train, valid


def _pack(files: list[str], data: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> PackedBlocks:
    end = document_end_id(tokenizer)
    documents = [
        numpy.array([*encode(text, tokenizer), end], dtype=numpy.int32) for text in _documents(files, data.text_column)
    ]
    if sum(len(document) - 1 for document in documents) == 0:
        raise UserError(f"no trainable token in {', '.join(files)}", "name files that hold text")
    return PackedBlocks(documents, data.max_length, mixed=data.packing)


def _documents(files: list[str], text_column: str) -> Iterator[str]:
    """Texts in file order; neighbouring rows of one book (its chapters) are one document."""
    parts: list[str] = []
    book = ""
    for file in files:
        for row in read_text_rows(Path(file), text_column):
            this = file if file.endswith(".txt") else row["book"]  # files of one name in two folders are two books
            if parts and not (this and this == book):
                yield "\n\n".join(parts)
                parts = []
            book = this
            parts.append(row["text"].strip("\n"))
    if parts:
        yield "\n\n".join(parts)
