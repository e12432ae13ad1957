"""What is kept of a chapter to find it again: a digest, a MinHash signature, a sample of its shingles.

Layout, punctuation, case and script make no difference: of a text only letters, digits and Chinese characters count,
and traditional characters count as the simplified ones. The texts themselves are left as they are.

A shingle is a run of `SHINGLE` such characters. Two texts are compared by the sets of their shingles:
    similarity (Jaccard)  |A ∩ B| / |A ∪ B|   from MinHash signatures: Broder, "On the resemblance and containment of
                                              documents", 1997; computed by rensa (R-MinHash)
    share (containment)   |A ∩ B| / |A|       from the shingles whose hash lies in the lowest `SAMPLED` of the range
                                              (FracMinHash: Irber et al., 2022, doi 10.1101/2022.01.11.475838)

What remains uncertain: a similarity s is estimated with a standard deviation of √(s(1-s)/128), 0.035 at 0.8, whatever
the length. A share s of a text of n characters rests on n/32 shingles: ±√(32·s(1-s)/n), 0.07 at s = 0.8, n = 1,000. Of
a text below some 250 characters the sample is too small for a share, and only its similarity as a whole is known; of
one below 5 only whether it is the same.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
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
"""One shingle in so many is kept."""
VERSION = (
    f"1: {SHINGLE} {PERMUTATIONS} {SAMPLED}, rensa {RMinHash.ALGORITHM_VERSION}, "
    f"opencc {opencc.__version__}, unicode {unicodedata.unidata_version}"
)
"""Fingerprints of different versions cannot be compared; they are equal in every process where this is."""

_BATCH = 1 << 16  # characters: working arrays stay in the processor's cache
_SEED = 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_MIXER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
# OpenCC leaves 著 as it is, for the sake of 著作; in traditional prose nearly every one of them is 着.
_ALSO_FOLDED = {"著": "着"}


@dataclass(frozen=True)
class Fingerprints:
    """Of n texts.

    Attributes:
        digests: (n, 32) uint8, sha256 of what counts of each text.
        characters: (n,) int64, how many characters of it count.
        signatures: (n, 128) uint32, MinHash; without meaning where a text has no shingle.
        samples: (m,) uint32, the sampled shingles of all texts, text after text, each rising and without repeats.
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
        """Those of the texts from `begin` up to `end`."""
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

    A .npz file of the joined arrays, without pickles; `texts` says how many texts each book has.
    """
    joined = _join(books)
    texts = np.array([len(book) for book in books], np.int64)
    with path.open("wb") as file:
        np.savez(file, version=np.array(VERSION), texts=texts, **vars(joined))


def load_fingerprints(path: Path) -> list[Fingerprints]:
    """What `save_fingerprints` wrote, book by book.

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
    return _join([_fingerprint_batch(batch) for batch in _batches(texts)])


def fold(text: str) -> np.ndarray:
    """(n,) uint32: the code points that count, as they count."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    folded = np.take(_folding_table(), codes)
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
    # One a line: each by itself, so that no word decides what a character becomes.
    simplified = opencc.OpenCC("t2s").convert("\n".join(characters)).split("\n")
    table = np.zeros(0x110000, np.uint32)
    table[points] = [
        ord(after if len(after) == 1 else before) for before, after in zip(characters, simplified, strict=True)
    ]
    return table


def _join(parts: Sequence[Fingerprints]) -> Fingerprints:
    counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.starts) for part in parts)])
    return Fingerprints(
        np.concatenate([np.zeros((0, 32), np.uint8), *(part.digests for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.characters for part in parts)]),
        np.concatenate([np.zeros((0, PERMUTATIONS), np.uint32), *(part.signatures for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.samples for part in parts)]),
        np.cumsum(counts),
    )


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _fingerprint_batch(texts: list[str]) -> Fingerprints:
    folded = [fold(text) for text in texts]
    digests = [np.frombuffer(hashlib.sha256(codes.astype("<u4").tobytes()).digest(), np.uint8) for codes in folded]
    characters = np.array([len(codes) for codes in folded], np.int64)
    hashes = _hash_shingles(np.concatenate(folded))
    # The runs that reach from one text into the next are no shingles of either.
    inside = np.ones(len(hashes), bool)
    end = 0
    for length in characters.tolist():
        begin, end = end, end + length
        inside[max(begin, end - SHINGLE + 1) : end] = False
    hashes = hashes[inside]
    borders = np.zeros(len(texts) + 1, np.uint64)
    np.cumsum(np.maximum(characters - SHINGLE + 1, 0), out=borders[1:], dtype=np.uint64)
    matrix: Any = RMinHash.digest_matrix_from_flat_token_hashes(hashes, borders, PERMUTATIONS, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint32)
    places = np.flatnonzero(hashes < np.uint64((1 << 64) // SAMPLED))
    text_numbers = np.searchsorted(borders, places.astype(np.uint64), side="right") - 1
    # The bits below those that are all zero in a sampled hash.
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
    # A polynomial alone leaves neighbours alike; the sample needs all bits to be even.
    for _ in range(2):
        hashes ^= hashes >> _HALF
        hashes *= _MIXER
    hashes ^= hashes >> _HALF
    return hashes
