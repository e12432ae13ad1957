"""Generated text is valid UTF-8, whatever bytes a model would take next."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from novelgpt.inference.chat import Chat
from novelgpt.inference.generation import answer_batch
from novelgpt.inference.valid_text import BETWEEN, STATES, ValidText, follow
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.text.token_bytes import BROKEN, token_bytes

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
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    return made


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


def test_a_byte_level_vocabulary_may_begin_texts_with_a_space_and_have_entries_typed_in() -> None:
    """Which decoders take as they are, where not all of their letters stand for bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {entry: number for number, entry in enumerate([*alphabet, "旁白"])}
    made = Tokenizer(models.BPE(entries, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    vocabulary = token_bytes(PreTrainedTokenizerFast(tokenizer_object=made))
    assert sorted(vocabulary[:256]) == [bytes([byte]) for byte in range(256)]
    assert vocabulary[256] == "旁白".encode() == made.decode([256]).encode()


def test_further_tokens_make_another_table(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ValidText(tokenizer)
    tokenizer.add_tokens(["【旁白】"])
    place = tokenizer.convert_tokens_to_ids("【旁白】")
    half = tokenizer("𪚥")["input_ids"][:1]
    scores = ValidText(tokenizer)(torch.tensor([half]), torch.zeros(1, len(tokenizer)))
    assert scores[0, place] == -torch.inf


def likes_bytes(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A model of random weights that would nearly always take some part of a character next, whatever came before."""
    torch.manual_seed(8)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    head = torch.nn.Linear(16, len(tokenizer))
    torch.nn.init.normal_(head.weight)
    vocabulary = token_bytes(tokenizer)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([40.0 * (data is not None and data[:1] > b"\x7f") for data in vocabulary]))
    model.lm_head = head
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 0}, {"no_repeat_ngram_size": 1}]
)
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_model_that_likes_parts_of_characters_writes_characters(
    kind: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    own = tokenizer if kind == "byte level" else byte_fallback()
    model = likes_bytes(own)
    prompts = [own(text)["input_ids"] for text in ("潮", "水", "雨夜")]
    generation = GenerationArguments(max_new_tokens=30, **settings)
    torch.manual_seed(1)
    with torch.inference_mode():
        answers = answer_batch(model, own, prompts, generation, [own.eos_token_id])
        texts = [answer.text for answer in answers]
        if not generation.do_sample and generation.num_beams == 1:
            chat = Chat(model, own, generation, raw_text=True)
            texts += ["".join(chat.reply(text)) for text in ("潮", "水", "雨夜")]
    if settings != {"no_repeat_ngram_size": 1}:  # each byte once is not enough for text
        assert BROKEN not in "".join(texts)
    assert sum(map(len, texts)) > 15 and all(answer.completion_tokens == 30 for answer in answers)


def test_scores_stay_where_nothing_could_follow(tokenizer: PreTrainedTokenizerBase) -> None:
    """As where each next byte is one that may not come back."""
    half = torch.tensor([tokenizer("𪚥")["input_ids"][:1]])
    processor = ValidText(tokenizer)
    scores = processor(half, torch.zeros(1, len(tokenizer)))
    others = torch.where(scores == 0, -torch.inf, 0.0)
    assert torch.equal(processor(half, others), others)
