"""Characters of trained tokens: each character of a text once, however its bytes fall into tokens and blocks."""

import random
from pathlib import Path

import numpy
import pytest
from transformers import PreTrainedTokenizerBase

from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.text.encoding import document_end_id, encode
from novelgpt.text.packing import PackedBlocks, TokenizedText
from novelgpt.text.statistics import trained_characters, trained_runs

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
TOKENIZERS = ["embedded"] + [name for name in ("qwen2", "baichuan2-fast") if (SHARED / name).is_dir()]
# Of 1, 2, 3 and 4 bytes; the tiny-random base has tokens for the first ones only, the rest is cut into bytes.
CHARACTERS = "天地人，。\n a1é龘𠮷😀"


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return tokenizer if request.param == "embedded" else load_tokenizer(ModelArguments(str(SHARED / request.param)))


def random_text(draw: random.Random, length: int) -> str:
    return "".join(draw.choices(CHARACTERS, k=length))


def test_runs_are_the_neighbouring_labels() -> None:
    draw = random.Random(0)
    for _ in range(200):
        labels = draw.choices([IGNORE_INDEX, 7], k=draw.randint(0, 12))
        runs = trained_runs(labels)
        inside = {position for begin, end in runs for position in range(begin, end)}
        assert inside == {position for position, label in enumerate(labels) if label != IGNORE_INDEX}
        assert all(end < begin for (_, end), (begin, _) in zip(runs, runs[1:], strict=False))


def test_characters_of_conversations_are_those_of_their_answers(any_tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(1)
    rows, characters = [], 0
    for _ in range(60):
        messages = []
        for _ in range(draw.randint(1, 3)):
            answer = "答" + random_text(draw, draw.randint(0, 20)) + "。"
            characters += len(answer)
            messages += [{"role": "user", "content": random_text(draw, 5)}, {"role": "assistant", "content": answer}]
        rows += [vars(row) for row in encode_conversation(messages, any_tokenizer)]
    assert trained_characters(rows, any_tokenizer) == characters  # type: ignore[arg-type]


def test_characters_of_blocks_are_those_of_the_text(any_tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(2)
    end = document_end_id(any_tokenizer)
    texts = ["文" + random_text(draw, draw.randint(1, 60)) for _ in range(8)]
    documents = [numpy.array([*encode(text, any_tokenizer), end]) for text in texts]
    untrained = sum(len(str(any_tokenizer.decode(document[:1].tolist()))) for document in documents)
    for max_length in (2, 3, 4, 5, 7, 16, 1000):
        blocks = PackedBlocks([*map(TokenizedText, documents)], max_length)
        assert trained_characters(blocks, any_tokenizer) == sum(map(len, texts)) - untrained


def test_a_text_that_begins_inside_a_token_run_of_one_character(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode("😀龘", tokenizer)
    assert len(ids) == 7  # a byte each
    blocks = PackedBlocks([TokenizedText(numpy.array(ids))], 2)  # every border falls inside a character but one
    assert trained_characters(blocks, tokenizer) == 1  # 龘; 😀 begins in the first token, which nothing tells


def test_special_tokens_are_no_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    end = document_end_id(tokenizer)
    row = {"input_ids": [end, end, *encode("一", tokenizer), end], "labels": [end, end, *encode("一", tokenizer), end]}
    assert trained_characters([row], tokenizer) == 1  # type: ignore[arg-type]
