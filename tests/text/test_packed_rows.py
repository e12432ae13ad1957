"""Packing loses nothing, cuts no row, overfills no pack, and its counts are those of the tokenizer."""

import doctest
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedTokenizerBase

import dataset.conversations
import dataset.corpus
import novelgpt.text.packing
from dataset.conversations import read_conversations
from dataset.corpus import read_corpus
from dataset.decode import decode_text, read_bytes
from dataset.encoded_rows import EncodedRows
from novelgpt.settings.arguments import ConversationArguments, CorpusArguments
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow
from novelgpt.text.packing import PackedBlocks, PackedRows, TokenizedText, best_fit
from novelgpt.text.statistics import TokenCounts
from tests.memory_rows import as_list, as_rows

NOVELS = Path(__file__).resolve().parents[3] / "shared" / "data" / "novels"
COMMON = (
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里后小"
    "么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
)
RARE = "龘𠮷鬱😀"


def test_doctest() -> None:
    outcome = doctest.testmod(novelgpt.text.packing)
    assert outcome.attempted > 0 and outcome.failed == 0


def first_fit(lengths: list[int], capacity: int) -> int:
    """How many packs first-fit decreasing takes."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((index for index, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(capacity - length)
        else:
            rooms[place] -= length
    return len(rooms)


def packed(lengths: list[int], capacity: int) -> list[list[int]]:
    return [pack.tolist() for pack in best_fit(lengths, capacity)]


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by its definition: of the packs with least room, the one that was filled last."""
    packs: list[list[int]] = []
    filled: list[int] = []  # packs by when an item was last put in
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        rooms = {pack: capacity - sum(lengths[one] for one in packs[pack]) for pack in filled}
        fitting = [pack for pack in filled if rooms[pack] >= lengths[item]]
        if not fitting:
            packs.append([])
        least = min((rooms[pack] for pack in fitting), default=0)
        chosen = next((pack for pack in reversed(fitting) if rooms[pack] == least), len(packs) - 1)
        packs[chosen].append(item)
        filled = [pack for pack in filled if pack != chosen] + [chosen]
    return sorted(sorted(pack) for pack in packs)


def test_packs_are_those_of_best_fit_decreasing_item_by_item() -> None:
    draw = random.Random(4)
    for _ in range(150):
        capacity = draw.choice([5, 20, 64])
        most = draw.choice([capacity, max(1, capacity // 2), max(1, capacity // 6)])
        lengths = [draw.randint(1, most) for _ in range(draw.choice([1, 5, 60]))]
        assert packed(lengths, capacity) == one_by_one(lengths, capacity)


def test_each_item_once_no_pack_overfull_and_no_more_packs_than_first_fit() -> None:
    draw = random.Random(1)
    for _ in range(400):
        capacity = draw.choice([2, 7, 100, 1024])
        most = draw.choice([capacity, max(1, capacity // 3)])
        lengths = [draw.randint(1, most) for _ in range(draw.choice([0, 1, 2, 30, 200]))]
        packs = packed(lengths, capacity)
        assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in pack) <= capacity for pack in packs)
        assert len(packs) <= first_fit(lengths, capacity)
        assert all(pack == sorted(pack) for pack in packs)
        assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


def test_an_item_goes_where_it_leaves_least_room() -> None:
    assert packed([6, 5, 3, 4], capacity=10) == [[0, 3], [1, 2]]
    assert packed([5, 6, 4], capacity=10) == [[0], [1, 2]]
    assert packed([1] * 10, capacity=5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_an_item_above_the_capacity_has_a_pack_to_itself() -> None:
    """Readers give none; were there one, it is neither lost nor cut, and no other item joins it."""
    assert packed([3, 12, 3, 11, 3, 1], capacity=10) == [[0, 2, 4, 5], [1], [3]]


def test_many_items_leave_hardly_any_room() -> None:
    """As many as a large set of conversations has."""
    draw = random.Random(2)
    lengths = [draw.randint(1, 600) for _ in range(200_000)]
    packs = packed(lengths, 2048)
    assert sum(map(len, packs)) == len(lengths)
    assert len(packs) <= sum(lengths) / 2048 * 1.01 + 1


def random_rows(draw: random.Random, number: int, longest: int) -> list[EncodedRow]:
    rows = []
    for _ in range(number):
        ids = [draw.randint(1, 900) for _ in range(draw.randint(1, longest))]
        rows.append(EncodedRow(ids, [draw.choice([token, IGNORE_INDEX]) for token in ids]))
    return rows


def documents_of(pack: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The rows of a pack, told apart by where positions restart."""
    borders = [*(pack["position_ids"] == 0).nonzero().flatten().tolist(), len(pack["input_ids"])]
    return [
        {name: values[begin:end].tolist() for name, values in pack.items()}
        for begin, end in zip(borders[:-1], borders[1:], strict=True)
    ]


def test_packs_hold_the_weights_of_their_rows() -> None:
    """0 where there is no label, as at the first token of each row; 1 for the labels of rows that have none."""
    ids, labels = [5, 6, 7], [5, IGNORE_INDEX, 7]
    weighted = EncodedRow(ids, labels, [0.5, 0.0, 2.0])
    pack = PackedRows(as_rows([EncodedRow(ids, labels), weighted]), max_length=6)[0]
    assert pack["loss_weights"].dtype == torch.float32
    assert pack["loss_weights"].tolist() == [0, 0, 1, 0, 0, 2]
    assert "loss_weights" not in PackedRows(as_rows([EncodedRow(ids, labels)]), max_length=6)[0]


def test_packs_hold_whole_rows_whose_first_token_is_not_trained() -> None:
    draw = random.Random(3)
    for _ in range(60):
        capacity = draw.choice([20, 64])
        rows = random_rows(draw, draw.randint(1, 40), 20)
        packs = PackedRows(as_rows(rows), capacity)
        found: dict[int, dict[str, list[int]]] = {}
        for index in range(len(packs)):
            pack = packs[index]
            assert set(pack) == {"input_ids", "labels", "position_ids"}
            assert len({len(values) for values in pack.values()}) == 1 and len(pack["input_ids"]) <= capacity
            assert all(values.dtype == torch.int64 for values in pack.values())
            found |= dict(zip(packs.packs[index].tolist(), documents_of(pack), strict=True))
        assert sorted(found) == list(range(len(rows)))
        for number, row in enumerate(rows):
            expected = {
                "input_ids": row.input_ids,
                "labels": [IGNORE_INDEX, *row.labels[1:]],
                "position_ids": list(range(len(row.input_ids))),
            }
            assert found[number] == expected
        assert packs.fill() == pytest.approx(sum(len(row.input_ids) for row in rows) / (len(packs) * capacity))
        with pytest.raises(IndexError):
            packs[len(packs)]


def word(draw: random.Random, longest: int) -> str:
    """Text without blanks at either end, so that it is cut into the same tokens alone and between markers."""
    middle = draw.choices(COMMON + RARE + "，。！\n 　abc", k=draw.randint(0, longest))
    return draw.choice(COMMON) + "".join(middle) + draw.choice(COMMON)


def chat(draw: random.Random, messages: int) -> list[dict[str, str]]:
    """So many messages, the first one of which may be a system's."""
    roles = ["system"] if messages > 1 and draw.random() < 0.3 else []
    while len(roles) < messages:
        roles.append("assistant" if roles and roles[-1] == "user" else "user")
    return [{"role": role, "content": word(draw, draw.choice([2, 10, 60]))} for role in roles]


def marked(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    """Tokens and labels of a chat, from ChatML written out here; messages after the last answer are left out."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    row = EncodedRow([], [])
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    for message in messages[: last + 1]:
        content = tokens(message["content"]) + tokens("<|im_end|>")
        before, after = tokens(f"<|im_start|>{message['role']}\n"), tokens("\n")
        answer = content if message["role"] == "assistant" else [IGNORE_INDEX] * len(content)
        row.input_ids += before + content + after
        row.labels += [IGNORE_INDEX] * len(before) + answer + [IGNORE_INDEX] * len(after)
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[: last + 1])
    assert row.input_ids == tokens(whole)
    return row


def trained_tokens(labels: list[int]) -> list[int]:
    return [label for label in labels if label != IGNORE_INDEX]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, TokenCounts]:
    """The counts that users see, by the name of their column."""
    seen: dict[str, TokenCounts] = {}
    for module in (dataset.conversations, dataset.corpus):
        monkeypatch.setattr(module, "show_counts", seen.update)
    return seen


CHATS = [1, 2, 3, 4, 9, 40, 165, 330, 329, 2, 2]


def write_chats(path: Path, chats: list[list[dict[str, str]]]) -> str:
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("overlong", ["truncate", "split"])
@pytest.mark.parametrize("max_length", [128, 1000])
def test_chats_of_all_lengths_are_accounted_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, shown: dict[str, TokenCounts], max_length: int, overlong: Any,
    packing: bool,
) -> None:  # fmt: skip
    draw = random.Random(max_length)
    chats = [chat(draw, size) for size in [*CHATS, *(draw.randint(2, 30) for _ in range(20))]]
    files = [write_chats(tmp_path / "train.jsonl", chats), write_chats(tmp_path / "valid.jsonl", chats[1:3])]
    data = ConversationArguments([files[0]], [files[1]], max_length=max_length, packing=packing, overlong=overlong)
    train, _ = read_conversations(data, tokenizer)
    answered = [messages for messages in chats if any(message["role"] == "assistant" for message in messages)]
    whole = [marked(messages, tokenizer) for messages in answered]
    assert len(answered) < len(chats) and any(len(row.input_ids) > max_length for row in whole)

    counts = shown["train"]
    assert counts.tokens_in == counts.trained + counts.context + counts.dropped
    assert counts.tokens_in == sum(len(row.input_ids) for row in whole)
    assert isinstance(train, PackedRows if packing else EncodedRows)
    rows = as_list(train.rows if packing else train)
    items = [train[index] for index in range(len(train))]
    labels = [torch.as_tensor(item["labels"]).tolist() for item in items]
    assert counts.trained == sum(len(trained_tokens(part)) for part in labels)
    # What is trained, row by row, whatever pack the row went into.
    if overlong == "truncate":
        cut = [EncodedRow(row.input_ids[:max_length], row.labels[:max_length]) for row in whole]
        assert rows == [row for row in cut if trained_tokens(row.labels)]
        assert counts.dropped == counts.tokens_in - sum(len(item["input_ids"]) for item in items) > 0
        assert counts.context == sum(len(item["input_ids"]) for item in items) - counts.trained
    else:
        assert [token for row in rows for token in trained_tokens(row.labels)] == [
            token for row in whole for token in trained_tokens(row.labels)
        ]
        assert counts.trained == sum(len(trained_tokens(row.labels)) for row in whole)
    everything = Counter(tuple(row.input_ids) for row in rows)
    if packing:
        found = [document for item in items for document in documents_of(item)]
        assert Counter(tuple(document["input_ids"]) for document in found) == everything
        assert sum(len(trained_tokens(document["labels"])) for document in found) == counts.trained
        assert all(document["labels"][0] == IGNORE_INDEX for document in found)
        assert len(train) < len(rows) and max(len(item["input_ids"]) for item in items) <= max_length
    # The text of what is trained: the answers and their end tokens.
    texts = [tokenizer.decode(trained_tokens(row.labels)) for row in whole]
    assert texts == [
        "".join(f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant")
        for messages in answered
    ]


def pseudo_novel(characters: int, seed: int) -> str:
    """Random common characters in sentences, paragraphs and chapters, with rare ones that take several tokens."""
    draw = random.Random(seed)
    parts: list[str] = []
    size = 0
    while size < characters:
        sentence = "".join(draw.choices(COMMON, k=draw.randint(3, 30))) + draw.choice("，。！？…") + draw.choice(RARE)
        blank = draw.choices(["", "\n　　", f"\n\n第{size}章　{draw.choice(COMMON)}\n\n"], weights=[20, 5, 1])[0]
        parts.append(sentence + blank)
        size += len(parts[-1])
    return "".join(parts)[:characters].strip("\n")


def assert_text_is_trained_once(
    blocks: PackedBlocks, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Blocks give every token of every text, each trained once but the first of each text."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
    counts = blocks.counts()
    assert counts.tokens_in == sum(map(len, documents))
    assert counts.tokens_in == counts.trained + counts.context + counts.dropped
    assert (counts.context, counts.dropped) == (len(documents), 0)
    items = [blocks[index] for index in range(len(blocks))]
    assert [len(item["input_ids"]) for item in items] == counts.lengths.tolist() and max(counts.lengths) <= max_length
    trained = [token for item in items for token in trained_tokens(item["labels"].tolist())]
    assert trained == [token for document in documents for token in document[1:]]
    for item in items:
        assert ((item["labels"] == IGNORE_INDEX) | (item["labels"] == item["input_ids"])).all()
        assert item["labels"][0] == IGNORE_INDEX


def test_a_few_bytes_of_each_row_are_in_memory() -> None:
    def in_memory(holder: object) -> int:
        return sum(value.nbytes for value in vars(holder).values() if isinstance(value, numpy.ndarray))

    count = 400
    rows = as_rows([EncodedRow([1, 2, 3, 4], [IGNORE_INDEX, 2, 3, 4])] * count)
    packs = PackedRows(rows.subset(numpy.arange(count)[::-1]), max_length=40)
    # Of each, where it is in the table, and its length; of a pack, its items, where they start, and its length.
    assert in_memory(rows) - rows._ends.nbytes <= 8 * count
    assert in_memory(packs) + in_memory(packs.packs) <= 4 * count + 17 * len(packs)
    assert packs[0]["input_ids"].tolist() == [1, 2, 3, 4] * 10


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_long_text_is_accounted_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, shown: dict[str, TokenCounts], packing: bool
) -> None:
    texts = [pseudo_novel(700_000, seed=1), pseudo_novel(30_000, seed=2)]
    files = [tmp_path / "train.txt", tmp_path / "valid.txt"]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    data = CorpusArguments([str(files[0])], [str(files[1])], max_length=700, packing=packing)
    for name, blocks, text in zip(("train", "valid"), read_corpus(data, tokenizer), texts, strict=True):
        assert shown[name] == blocks.counts()
        assert_text_is_trained_once(blocks, [text], tokenizer, 700)
        ids = [token for index in range(len(blocks)) for token in blocks[index]["input_ids"].tolist()[index > 0 :]]
        assert tokenizer.decode(ids) == f"{text}<|endoftext|>"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["hulanhezhuan.daocaoren.utf8.txt", "xiaohong_quanji.xstt.utf8bom.txt"])
def test_real_novels_are_accounted_for(
    tokenizer: PreTrainedTokenizerBase, shown: dict[str, TokenCounts], name: str, packing: bool
) -> None:
    if not (NOVELS / name).is_file():
        pytest.skip("the real data are not beside the checkout")
    text = decode_text(read_bytes(NOVELS / name), name)
    files = [str(NOVELS / name)]
    blocks, _ = read_corpus(CorpusArguments(files, files, max_length=1024, packing=packing), tokenizer)
    assert shown["train"] == blocks.counts()
    assert_text_is_trained_once(blocks, [text.strip("\n")], tokenizer, 1024)


def test_documents_cut_on_their_own_share_no_block() -> None:
    draw = random.Random(5)
    for _ in range(200):
        sizes = [draw.choice([1, 2, 3, draw.randint(1, 40)]) for _ in range(draw.randint(1, 8))]
        documents = [numpy.array([draw.randint(1, 900) for _ in range(size)]) for size in sizes]
        for max_length in (2, 3, 8, 100):
            blocks = PackedBlocks([*map(TokenizedText, documents)], max_length, mixed=False)
            items = [blocks[index] for index in range(len(blocks))]
            assert all(set(item) == {"input_ids", "labels"} for item in items)
            remaining = list(items)
            for document in documents:
                seen = document[:1].tolist()
                trained: list[int] = []
                while True:
                    item = remaining.pop(0)
                    ids = item["input_ids"].tolist()
                    assert len(ids) <= max_length and ids[0] == seen[-1]
                    assert item["labels"].tolist() == [IGNORE_INDEX, *ids[1:]]
                    seen += ids[1:]
                    trained += ids[1:]
                    if len(seen) >= len(document):
                        break
                assert seen == document.tolist() and trained == document.tolist()[1:]
            assert not remaining
            counts = blocks.counts()
            assert counts.tokens_in == sum(sizes) == counts.trained + counts.context
            assert (counts.trained, counts.context) == (sum(sizes) - len(sizes), len(sizes))
            assert (counts.rows, counts.dropped) == (len(items), 0)
            assert counts.lengths.tolist() == [len(item["input_ids"]) for item in items]
            half = blocks.subset(range(len(blocks) // 2, len(blocks)))
            seen_trained = sum(int((half[index]["labels"] != IGNORE_INDEX).sum()) for index in range(len(half)))
            assert half.counts().trained == seen_trained
