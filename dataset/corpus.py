"""Raw text or prepared tokens to packed blocks, for continued pretraining."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
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
from novelgpt.text.origins import TextMarks
from novelgpt.text.packing import PackedBlocks
from novelgpt.text.pieces import DocumentCutter, Piece, PieceEncoder
from novelgpt.text.statistics import show_counts, show_row
from novelgpt.text.token_files import TokenArray, TokenText, join_texts, open_tokens, read_token_manifest

SPLITS = TRAIN, HELD_OUT = "train", "held_out"
# Of text files: from here on, preparing tokens once saves minutes at each start.
LARGE = 50_000_000


class Source(NamedTuple):
    """Where text comes from.

    Attributes:
        split: TRAIN or HELD_OUT; files that are named themselves are TRAIN.
        files: whose rows follow each other, so that a book may go on from one to the next; none in a folder of tokens.
        folder: that was prepared; None where files are named themselves.
        manifest: of a folder of tokens.
    """

    split: str
    files: list[Path]
    folder: Path | None = None
    manifest: dict[str, Any] | None = None


def read_corpus(data: CorpusArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedBlocks, PackedBlocks]:
    """Blocks to train on and blocks to evaluate on, with a table of what became of the text.

    Raises:
        UserError: what `find_sources`, `read_text_rows` and `open_tokens` raise, or text too short to train on.
    """
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length} leaves no token to predict", "take at least 2")
    if data.max_valid_tokens < 0:
        raise UserError(f"--max_valid_tokens {data.max_valid_tokens} is negative", "take 0 for all, or more")
    found = find_sources(data.train_files)
    named = find_sources(data.valid_files)
    if is_first_process():
        _advise(found + named)
    train = _pack([source for source in found if source.split == TRAIN], data, tokenizer, data.train_files)
    # A folder with a held-out part stands for that, where it is named to evaluate on.
    split = {source.folder for source in named if source.folder and source.split == HELD_OUT}
    held_out = [source for source in named if source.split == HELD_OUT or source.folder not in split]
    held_out = held_out or [source for source in found if source.split == HELD_OUT]
    most = max(1, data.max_valid_tokens // data.max_length)
    if data.max_valid_tokens == 0 or (named and not any(source.folder for source in named)):
        most = sys.maxsize  # files that are named one by one are meant as a whole
    if held_out:
        whole = _pack(held_out, data, tokenizer, data.valid_files or data.train_files)
    else:
        train, whole = _split(train, data, most)
    valid = whole
    if len(whole) > most:
        # Spread evenly: a part of every book, where there are many.
        valid = whole.subset(numpy.arange(most) * len(whole) // most)
    if is_first_process():
        _show(train, valid, whole, tokenizer)
    return train, valid


def find_sources(names: Sequence[str]) -> list[Source]:
    """What files and prepared folders hold, in their order; neighbouring files are one source.

    Raises:
        UserError: a name that is neither, or a folder that is not finished.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += _in_folder(path)
        elif not path.is_file():
            raise UserError(f"{name} is no file", "check the path; relative ones start where you type")
        elif found and found[-1].folder is None:
            found[-1].files.append(path)
        else:
            found.append(Source(TRAIN, [path]))
    return found


def cut_file(path: Path, text_column: str, cutter: DocumentCutter) -> Iterator[Piece]:
    """Pieces of the documents of a file; the last document may go on in the next file.

    A .txt file is a document, and so is a row; neighbouring rows of one book (its chapters) are one document.
    """
    plain = path.suffix.lower() == ".txt"
    for row in read_text_rows(path, text_column):
        known = ", ".join(row[name] for name in ("book", "chapter", "title") if row[name] and not plain)
        where = f"{row['source']} ({known})" if known else row["source"]
        yield from cutter.add(row["text"], "" if plain else row["book"], where, lines=plain)


def _in_folder(folder: Path) -> list[Source]:
    manifest = read_token_manifest(folder)
    if manifest is not None:
        return [Source(split, [], folder, manifest) for split in manifest["splits"]]
    found = [
        Source(split, files, folder)
        for split in SPLITS
        if (files := sorted(path for path in folder.glob(f"{split}-*") if path.suffix in (".parquet", ".jsonl")))
    ]
    if not found:
        raise UserError(
            f"{folder} holds no train-….parquet or .jsonl", f"prepare it: {python_module('dataset novels RAW OUT')}"
        )
    return found


def _pack(
    sources: list[Source], data: CorpusArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> PackedBlocks:
    encoder: PieceEncoder | None = None
    texts = []
    for source in sources:
        if source.folder is not None and source.manifest is not None:
            texts.append(open_tokens(source.folder, source.manifest, source.split, tokenizer))
        else:
            encoder = encoder or PieceEncoder(tokenizer)
            texts.append(_encode(source.files, data.text_column, encoder))
    text = join_texts(texts)
    if len(text.tokens) == len(text.starts):
        raise UserError(f"no trainable token in {', '.join(names)}", "name files that hold text")
    return PackedBlocks.of_text(text, data.max_length, mixed=data.packing)


def _encode(files: Iterable[Path], text_column: str, encoder: PieceEncoder) -> TokenText:
    cutter = DocumentCutter(encoder.in_pieces)

    def pieces() -> Iterator[Piece]:
        for file in files:
            yield from cut_file(file, text_column, cutter)
        yield from cutter.end()

    tokens: list[numpy.ndarray] = []
    starts: list[int] = []
    count = 0
    marks = TextMarks()
    for batch, begins in encoder.encode(pieces(), marks):
        starts += [count + begin for begin in begins]
        tokens.append(batch)
        count += len(batch)
    array = TokenArray([numpy.concatenate(tokens)] if tokens else [])
    return TokenText(array, numpy.array(starts, numpy.int64), [(count, marks)])


def _split(blocks: PackedBlocks, data: CorpusArguments, most: int) -> tuple[PackedBlocks, PackedBlocks]:
    """The last blocks, for evaluation, away from the others."""
    kept = min(most, math.ceil(len(blocks) * data.valid_fraction))
    if not 0 < kept < len(blocks):
        raise UserError(
            f"{counted(len(blocks), 'block')} of {data.max_length} tokens cannot be split into training and evaluation "
            f"with --valid_fraction {data.valid_fraction}",
            "name --valid_files, lower --max_length, or bring more text",
        )
    border = len(blocks) - kept
    return blocks.subset(range(border)), blocks.subset(range(border, border + kept))


def _show(train: PackedBlocks, valid: PackedBlocks, whole: PackedBlocks, tokenizer: PreTrainedTokenizerBase) -> None:
    counts = valid.counts()
    if len(whole) > len(valid):
        counts.tokens_in = whole.counts().tokens_in
        counts.dropped = counts.tokens_in - counts.trained - counts.context
        counts.notes[f"of {len(whole):,} held-out blocks are evaluated on (--max_valid_tokens)"] = len(valid)
    show_counts({"train": train.counts(), "valid": counts})
    row = train[0]
    show_row(row["input_ids"].tolist(), row["labels"].tolist(), tokenizer, most_tokens=120)


def _advise(sources: list[Source]) -> None:
    size = sum(path.stat().st_size for source in sources for path in source.files)
    if size > LARGE or any(source.folder and source.files for source in sources):
        say(
            f"every process now tokenises {size / 1e6:,.1f} MB of files; to do it once, for this and later runs:",
            f"  {python_module('dataset tokens IN … OUT --model MODEL')}, then --train_files OUT",
        )
