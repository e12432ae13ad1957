"""The fingerprint of a chapter: a digest, a MinHash signature, and a sample of its shingles.

Layout, punctuation, case and script make no difference: of a text only letters, digits and Chinese characters count,
and traditional characters count as simplified ones. The texts themselves are not changed.

A shingle is a run of `SHINGLE` such characters. Two texts are compared by the sets of their shingles:
    similarity (Jaccard)  |A ∩ B| / |A ∪ B|   from MinHash signatures: Broder, "On the resemblance and containment of
                                              documents", 1997; computed by rensa (R-MinHash)
    share (containment)   |A ∩ B| / |A|       from the shingles whose hash lies in the lowest `SAMPLED` of the range
                                              (FracMinHash: Irber et al., 2022, doi 10.1101/2022.01.11.475838)

Errors: a similarity s is estimated with a standard deviation of √(s(1-s)/128), 0.035 at 0.8, whatever the length. A
share s of a text of n characters is estimated from n/32 shingles: ±√(32·s(1-s)/n), 0.07 at s = 0.8, n = 1,000. Of a
text below some 250 characters the sample is too small for a share, and only its similarity as a whole is known; of one
below 5 only whether it is the same.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import opencc
from rensa import RMinHash

from novelgpt.settings.errors import UserError

SHINGLE = 5
PERMUTATIONS = 128
SAMPLED = 32
"""One shingle in this many is kept."""
VERSION = (
    f"1: {SHINGLE} {PERMUTATIONS} {SAMPLED}, rensa {RMinHash.ALGORITHM_VERSION}, "
    f"opencc {opencc.__version__}, unicode {unicodedata.unidata_version}"
)
"""Fingerprints of different versions cannot be compared; those of one version are equal in every process."""

_BATCH = 1 << 16  # characters: working arrays fit into the CPU cache
_SEED = 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_MIXER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
# OpenCC does not convert 著, because of 著作; in traditional prose nearly every one of them is 着.
_ALSO_FOLDED = {"著": "着"}


@dataclass(frozen=True)
class Fingerprints:
    """Of n texts.

    Attributes:
        digests: (n, 32) uint8, sha256 of the characters of each text that count.
        characters: (n,) int64, number of characters that count.
        signatures: (n, 128) uint32, MinHash; meaningless where a text has no shingle.
        samples: (m,) uint32, the sampled shingles of all texts, text after text, each ascending and distinct.
        starts: (n + 1,) int64, the samples of text i are samples[starts[i] : starts[i + 1]].
    """

    digests: np.ndarray
    characters: np.ndarray
    signatures: np.ndarray
    samples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.characters)

    def part(self, begin: int, end: int) -> Fingerprints:
        """Those of the texts from `begin` up to, not including, `end`."""
        starts = self.starts[begin : end + 1]
        return Fingerprints(
            self.digests[begin:end],
            self.characters[begin:end],
            self.signatures[begin:end],
            self.samples[starts[0] : starts[-1]],
            starts - starts[0],
        )


def save_fingerprints(books: Sequence[Fingerprints], path: Path) -> None:
    """Write the fingerprints of the books of one source: the same bytes for the same fingerprints.

    A .npz file of the concatenated arrays, without pickles; `texts` is the number of texts of each book.
    """
    joined = _join(books)
    texts = np.array([len(book) for book in books], np.int64)
    with path.open("wb") as file:
        np.savez(file, version=np.array(VERSION), texts=texts, **vars(joined))


def load_fingerprints(path: Path) -> list[Fingerprints]:
    """Read what `save_fingerprints` wrote, book by book.

    Raises:
        UserError: no such file, or one of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = dict(arrays)
        if str(stored.pop("version")) != VERSION:
            raise ValueError("they were made by another version")
        ends = np.cumsum(stored.pop("texts")).tolist()
        joined = Fingerprints(**stored)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no usable fingerprints: {error}", "remove it, and run the command again") from None
    return [joined.part(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def fingerprint(texts: Sequence[str]) -> Fingerprints:
    """Fingerprints of the chapters of a book, in order."""
    parts: list[Fingerprints] = []
    batch: list[str] = []
    size = 0
    for number, text in enumerate(texts, start=1):
        batch.append(text)
        size += len(text)
        if size >= _BATCH or number == len(texts):
            parts.append(_fingerprint_batch(batch))
            batch, size = [], 0
    return _join(parts)


def fold(text: str) -> np.ndarray:
    """(n,) uint32: the code points that count, normalised."""
    folded = np.take(_folding_table(), np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32))
    return folded[folded != 0]


@functools.lru_cache(maxsize=1)
def _folding_table() -> np.ndarray:
    """(0x110000,) uint32: code point -> the code point it counts as, 0 if it does not count."""
    points = [point for point in range(0x110000) if chr(point).isalnum()]
    characters = []
    for character in map(chr, points):
        plain = unicodedata.normalize("NFKC", character).casefold()
        plain = plain if len(plain) == 1 and plain.isalnum() else character
        characters.append(_ALSO_FOLDED.get(plain, plain))
    # One per line, so that no word affects the conversion of a character.
    simplified = opencc.OpenCC("t2s").convert("\n".join(characters)).split("\n")
    table = np.zeros(0x110000, np.uint32)
    table[points] = [
        ord(after if len(after) == 1 else before) for before, after in zip(characters, simplified, strict=True)
    ]
    return table


def _join(parts: Sequence[Fingerprints]) -> Fingerprints:
    return Fingerprints(
        np.concatenate([np.zeros((0, 32), np.uint8), *(part.digests for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.characters for part in parts)]),
        np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *(part.signatures for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.samples for part in parts)]),
        np.cumsum(np.concatenate([np.zeros(1, np.int64), *(np.diff(part.starts) for part in parts)])),
    )


def _fingerprint_batch(texts: list[str]) -> Fingerprints:
    folded = [fold(text) for text in texts]
    digests = [np.frombuffer(hashlib.sha256(codes.astype("<u4").tobytes()).digest(), np.uint8) for codes in folded]
    characters = np.array([len(codes) for codes in folded], np.int64)
    hashes = _hash_shingles(np.concatenate(folded))
    # Runs that reach from one text into the next are not shingles of either.
    inside = np.ones(len(hashes), bool)
    end = 0
    for length in characters.tolist():
        begin, end = end, end + length
        inside[max(begin, end - SHINGLE + 1) : end] = False
    hashes = hashes[inside]
    boundaries = np.zeros(len(texts) + 1, np.uint64)
    np.cumsum(np.maximum(characters - SHINGLE + 1, 0), out=boundaries[1:], dtype=np.uint64)
    matrix: Any = RMinHash.digest_matrix_from_flat_token_hashes(hashes, boundaries, PERMUTATIONS, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint32)
    places = np.flatnonzero(hashes < np.uint64((1 << 64) // SAMPLED))
    text_numbers = np.searchsorted(boundaries, places.astype(np.uint64), side="right") - 1
    # The bits below those that are zero in every sampled hash.
    values = (hashes[places] >> np.uint64(64 - 32 - SAMPLED.bit_length() + 1)) & np.uint64(0xFFFFFFFF)
    distinct = np.unique(text_numbers.astype(np.uint64) << _HALF | values)
    starts = np.searchsorted(distinct, np.arange(len(texts) + 1, dtype=np.uint64) << _HALF)
    return Fingerprints(np.stack(digests), characters, signatures, distinct.astype(np.uint32), starts)


def _hash_shingles(codes: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of the five code points from each place on; the last four places run into zeros."""
    words = np.zeros(len(codes) + SHINGLE - 1, np.uint64)
    words[: len(codes)] = codes
    pairs = words[:-1] * np.uint64(_MULTIPLIER)
    pairs += words[1:]
    fours = pairs[:-2] * np.uint64(_MULTIPLIER**2 % (1 << 64))
    fours += pairs[2:]
    hashes = fours[:-1] * np.uint64(_MULTIPLIER)
    hashes += words[SHINGLE - 1 :]
    # A polynomial alone gives neighbours similar hashes; the sample needs uniform bits.
    for _ in range(2):
        hashes ^= hashes >> _HALF
        hashes *= _MIXER
    hashes ^= hashes >> _HALF
    return hashes
