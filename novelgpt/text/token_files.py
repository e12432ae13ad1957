"""Tokens on disk, mapped into memory: training starts at once, and the processes of a host share one copy.

A folder holds manifest.json and shards/NAME/ with `tokens` (flat, little-endian unsigned integers), `starts.npy`
(int64, where documents begin in them) and `origins.jsonl` (the rows that they were made of). The manifest names the
shards of each split in order, and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import python_module
from novelgpt.text.encoding import document_begin_ids, document_end_id
from novelgpt.text.origins import SavedMarks, TokenOrigins
from novelgpt.text.pieces import PieceEncoder, encode_texts

KIND, VERSION = "novelgpt tokens", 1
MANIFEST, SHARDS, TOKENS, STARTS, ORIGINS = "manifest.json", "shards", "tokens", "starts.npy", "origins.jsonl"
# Of the vocabulary, about so many tokens go into the text that tokenizers are told apart by.
_TRIED = 20_000
_PROBE = "第一回　甄士隐梦幻识通灵\n\n　　“你好！”他说：《红楼梦》共120回。\n\t  It's 3.14 — don't 😀\r\n繁體，龘𠮷……"


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field(pattern=r"^\w+$")
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: dict[str, str] = {}
    file: str = ""


class _Split(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    shards: list[_Shard]


class _Tokenizer(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    sha256: str
    vocabulary: int
    dtype: str = Field(pattern=r"^[<|]u[1248]$")


class _Manifest(BaseModel):
    """What a folder of tokens is asked for; more may be there."""

    model_config = ConfigDict(strict=True, extra="allow")

    tokenizer: _Tokenizer
    splits: dict[str, _Split]


class TokenArray:
    """Arrays end to end, as one; of mapped files, only what is asked for is read. Processes get them by file name."""

    def __init__(self, parts: Sequence[numpy.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = numpy.cumsum([0, *map(len, self.parts)])[1:]

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, places: slice) -> numpy.ndarray:
        """Tokens [as many as there are] of a slice without a step."""
        begin, end, _ = places.indices(len(self))
        first, last = numpy.searchsorted(self.ends, [begin, max(begin, end - 1)], side="right").tolist()
        taken = []
        for part, stop in zip(self.parts[first : last + 1], self.ends[first : last + 1].tolist(), strict=True):
            start = stop - len(part)
            taken.append(part[max(0, begin - start) : max(0, end - start)])
        return taken[0] if len(taken) == 1 else numpy.concatenate([*taken, numpy.zeros(0, numpy.uint16)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_array, ([
            (part.filename, part.dtype.str) if isinstance(part, numpy.memmap) else part for part in self.parts
        ],)  # fmt: skip


def _make_array(parts: list[Any]) -> TokenArray:
    return TokenArray([_map(*part) if isinstance(part, tuple) else part for part in parts])


def _map(path: Path, dtype: str) -> numpy.ndarray:
    if not path.stat().st_size:
        return numpy.zeros(0, dtype)  # nothing can be mapped
    return numpy.memmap(path, dtype=dtype, mode="r")


class TokenText(NamedTuple):
    """Documents end to end: their tokens, and [documents] int64, where each begins in them.

    `origins` tell where the tokens came from, in parts of so many tokens each; there may be none.
    """

    tokens: TokenArray
    starts: numpy.ndarray
    origins: Sequence[tuple[int, TokenOrigins]] = ()


def join_texts(texts: Iterable[TokenText]) -> TokenText:
    """Texts end to end."""
    parts: list[numpy.ndarray] = []
    starts = [numpy.zeros(0, numpy.int64)]
    origins: list[tuple[int, TokenOrigins]] = []
    count = 0
    for text in texts:
        parts += text.tokens.parts
        starts.append(text.starts + count)
        origins += text.origins
        count += len(text.tokens)
    return TokenText(TokenArray(parts), numpy.concatenate(starts), origins)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal sha256 of what decides the tokens of a text: the vocabulary, what begins and ends documents, what it
    merges.

    The last by encoding a text made of the vocabulary, so that saving a tokenizer, loading it in another version of its
    library, and giving it another chat template change nothing.
    """
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    tried = [index for index, _ in vocabulary[:: max(1, len(vocabulary) // _TRIED)]]
    texts = [
        str(tokenizer.decode(tried[begin : begin + 500], clean_up_tokenization_spaces=False))
        for begin in range(0, len(tried), 500)
    ]
    what = [vocabulary, document_end_id(tokenizer), encode_texts([_PROBE, *texts], tokenizer)]
    if begin := document_begin_ids(tokenizer):
        what.append(begin)  # else the digest is that of folders made before begin tokens were put in
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def read_token_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of a folder of tokens; None where the folder is something else that is prepared.

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
        return _Manifest.model_validate(manifest).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} cannot be read: {where}: {first['msg']}", "prepare the folder again") from error


def describe_tokenizer(encoder: PieceEncoder, model: str) -> dict[str, Any]:
    """What the manifest keeps of a tokenizer: where it came from, and what tells it from others."""
    return {
        "model": model,
        "sha256": tokenizer_digest(encoder.tokenizer),
        "vocabulary": len(encoder.tokenizer),
        "end_of_document": encoder.end,
        "dtype": encoder.dtype.str,
    }


def open_tokens(folder: Path, manifest: dict[str, Any], split: str, tokenizer: PreTrainedTokenizerBase) -> TokenText:
    """A split of a folder of tokens. No token is read.

    Raises:
        UserError: the tokens are another tokenizer's, or a file is missing or cut short.
    """
    made_with = manifest["tokenizer"]
    if made_with["sha256"] != (digest := tokenizer_digest(tokenizer)):
        raise UserError(
            f"{folder} holds tokens of the tokenizer of {made_with['model']} ({made_with['vocabulary']} tokens, "
            f"{made_with['sha256'][:12]}), and the model has another one ({len(tokenizer)} tokens, {digest[:12]})",
            f"train {made_with['model']}, or run `{python_module('dataset tokens')}` with the --model that you train",
        )
    return join_texts(_open_shard(folder, shard, made_with["dtype"]) for shard in manifest["splits"][split]["shards"])


def _open_shard(folder: Path, shard: dict[str, Any], dtype: str) -> TokenText:
    path = folder / SHARDS / shard["name"]
    try:
        starts = numpy.load(path / STARTS, allow_pickle=False)
        complete = (path / TOKENS).stat().st_size == shard["tokens"] * numpy.dtype(dtype).itemsize
    except (OSError, ValueError, EOFError):
        complete = False
    if not complete or len(starts) != shard["documents"]:
        raise UserError(
            f"{path} is damaged or missing", f"run the same `{python_module('dataset tokens')}` again: it mends that"
        )
    # Folders of older versions do not know what their shards were made of.
    made_from = shard.get("file") or f"{path}"
    return TokenText(
        TokenArray([_map(path / TOKENS, dtype)]), starts, [(shard["tokens"], SavedMarks(path / ORIGINS, made_from))]
    )
