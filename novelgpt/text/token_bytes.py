"""The bytes that each token of a vocabulary stands for."""

from __future__ import annotations

import itertools
import re

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from novelgpt.text.encoding import encode

# What stands in a decoded text for bytes that are no character.
BROKEN = "\ufffd"
# All bytes that continue a character of UTF-8.
CONTINUATIONS = bytes(range(0x80, 0xC0))
# A byte in SentencePiece's vocabularies.
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes | None, ...]:
    """UTF-8 of each token by its id; None for special tokens, and for ids that no token has.

    (Older SentencePiece tokenizers put a space before each text; it counts. They write a space as ▁.)

    Args:
        tokenizer: byte-level or SentencePiece.
    """
    # Byte-level tokenizers write a byte as itself where it is printable, else as the next letter (as GPT-2 does).
    printable, others = pre_tokenizers.ByteLevel.alphabet(), itertools.count(256)
    letters = [chr(byte) if chr(byte) in printable else chr(next(others)) for byte in range(256)]
    bytes_of_letters = {ord(letter): chr(byte) for byte, letter in enumerate(letters)}
    probe = "字é"
    written = "".join(tokenizer.convert_ids_to_tokens(encode(probe, tokenizer)))
    byte_level = written.removeprefix(letters[ord(" ")]) == "".join(letters[byte] for byte in probe.encode())
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if number in added:
            found[number] = None if added[number].special else added[number].content.encode()
        elif byte_level and bytes_of_letters.keys() >= set(map(ord, token)):
            found[number] = token.translate(bytes_of_letters).encode("latin-1")
        elif byte_level:  # an entry that somebody typed in; decoders take it as it is
            found[number] = token.encode()
        else:
            byte_token = BYTE_TOKEN.fullmatch(token)
            found[number] = bytes([int(byte_token[1], 16)]) if byte_token else token.replace("▁", " ").encode()
    return tuple(found)


def is_whole(data: bytes) -> bool:
    """Whether bytes are whole characters: valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
