"""Bits per character of models on held-out works, work by work: what compares models of different tokenizers.

Every token but the first of a document is predicted once, from the tokens before it in its block of its document.
"""

from __future__ import annotations

import itertools
import math
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import novelgpt.model  # noqa: F401 - makes the architectures of the project known
from dataset.readers import read_text_rows
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.forward_checks import head_is_last
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.model.random_base import count_weights
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.scoring.perplexity import row_sums
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.chunks import ChunkEncoder, DocumentCutter
from novelgpt.text.collator import Collator
from novelgpt.text.packing import PackedBlocks, TokenizedText
from predict.continuations import held_out_files

TOKENS_AT_ONCE = 8192


class Work(NamedTuple):
    """A held-out work, or its first part.

    Attributes:
        name: of the work.
        documents: its text, in one document; of a file of short texts, each of them.
    """

    name: str
    documents: tuple[str, ...]

    @property
    def characters(self) -> int:
        """Of all documents."""
        return sum(map(len, self.documents))


class LoadedModel(NamedTuple):
    """A model that computes losses, its tokenizer, and what encodes works as training does."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: ChunkEncoder


def read_works(prepared: Path, characters: int = 0) -> list[Work]:
    """The held-out works of a folder of `dataset novels`.

    Args:
        prepared: the folder.
        characters: of each work, from its start; 0 for all of it.

    Raises:
        UserError: the folder holds nothing out.
    """
    rows = (row for file in held_out_files([str(prepared)]) for row in read_text_rows(file))
    books = itertools.groupby(rows, key=itemgetter("book"))
    return [Work(name, ("\n\n".join(row["text"] for row in of_book)[: characters or None],)) for name, of_book in books]


def read_documents(name: str, file: Path, characters: int = 0) -> Work:
    """A file of held-out text rows, each a document of its own.

    Args:
        name: for the file.
        file: of text rows.
        characters: from its start; 0 for all of it.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    texts = [row["text"] for row in read_text_rows(file)]
    left = characters or sum(map(len, texts))
    documents = []
    for text in texts:
        if left > 0:
            documents.append(text[:left])
        left -= len(text)
    if not documents:
        raise UserError(f"{file} holds no text", "name a file of text rows")
    return Work(name, tuple(documents))


def load(folder: Path) -> LoadedModel:
    """A checkpoint, to be evaluated.

    Raises:
        UserError: it cannot be loaded.
    """
    arguments = ModelArguments(str(folder), attention="sdpa")
    tokenizer = load_tokenizer(arguments)
    model = load_for_inference(arguments, tokenizer)
    attach_chunked_loss(model, head_is_last(model))
    return LoadedModel(model, tokenizer, ChunkEncoder(tokenizer))


def text_sums(loaded: LoadedModel, work: Work, context: int) -> numpy.ndarray:
    """Sums over a work: [3], nats, tokens predicted, tokens predicted right; the end token of each document counts.

    Args:
        loaded: model and tokenizer.
        work: to read.
        context: tokens per block, within which a token sees those before it.
    """
    rows = [{"text": text, "book": "", "chapter": "", "title": "", "source": work.name} for text in work.documents]
    chunks = DocumentCutter(loaded.encoder.in_chunks).cut(rows, last=True)
    batches, starts = zip(*loaded.encoder.encode(chunks, lambda *_: None), strict=True)
    text = TokenizedText(numpy.concatenate(batches), numpy.array([*itertools.chain(*starts)], numpy.int64))
    blocks = PackedBlocks([text], context, mixed=False)
    collate = Collator(int(loaded.tokenizer.pad_token_id))
    count = max(1, TOKENS_AT_ONCE // context)
    sums = numpy.zeros(3)
    for start in range(0, len(blocks), count):
        batch = collate([blocks[number] for number in range(start, min(start + count, len(blocks)))])
        batch = {name: tensor.to(loaded.model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            outputs = loaded.model(**batch, use_cache=False)
        sums += row_sums(outputs.token_losses, outputs.token_hits, batch["labels"]).sum(dim=0).cpu().numpy()
    return sums


def bits_of_works(loaded: LoadedModel, works: list[Work], context: int) -> dict[str, Any]:
    """Bits per character: all nats / ln 2 / characters.

    Returns:
        {"works": {name: bits per character}, "all": of all characters together, "loss": nats per token,
        "characters_a_token"}.
    """
    sums = [text_sums(loaded, work, context) for work in works]
    nats, tokens, _ = numpy.sum(sums, axis=0).tolist()
    characters = sum(work.characters for work in works)
    in_bits = [float(one[0]) / math.log(2) / work.characters for one, work in zip(sums, works, strict=True)]
    return {
        "works": {work.name: each for work, each in zip(works, in_bits, strict=True)},
        "all": nats / math.log(2) / characters,
        "loss": nats / tokens,
        "characters_a_token": characters / tokens,
    }


def weights_of(config: PreTrainedConfig) -> dict[str, int]:
    """Numbers of weights that a configuration describes; tied ones count once.

    Returns:
        {"all", "embeddings", "multiplied"}: embeddings are all tables and the head; multiplied are all but tables
        that a token is only looked up in.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts, head = count_weights(model), model.get_output_embeddings().weight
    tables = {part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    looked_up = sum(table.numel() for table in tables if table is not head)
    return {
        "all": counts.total,
        "embeddings": counts.total - counts.inner,
        "multiplied": counts.total - looked_up,
    }
