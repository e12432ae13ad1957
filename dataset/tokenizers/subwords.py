"""BPE of characters and unigram models, trained by sentencepiece; characters outside the vocabulary become bytes.

The trained model becomes a tokenizer.json, so that neither sentencepiece nor protobuf is needed to load it.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dataset.tokenizers.too_small import check_room, corpus_too_small
from novelgpt.text.pretokenization import QUOTATION_MARKS, QWEN_SPECIAL_TOKENS

UNKNOWN = "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Tokens of their own in every text: quotation marks, digits and line ends.
MARKS = [*QUOTATION_MARKS, *"0123456789", "\n"]
# What sentencepiece writes for a blank, and two characters that it takes for its own in a text.
BLANK = "▁"
RESERVED = ["\n", BLANK, "▅"]
# The most frequent characters that make up so much of the text are tokens, but at most half of the vocabulary: they
# would otherwise fill a small one. All others are written in bytes.
COVERAGE, LARGEST_SHARE_OF_CHARACTERS = 0.9995, 0.5
# In every vocabulary, with the token of what is unknown.
OWN_TOKENS = 1 + len(MARKS) + len(BYTES)
LEAST = OWN_TOKENS + len(QWEN_SPECIAL_TOKENS)
# Candidates that a unigram model starts from. With sentencepiece's own million it takes nearly twice as long, for the
# same number of characters per token.
LEAST_SEEDS, SEEDS_PER_TOKEN = 100_000, 10
# The order in which numbers are added depends on it, so it is not that of the cores.
THREADS = 8
# As each digit stands alone, no text can spell the token of a byte, which has the digit 0.
_SPLITS = rf"[{QUOTATION_MARKS}\n]|\p{{N}}"
_TOO_HIGH = re.compile(r"value <= (\d+)")


def train_subwords(kind: str, pieces: list[str], vocabulary_size: int, max_token_length: int) -> Tokenizer:
    """Train a BPE of characters, or a unigram model, with bytes for rare characters and Qwen's special tokens.

    Args:
        kind: `bpe` or `unigram`.
        pieces: of text.
        vocabulary_size: tokens, special ones included.
        max_token_length: characters that a token may have.

    Raises:
        UserError: the pieces give fewer tokens, or there is no room for bytes and marks.
    """
    check_room(kind, vocabulary_size, LEAST)
    model = train_sentencepiece(kind, pieces, vocabulary_size, max_token_length)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    scored = [
        (processor.id_to_piece(index).replace(BLANK, " "), processor.get_score(index))
        for index in range(processor.get_piece_size())
    ]
    if kind == "bpe":
        vocabulary = {piece: index for index, (piece, _) in enumerate(scored)}
        tokenizer = Tokenizer(models.BPE(vocabulary, _merges(scored), unk_token=UNKNOWN, byte_fallback=True))
    else:
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLITS), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    return tokenizer


def train_sentencepiece(kind: str, pieces: list[str], vocabulary_size: int, max_token_length: int) -> bytes:
    """The model that sentencepiece trains for `train_subwords`, without Qwen's special tokens.

    Raises:
        UserError: the pieces give fewer tokens.
    """
    size = vocabulary_size - len(QWEN_SPECIAL_TOKENS)
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    covered = _covered(counts, size)
    if covered.issubset(MARKS):
        raise corpus_too_small(kind, vocabulary_size, LEAST, LEAST)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines_of_covered(pieces, counts, covered),
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=MARKS,
            max_sentencepiece_length=max_token_length,
            # The text as it is: full-width forms stay, and so do blanks.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            unk_piece=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            seed_sentencepiece_size=max(LEAST_SEEDS, SEEDS_PER_TOKEN * size),
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        found = _TOO_HIGH.search(str(error))
        if found is None:
            raise
        raise corpus_too_small(kind, vocabulary_size, int(found[1]) + len(QWEN_SPECIAL_TOKENS), LEAST) from error
    return model.getvalue()


def _covered(counts: Counter[str], size: int) -> set[str]:
    """The characters that are tokens, of which all but the marks take room that bytes and marks leave."""
    counts = Counter({character: number for character, number in counts.items() if character not in RESERVED})
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    most, needed = int(size * LARGEST_SHARE_OF_CHARACTERS), COVERAGE * counts.total()
    room = size - OWN_TOKENS
    covered: set[str] = set()
    for character in ranked[:most]:
        room -= character not in MARKS
        if needed <= 0 or room < 0:
            break
        needed -= counts[character]
        covered.add(character)
    return covered


def _lines_of_covered(pieces: list[str], characters: Iterable[str], covered: set[str]) -> Iterator[str]:
    """The lines, cut where a character stands that is no token of its own, as the trained model will be."""
    cuts = dict.fromkeys(map(ord, {*characters, *RESERVED} - covered), "\n")
    for piece in pieces:
        yield from filter(None, piece.translate(cuts).split("\n"))


def _merges(scored: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges of a BPE whose pieces have the ranks of sentencepiece: every way to put a piece together."""
    pieces = {piece: score for piece, score in scored if piece not in BYTES}
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]
