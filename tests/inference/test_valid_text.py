"""Generated text is valid UTF-8, whatever bytes a model would take next."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.inference.valid_text import BETWEEN, STATES, ValidText, follow
from novelgpt.text.token_bytes import token_bytes

TEXTS = ["字", "é", "𪚥", "灯塔下有一封信，信里说：“等我。”", "a字b", "\U0010ffff\ud7ff\ue000\u0800\x7f\x80"]


def byte_fallback() -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece makes it: two characters, and every byte."""
    entries = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "潮", "▁"]
    model = models.BPE(
        {entry: number for number, entry in enumerate(entries)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def can_follow(data: bytes) -> bool:
    """Whether bytes are the beginning of valid UTF-8, by Python's decoder."""
    for cut in range(4):  # bytes of a character that is not whole
        whole, rest = data[: len(data) - cut], data[len(data) - cut :]
        try:
            whole.decode()
        except UnicodeDecodeError:
            continue
        return not rest or any(_completes(rest, more) for more in range(1, 4))
    return False


def _completes(rest: bytes, more: int) -> bool:
    for tail in itertools.product((0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF), repeat=more):
        try:
            return len((rest + bytes(tail)).decode()) == 1
        except UnicodeDecodeError:
            continue
    return False


def test_bytes_follow_as_pythons_decoder_takes_them() -> None:
    edges = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF,
             0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF)  # fmt: skip
    for length in (1, 2, 3):
        for data in map(bytes, itertools.product(edges, repeat=length)):
            assert (follow(BETWEEN, data) is not None) == can_follow(data), data
    for text in TEXTS:
        assert follow(BETWEEN, text.encode()) == BETWEEN


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_text_are_allowed_and_no_others_within_a_character(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(text)["input_ids"]
    vocabulary, size = token_bytes(tokenizer), len(tokenizer) + 8
    processor = ValidText(tokenizer)
    before = tokenizer("潮")["input_ids"]
    for place, token in enumerate(ids):
        allowed = processor(torch.tensor([before + ids[:place]]), torch.zeros(1, size))[0] == 0
        assert allowed[token]
        data = b"".join(vocabulary[one] or b"" for one in ids[:place])
        missing = follow(BETWEEN, data) != BETWEEN
        assert allowed[tokenizer.eos_token_id] != missing and allowed[size - 1] != missing
        for number, other in enumerate(vocabulary):
            assert other is None or allowed[number] == can_follow(data + other)


def test_states_are_few_and_begin_between_characters() -> None:
    assert STATES[0] == BETWEEN and len(STATES) == len(set(STATES)) <= 9


def test_byte_tokens_of_sentencepiece_are_bytes() -> None:
    tokenizer = byte_fallback()
    vocabulary = token_bytes(tokenizer)
    ids = tokenizer("潮𪚥 水")["input_ids"]
    assert b"".join(vocabulary[one] or b"" for one in ids) == "潮𪚥 水".encode()
    assert vocabulary[tokenizer.eos_token_id] is None
    half = torch.tensor([ids[:2]])
    allowed = ValidText(tokenizer)(half, torch.zeros(1, len(tokenizer)))[0] == 0
    assert allowed[ids[2]] and not allowed[ids[0]] and not allowed[ids[1]]


def test_further_tokens_make_another_table(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ValidText(tokenizer)
    tokenizer.add_tokens(["【旁白】"])
    place = tokenizer.convert_tokens_to_ids("【旁白】")
    half = tokenizer("𪚥")["input_ids"][:1]
    scores = ValidText(tokenizer)(torch.tensor([half]), torch.zeros(1, len(tokenizer)))
    assert scores[0, place] == -torch.inf
