"""Raw text or prepared tokens to packed blocks, for continued pretraining."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.readers import read_text_rows
from novelgpt.settings.arguments import CorpusArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import counted, say
from novelgpt.text.chunks import ChunkEncoder, DocumentCutter
from novelgpt.text.data_names import find_text_files
from novelgpt.text.origins import TokenOrigins
from novelgpt.text.packing import PackedBlocks, TokenizedText
from novelgpt.text.statistics import show_counts, show_first_row
from novelgpt.text.token_files import open_tokens, read_token_manifest

SPLITS = TRAIN, HELD_OUT = "train", "held_out"
# Bytes of text files above which preparing tokens once saves minutes at each start.
LARGE = 50_000_000


class CorpusSource(NamedTuple):
    """Where text comes from.

    Attributes:
        split: TRAIN or HELD_OUT; files that are named themselves are TRAIN.
        files: in order, so that a book may continue in the next one; none in a folder of tokens.
        folder: that was prepared; None where files are named themselves.
        manifest: of a folder of tokens.
    """

    split: str
    files: list[Path]
    folder: Path | None = None
    manifest: dict[str, Any] | None = None


def read_corpus(data: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedBlocks, PackedBlocks]:
    """Blocks to train on and blocks for validation, with a table of token counts.

    Raises:
        UserError: what `find_sources`, `read_text_rows` and `open_tokens` raise, or text too short to train on.
    """
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length} leaves no token to predict", "take at least 2")
    if data.max_valid_tokens < 0:
        raise UserError(f"--max_valid_tokens {data.max_valid_tokens} is negative", "take 0 for all, or more")
    found, named = find_sources(data.train_files), find_sources(data.valid_files)
    size = sum(path.stat().st_size for source in found + named for path in source.files)
    if is_first_process() and (size > LARGE or any(source.folder and source.files for source in found + named)):
        say(
            f"every process now tokenises {size / 1e6:,.1f} MB of files; to do it once, for this and later runs:",
            f"  {python_module('dataset tokens IN … OUT --model MODEL')}, then --train_files OUT",
        )
    train = _pack([source for source in found if source.split == TRAIN], data, tokenizer, data.train_files)
    # Of a folder named for validation, the held-out part is taken, if it has one.
    with_held_out = {source.folder for source in named if source.folder and source.split == HELD_OUT}
    held_out = [source for source in named if source.split == HELD_OUT or source.folder not in with_held_out]
    held_out = held_out or [source for source in found if source.split == HELD_OUT]
    limit = max(1, data.max_valid_tokens // data.max_length)
    if data.max_valid_tokens == 0 or (named and not any(source.folder for source in named)):
        limit = sys.maxsize  # files that are named one by one are used in full
    if held_out:
        whole = _pack(held_out, data, tokenizer, data.valid_files or data.train_files)
    else:
        kept = min(limit, math.ceil(len(train) * data.valid_fraction))
        if not 0 < kept < len(train):
            raise UserError(
                f"{counted(len(train), 'block')} of {data.max_length} tokens cannot be split into training and "
                f"evaluation with --valid_fraction {data.valid_fraction}",
                "name --valid_files, lower --max_length, or bring more text",
            )
        boundary = len(train) - kept
        train, whole = train.subset(range(boundary)), train.subset(range(boundary, boundary + kept))
    valid = whole
    if len(whole) > limit:
        # Spread evenly: a part of every book, where there are many.
        valid = whole.subset(numpy.arange(limit) * len(whole) // limit)
    train = train.with_repetitions(data.ditto)
    if is_first_process():
        counts = valid.counts()
        if len(whole) > len(valid):
            counts.tokens_in = whole.counts().tokens_in
            counts.dropped = counts.tokens_in - counts.trained - counts.context
            counts.notes[f"of {len(whole):,} held-out blocks are evaluated on (--max_valid_tokens)"] = len(valid)
        show_counts({"train": train.counts(), "valid": counts})
        show_first_row(train, tokenizer, max_tokens=120)
    return train, valid


def find_sources(names: Sequence[str]) -> list[CorpusSource]:
    """The contents of files, of patterns and of prepared folders, in order; neighbouring files are one source.

    Raises:
        UserError: a name that is none of these, or a folder that is not finished.
    """
    found: list[CorpusSource] = []
    for name in names:
        path = Path(name)
        if not os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for names that are too long
            if not found or found[-1].folder is not None:
                found.append(CorpusSource(TRAIN, []))
            found[-1].files.extend(map(Path, find_text_files(name)))
            continue
        if (manifest := read_token_manifest(path)) is not None:
            found += [CorpusSource(split, [], path, manifest) for split in manifest["splits"]]
            continue
        shards = sorted(shard for shard in path.iterdir() if shard.suffix in (".parquet", ".jsonl"))
        prepared = {split: [shard for shard in shards if shard.name.startswith(f"{split}-")] for split in SPLITS}
        if not any(prepared.values()):
            raise UserError(
                f"{path} holds no train-….parquet or .jsonl", f"prepare it: {python_module('dataset novels RAW OUT')}"
            )
        found += [CorpusSource(split, files, path) for split, files in prepared.items() if files]
    return found


def _pack(
    sources: list[CorpusSource], data: CorpusArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PackedBlocks:
    encoder: ChunkEncoder | None = None
    texts: list[TokenizedText] = []
    for source in sources:
        if source.folder is not None and source.manifest is not None:
            texts += open_tokens(source.folder, source.manifest, source.split, tokenizer)
            continue
        encoder = encoder or ChunkEncoder(tokenizer)
        cutter = DocumentCutter(encoder.in_chunks)
        chunks = itertools.chain.from_iterable(
            cutter.cut(read_text_rows(file, data.text_column), whole_files=file.suffix.lower() == ".txt")
            for file in source.files
        )
        tokens, starts, origins = [numpy.zeros(0, encoder.dtype)], list[int](), TokenOrigins()
        for batch, batch_starts in encoder.encode(itertools.chain(chunks, cutter.cut([], last=True)), origins.add):
            tokens.append(batch)
            starts += batch_starts
        texts.append(TokenizedText(numpy.concatenate(tokens), numpy.array(starts, numpy.int64), origins))
    if not sum(len(text.tokens) - len(text.starts) for text in texts):
        raise UserError(f"no trainable token in {', '.join(names)}", "name files that hold text")
    return PackedBlocks(texts, data.max_length, mixed=data.packing)
