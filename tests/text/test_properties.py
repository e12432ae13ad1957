"""What holds for every conversation and every set of rows, on many drawn at random: labels, prompts, packs, counts."""

import copy
import unicodedata
from collections import Counter
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from transformers import PreTrainedTokenizerBase

from dataset.encoded_rows import encode_rows
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation, encode_prompt
from novelgpt.text.messages import Message
from novelgpt.text.packing import PackedBlocks, PackedRows, TokenizedText, best_fit
from novelgpt.text.templates import PLAIN_TEMPLATE, template_record
from tests.memory_rows import as_rows
from tests.text.test_templates import build_baichuan_folder, load_baichuan, with_template

# 2,000 cases: four properties of conversations under four templates each, and four of packing.
CONVERSATIONS, PACKS = 90, 140
ENDS = {"chatml": "<|im_end|>", "plain": "<|im_end|>", "baichuan": "</s>", "baichuan2": "</s>"}


def cases(number: int) -> Any:
    """So many examples, the same ones in each run, however slow the machine."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Marks of the templates, written out as a user might, and what looks like one.
MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<reserved_102>", "<reserved_106>"]
LOOKALIKES = [
    "### 回答\n",
    "### 问题\n",
    "assistant\n",
    "<|im_start",
    "|im_end|>",
    "<think>",
    "</think>\n\n",
    "{{ x }}",
]
ODD = [
    "",
    " ",
    "\n",
    "\r\n",
    "\t",
    "　　",
    "\u200d",
    "\ufeff",
    "👨\u200d👩\u200d👧",
    "𠮷",
    "ＡＢＣ",
    "e\u0301",
    "\x00",
    "……”",
]
# No lone surrogates, which readers refuse.
CHARACTERS = draw.characters(exclude_categories=["Cs"])
CHINESE = draw.text(draw.sampled_from("的一是不了人我在有他这中大来上个国雨夜风门窗，。！？“”\n"), max_size=30)
TEXTS = draw.lists(
    draw.one_of(CHINESE, draw.text(CHARACTERS, max_size=8), draw.sampled_from(ODD), draw.sampled_from(LOOKALIKES)),
    max_size=4,
).map("".join)
MARKED_TEXTS = draw.lists(draw.one_of(TEXTS, draw.sampled_from(MARKS)), max_size=4).map("".join)
ROLES = draw.sampled_from(["user", "user", "assistant", "assistant", "system"])


MESSAGES = draw.fixed_dictionaries({"role": ROLES, "content": MARKED_TEXTS})
OPENINGS, ANSWERS = (
    draw.fixed_dictionaries({"role": draw.sampled_from(roles), "content": MARKED_TEXTS})
    for roles in (["user", "system"], ["assistant"])
)
# Roles in any order, but that something is said before the first answer, and that there is one.
CONVERSATION = draw.builds(
    lambda opening, before, answer, after: [opening, *before, answer, *after],
    OPENINGS, draw.lists(MESSAGES, max_size=4), ANSWERS, draw.lists(MESSAGES, max_size=2),
)  # fmt: skip
TOKENS = draw.integers(1, 900)


@pytest.fixture(scope="module", params=ENDS)
def case(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer, and the token that ends an answer in its template."""
    name = request.param
    if name.startswith("baichuan"):
        folder = build_baichuan_folder(tmp_path_factory.mktemp(name) / "base", 2 if name.endswith("2") else 1)
        return load_baichuan(folder), ENDS[name]
    own = copy.deepcopy(tokenizer)
    return (own if name == "chatml" else with_template(own, "plain", PLAIN_TEMPLATE)), ENDS[name]


def answers_of(conversation: list[Message]) -> list[str]:
    return [message["content"] for message in conversation if message["role"] == "assistant"]


def trained(row: EncodedRow) -> list[int]:
    return [label for label in row.labels if label != IGNORE_INDEX]


def turns_of(conversation: list[Message]) -> list[int]:
    return [index for index, message in enumerate(conversation) if message["role"] == "assistant"]


@cases(CONVERSATIONS)
@given(conversation=CONVERSATION)
def test_labels_are_the_tokens_or_ignored(
    case: tuple[PreTrainedTokenizerBase, str], conversation: list[Message]
) -> None:
    tokenizer, end = case
    (row,) = encode_conversation(conversation, tokenizer)
    assert len(row.labels) == len(row.input_ids)
    differing = [place for place, label in enumerate(row.labels) if label not in (row.input_ids[place], IGNORE_INDEX)]
    if template_record(tokenizer)["name"] == "baichuan2":
        # The next message alone ends an answer: the label of its first token, or of none behind the last answer.
        assert all(row.labels[place] == tokenizer.convert_tokens_to_ids(end) for place in differing)
        assert len(differing) < len(turns_of(conversation))
    else:
        assert not differing


@cases(CONVERSATIONS)
@given(conversation=CONVERSATION)
def test_trained_tokens_read_as_the_answers_and_their_ends(
    case: tuple[PreTrainedTokenizerBase, str], conversation: list[Message]
) -> None:
    tokenizer, end = case
    (row,) = encode_conversation(conversation, tokenizer)
    answers = [conversation[turn]["content"] for turn in turns_of(conversation)]
    # Qwen's tokenizers, and that of the tiny-random base, compose the characters of what they read (NFC).
    same = str if end == "</s>" else partial(unicodedata.normalize, "NFC")
    assert same(tokenizer.decode(trained(row))) == same("".join(answer + end for answer in answers))


@cases(CONVERSATIONS)
@given(conversation=CONVERSATION)
def test_prompts_of_prediction_begin_the_row_and_the_first_is_untrained(
    case: tuple[PreTrainedTokenizerBase, str], conversation: list[Message]
) -> None:
    tokenizer, _ = case
    (row,) = encode_conversation(conversation, tokenizer)
    prompts = [encode_prompt(conversation[:turn], tokenizer) for turn in turns_of(conversation)]
    for prompt in prompts:
        assert row.input_ids[: len(prompt)] == prompt
    assert set(row.labels[: len(prompts[0])]) <= {IGNORE_INDEX}
    assert IGNORE_INDEX not in row.labels[len(prompts[0]) : len(prompts[0]) + 1]


@cases(CONVERSATIONS)
@given(
    greetings=draw.lists(ANSWERS, max_size=2),
    conversations=draw.lists(CONVERSATION, min_size=1, max_size=3),
    max_length=draw.integers(2, 60),
    overlong=draw.sampled_from(["truncate", "split"]),
)
def test_tokens_in_are_trained_context_or_dropped(
    case: tuple[PreTrainedTokenizerBase, str],
    greetings: list[Message],
    conversations: list[list[Message]],
    max_length: int,
    overlong: Any,
) -> None:
    tokenizer, _ = case
    # Answers before any question are no part of what is trained.
    given_rows = [{"messages": [*greetings, *conversation], "source": "rows:1"} for conversation in conversations]
    rows, counts = encode_rows(given_rows, tokenizer, ConversationArguments(max_length=max_length, overlong=overlong))
    whole = [row for conversation in conversations for row in encode_conversation(conversation, tokenizer)]
    assert counts.tokens_in == sum(len(row.input_ids) for row in whole)
    assert counts.tokens_in == counts.trained + counts.context + counts.dropped
    assert counts.trained == sum(len(trained(row)) for row in rows)
    assert counts.lengths.tolist() == [len(row.input_ids) for row in rows] and counts.rows == len(rows)
    assert all(len(row.input_ids) <= max_length and trained(row) for row in rows)
    if overlong == "split":  # no answer loses a token
        assert [token for row in rows for token in trained(row)] == [token for row in whole for token in trained(row)]


@cases(PACKS)
@given(capacity=draw.integers(1, 200), shares=draw.lists(draw.floats(0, 1), max_size=60))
def test_best_fit_takes_each_item_once_and_overfills_no_pack(capacity: int, shares: list[float]) -> None:
    lengths = [max(1, round(share * capacity)) for share in shares]
    packs = [pack.tolist() for pack in best_fit(lengths, capacity)]
    assert Counter(item for pack in packs for item in pack) == Counter(range(len(lengths)))
    filled = [sum(lengths[item] for item in pack) for pack in packs]
    assert all(0 < content <= capacity for content in filled)
    # Two packs that would fit into one are none of best fit.
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > capacity


@cases(PACKS)
@given(
    rows=draw.lists(draw.lists(draw.tuples(TOKENS, draw.booleans()), min_size=1, max_size=16), min_size=1, max_size=12),
    max_length=draw.integers(16, 40),
)
def test_packed_rows_are_whole_and_apart(rows: list[list[tuple[int, bool]]], max_length: int) -> None:
    encoded = [
        EncodedRow([token for token, _ in row], [token if kept else IGNORE_INDEX for token, kept in row])
        for row in rows
    ]
    packs = PackedRows(as_rows(encoded), max_length)
    found: list[tuple[int, ...]] = []
    for number in range(len(packs)):
        ids, labels, positions = (packs[number][name] for name in ("input_ids", "labels", "position_ids"))
        assert len(ids) == len(labels) == len(positions) <= max_length
        borders = (positions == 0).nonzero().flatten().tolist()
        assert len(borders) == len(packs.packs[number])
        for begin, end in zip(borders, [*borders[1:], len(ids)], strict=True):
            own = encoded[packs.packs[number][borders.index(begin)]]
            assert positions[begin:end].tolist() == list(range(end - begin))
            # What comes before a row is another one, which must not tell its first token.
            assert labels[begin:end].tolist() == [IGNORE_INDEX, *own.labels[1:]]
            found.append(tuple(ids[begin:end].tolist()))
    assert Counter(found) == Counter(tuple(row.input_ids) for row in encoded)


@cases(PACKS)
@given(
    documents=draw.lists(draw.lists(TOKENS, min_size=1, max_size=30), min_size=1, max_size=8),
    max_length=draw.integers(2, 24),
)
def test_mixed_blocks_give_back_the_text(documents: list[list[int]], max_length: int) -> None:
    blocks = PackedBlocks([TokenizedText(numpy.array(document)) for document in documents], max_length)
    items = [blocks[number] for number in range(len(blocks))]
    text = items[0]["input_ids"].tolist()
    labels = items[0]["labels"].tolist()
    for item in items[1:]:  # a block begins with the last token of the one before, untrained
        assert item["input_ids"][0] == text[-1] and item["labels"][0] == IGNORE_INDEX
        text += item["input_ids"][1:].tolist()
        labels += item["labels"][1:].tolist()
    assert text == [token for document in documents for token in document]
    assert labels == [label for document in documents for label in (IGNORE_INDEX, *document[1:])]
    starts = set(numpy.cumsum([0, *map(len, documents)]).tolist())
    place = 0
    for item in items:
        positions = item["position_ids"].tolist()
        assert len(item["input_ids"]) == len(positions) <= max_length
        for offset, position in enumerate(positions):
            restarts = offset == 0 or place + offset in starts
            assert position == (0 if restarts else positions[offset - 1] + 1)
        place += len(positions) - 1
    assert_counted(blocks, documents, items)


@cases(PACKS)
@given(
    documents=draw.lists(draw.lists(TOKENS, min_size=1, max_size=30), min_size=1, max_size=8),
    max_length=draw.integers(2, 24),
)
def test_unmixed_blocks_hold_one_document_each(documents: list[list[int]], max_length: int) -> None:
    blocks = PackedBlocks([TokenizedText(numpy.array(document)) for document in documents], max_length, mixed=False)
    items = [blocks[number] for number in range(len(blocks))]
    remaining = iter(items)
    for document in documents:
        seen = next(remaining)["input_ids"].tolist()
        while len(seen) < len(document):
            again, *further = next(remaining)["input_ids"].tolist()
            assert again == seen[-1]
            seen += further
        assert seen == document
    for item in items:
        assert len(item["input_ids"]) <= max_length
        assert item["labels"].tolist() == [IGNORE_INDEX, *item["input_ids"][1:].tolist()]
    assert next(remaining, None) is None
    assert_counted(blocks, documents, items)


def assert_counted(blocks: PackedBlocks, documents: list[list[int]], items: list[dict[str, torch.Tensor]]) -> None:
    """All tokens are counted, those of the labels as trained, and none is dropped."""
    counts = blocks.counts()
    assert counts.tokens_in == sum(map(len, documents)) == counts.trained + counts.context + counts.dropped
    assert counts.trained == sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in items)
    assert (counts.dropped, counts.rows) == (0, len(items))
    assert counts.lengths.tolist() == [len(item["input_ids"]) for item in items]
