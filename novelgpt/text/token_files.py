"""Tokens on disk, mapped into memory: training starts immediately, and the processes of a host share one copy.

A folder holds manifest.json and shards/NAME/ with `tokens` (flat, little-endian unsigned integers), `starts.npy`
(int64, where documents start in them) and `origins.jsonl` (the rows that they were made of). The manifest names the
shards of each split in order, and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import python_module
from novelgpt.text.chunks import ChunkEncoder, encode_texts
from novelgpt.text.encoding import document_begin_ids, document_end_id
from novelgpt.text.origins import SavedOrigins
from novelgpt.text.packing import TokenizedText, map_tokens

KIND, VERSION = "novelgpt tokens", 1
MANIFEST, SHARDS, TOKENS, STARTS, ORIGINS = "manifest.json", "shards", "tokens", "starts.npy", "origins.jsonl"
# About so many tokens of the vocabulary go into the text that distinguishes tokenizers.
_PROBED = 20_000
_PROBE = "第一回　甄士隐梦幻识通灵\n\n　　“你好！”他说：《红楼梦》共120回。\n\t  It's 3.14 — don't 😀\r\n繁體，龘𠮷……"


class _Fields(BaseModel):
    """The fields of manifest.json that are read; there may be more."""

    model_config = ConfigDict(strict=True, extra="allow")


class _TokenShard(_Fields):
    name: str = Field(pattern=r"^\w+$")
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: dict[str, str] = {}
    file: str = ""


class _Split(_Fields):
    shards: list[_TokenShard]


class _Tokenizer(_Fields):
    model: str
    sha256: str
    vocabulary: int
    dtype: str = Field(pattern=r"^[<|]u[1248]$")


class _TokenManifest(_Fields):
    tokenizer: _Tokenizer
    splits: dict[str, _Split]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal sha256 of what determines the tokens of a text: the vocabulary, the merges, and the tokens that start
    and end documents.

    Merges are probed by encoding a text made of the vocabulary, so that saving a tokenizer, loading it in another
    version of its library or changing its chat template does not change the digest.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    probed = [index for index, _ in vocabulary[:: max(1, len(vocabulary) // _PROBED)]]
    texts = [
        str(tokenizer.decode(probed[begin : begin + 500], clean_up_tokenization_spaces=False))
        for begin in range(0, len(probed), 500)
    ]
    what = [vocabulary, document_end_id(tokenizer), encode_texts([_PROBE, *texts], tokenizer)]
    if begin_ids := document_begin_ids(tokenizer):
        what.append(begin_ids)  # only then, so that folders made before begin tokens existed keep their digest
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def read_token_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of a folder of tokens; None for a prepared folder of another kind.

    Raises:
        UserError: there is no readable manifest.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {MANIFEST}: nothing was prepared there, or not to its end",
            "name files, or a folder that `dataset novels` or `dataset tokens` has finished: "
            f"{python_module('dataset --help')}",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", "prepare the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        return None
    if manifest.get("version") != VERSION:
        raise UserError(f"{folder} holds tokens in the form of another version", "prepare them again")
    try:
        return _TokenManifest.model_validate(manifest).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} cannot be read: {where}: {first['msg']}", "prepare the folder again") from error


def describe_tokenizer(encoder: ChunkEncoder, model: str) -> dict[str, Any]:
    """The manifest's entry for a tokenizer: where it came from, and what identifies it."""
    return {
        "model": model,
        "sha256": tokenizer_digest(encoder.tokenizer),
        "vocabulary": len(encoder.tokenizer),
        "end_of_document": encoder.end,
        "dtype": encoder.dtype.str,
    }


def open_tokens(
    folder: Path, manifest: dict[str, Any], split: str, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedText]:
    """The shards of a split, in order. No token is read.

    Raises:
        UserError: the tokens are another tokenizer's, or a file is missing or truncated.
    """
    made_with = manifest["tokenizer"]
    if made_with["sha256"] != (digest := tokenizer_digest(tokenizer)):
        raise UserError(
            f"{folder} holds tokens of the tokenizer of {made_with['model']} ({made_with['vocabulary']} tokens, "
            f"{made_with['sha256'][:12]}), and the model has another one ({len(tokenizer)} tokens, {digest[:12]})",
            f"train {made_with['model']}, or run `{python_module('dataset tokens')}` with the --model that you train",
        )
    shards = []
    for shard in manifest["splits"][split]["shards"]:
        path = folder / SHARDS / shard["name"]
        try:
            starts = numpy.load(path / STARTS, allow_pickle=False)
            size = (path / TOKENS).stat().st_size
        except (OSError, ValueError, EOFError):
            starts, size = numpy.zeros(0), -1
        if size != shard["tokens"] * numpy.dtype(made_with["dtype"]).itemsize or len(starts) != shard["documents"]:
            raise UserError(
                f"{path} is damaged or missing", f"run the same `{python_module('dataset tokens')}` again to repair it"
            )
        # Folders of older versions do not record what their shards were made of.
        origins = SavedOrigins(path / ORIGINS, shard.get("file") or str(path))
        shards.append(TokenizedText(map_tokens(path / TOKENS, made_with["dtype"]), starts, origins))
    return shards
