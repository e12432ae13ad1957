"""Baichuan's sentencepiece model as a fast tokenizer of the same ids, which loads without this toolkit.

Both repeatedly merge the neighbours whose union has the best score; sentencepiece looks up the score of the union, a
fast tokenizer a ranked list of pairs. So the list holds every split of a piece into two, ordered by the score of the
piece. The two can differ where splits compete within a text, or scores are equal; so the result is tested on every
piece, and on many texts of pieces, before it is used.
"""

from __future__ import annotations

import random
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from novelgpt.text.baichuan_tokenizer import BaichuanTokenizer

# Types of pieces in a sentencepiece model, as its format numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"  # sentencepiece's space
TEST_TEXTS = 5_000


def as_fast_tokenizer(tokenizer: BaichuanTokenizer) -> PreTrainedTokenizerFast | None:
    """Convert to a fast tokenizer of the same ids and special tokens; None if the ids differ."""
    model = import_protobuf().ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    if not _is_plain(model):
        return None
    built = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(model.pieces)},
            merges=_merges(model),
            unk_token=str(tokenizer.unk_token),
            byte_fallback=True,
        )
    )
    built.normalizer = normalizers.Replace(" ", SPACE)
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in model.pieces if piece.type == USER_DEFINED]
    )
    built.add_tokens([token for _, token in sorted(tokenizer.added_tokens_decoder.items())])
    fast = PreTrainedTokenizerFast(tokenizer_object=built, **tokenizer.special_tokens_map)
    texts = _texts(model)
    return fast if _ids(fast, texts) == _ids(tokenizer, texts) else None


def _is_plain(model: Any) -> bool:
    """Whether texts are merged unnormalised, and every character of a piece is a piece."""
    normalizer = model.normalizer_spec
    changed = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap
    pieces = {piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)}
    characters = {character for piece in model.pieces if piece.type == NORMAL for character in piece.piece}
    unused = any(piece.type == UNUSED for piece in model.pieces)
    return not changed and normalizer.escape_whitespaces and not unused and characters <= pieces


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every split of a piece into two, the best scores first; of one piece, the shortest left part first."""
    pieces = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    ways = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ways.append((-score, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(ways, key=lambda way: way[:2])]


def _texts(model: Any) -> list[str]:
    """Every piece, repeated pieces, and random sequences of pieces with a fixed seed."""
    pieces = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    random_numbers = random.Random(0)
    runs = [piece * count for piece in random_numbers.choices(pieces, k=TEST_TEXTS // 4) for count in (2, 3, 5, 9)]
    mixed = ["".join(random_numbers.choices(pieces, k=random_numbers.randint(2, 40))) for _ in range(TEST_TEXTS)]
    outside = ["🙂", "\r\n", "  两个 空格  ", "é́", "𠮷", "\x00", "</s>", "a</s>b", "<unk>"]
    return [*pieces, *runs, *mixed, *outside]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
