"""Small tokenizers of every kind, and the text that they are trained on."""

import json
import random

from tokenizers import Tokenizer

from dataset.tokenizers.byte_level import train_bytes
from dataset.tokenizers.characters import train_characters
from dataset.tokenizers.subwords import train_subwords
from dataset.tokenizers.words import load_segmenter, train_words
from novelgpt.settings.paths import SAMPLES

SIZES = {"byte_bpe": 1200, "bpe": 1500, "unigram": 1500, "char": 900, "words": 2500}
EXACT = ("byte_bpe", "bpe", "unigram")  # those that promise decode(encode(text)) == text


def sample_pieces() -> list[str]:
    """The lines of the sample novels and papers. Without what draws pieces, which imports the model libraries."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((SAMPLES / "novels").glob("*.txt"))]
    for name in ("train", "test"):
        rows = (SAMPLES / "papers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts += [f"{row['title']}\n{row['abstract']}\n" for row in map(json.loads, rows)]
    return [line for text in texts for line in text.splitlines(keepends=True)]


def random_lines(count: int) -> list[str]:
    """Stretches of the same text that begin and end anywhere."""
    text, draw = "".join(sample_pieces()), random.Random(5)
    starts = (draw.randrange(len(text)) for _ in range(count))
    return [text[start : start + draw.randrange(1, 120)] for start in starts]


def trained(kind: str, pieces: list[str], size: int | None = None) -> Tokenizer:
    """A tokenizer of a kind."""
    size = size or SIZES[kind]
    if kind == "byte_bpe":
        return train_bytes(pieces, size, 4)
    if kind == "char":
        return train_characters(pieces, size)
    if kind == "words":
        return train_words(pieces, size, 16, load_segmenter("jieba"))
    return train_subwords(kind, pieces, size, 8)
