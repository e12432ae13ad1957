"""Every token but the first of each document is trained exactly once, and no token sees another document."""

import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.corpus import read_corpus
from novelgpt.model.loading import load_model
from novelgpt.settings.arguments import CorpusArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.encoding import document_end_id, encode
from novelgpt.text.packing import PackedBlocks, TokenizedText
from tests.rounding import assert_close

END = 0


def random_documents(draw: random.Random) -> list[numpy.ndarray]:
    """Documents of 1 to 30 tokens (1 is an empty text), each with its end token and that only there."""
    lengths = [draw.choice([0, 1, 2, 7, draw.randint(0, 29)]) for _ in range(draw.randint(1, 12))]
    return [numpy.array([draw.randint(1, 900) for _ in range(n)] + [END], dtype=numpy.int32) for n in lengths]


def unrolled(blocks: PackedBlocks, field: str) -> list[int]:
    """The blocks end to end, each later one without its first token, which it shares with the one before."""
    rows = [block[field].tolist() for block in map(blocks.__getitem__, range(len(blocks)))]
    return rows[0] + [value for row in rows[1:] for value in row[1:]]


def expected_labels(documents: list[numpy.ndarray]) -> list[int]:
    return [label for document in documents for label in [IGNORE_INDEX, *document.tolist()[1:]]]


def test_every_token_is_trained_once_but_the_first_of_each_document() -> None:
    draw = random.Random(1)
    for _ in range(150):
        documents = random_documents(draw)
        stream = numpy.concatenate(documents).tolist()
        for max_length in (2, 3, 5, 16, len(stream), len(stream) + 7):
            if max_length < 2:
                continue
            blocks = PackedBlocks([*map(TokenizedText, documents)], max_length)
            assert unrolled(blocks, "input_ids") == stream
            assert unrolled(blocks, "labels") == expected_labels(documents)
            sizes = [len(blocks[index]["input_ids"]) for index in range(len(blocks))]
            assert all(size == max_length for size in sizes[:-1]) and 1 <= sizes[-1] <= max_length
            for index in range(1, len(blocks)):
                assert blocks[index]["input_ids"][0] == blocks[index - 1]["input_ids"][-1]
                assert blocks[index]["labels"][0] == IGNORE_INDEX


def test_positions_restart_at_each_document_and_each_block() -> None:
    draw = random.Random(2)
    for _ in range(100):
        documents = random_documents(draw)
        for max_length in (2, 4, 11, 40):
            blocks = PackedBlocks([*map(TokenizedText, documents)], max_length)
            for index in range(len(blocks)):
                block = blocks[index]
                wanted: list[int] = []
                for token_before in [END, *block["input_ids"].tolist()[:-1]]:
                    wanted.append(0 if token_before == END else wanted[-1] + 1)
                assert block["position_ids"].tolist() == wanted


def test_end_tokens_stand_at_document_ends_only() -> None:
    documents = random_documents(random.Random(5))
    stream = unrolled(PackedBlocks([*map(TokenizedText, documents)], 6), "input_ids")
    ends = numpy.cumsum([len(document) for document in documents]) - 1
    assert [index for index, token in enumerate(stream) if token == END] == ends.tolist()


def test_counts_of_all_blocks_and_of_parts() -> None:
    draw = random.Random(3)
    for _ in range(100):
        documents = random_documents(draw)
        total = sum(map(len, documents))
        for max_length in (2, 3, 9, 33):
            blocks = PackedBlocks([*map(TokenizedText, documents)], max_length)
            border = draw.randint(0, len(blocks))
            middle = draw.randint(border, len(blocks))
            cuts = [range(border), range(border, middle), range(middle, len(blocks))]
            parts = [blocks.subset(cut) for cut in cuts if cut]
            for part in [blocks, *parts]:
                rows = [part[index] for index in range(len(part))]
                counts = part.counts()
                assert counts.tokens_in == counts.trained + counts.context + counts.dropped
                assert counts.tokens_in == len(unrolled(part, "input_ids"))
                assert counts.trained == sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
                assert counts.lengths.tolist() == part.lengths.tolist() == [len(row["input_ids"]) for row in rows]
                assert (counts.rows, counts.dropped) == (len(part), 0)
            assert blocks.counts().tokens_in == total
            assert blocks.counts().trained == total - len(documents)
            assert sum(part.counts().trained for part in parts) == total - len(documents)


def test_parts_hold_the_blocks_of_the_whole() -> None:
    blocks = PackedBlocks([*map(TokenizedText, random_documents(random.Random(4)))], 5)
    part = blocks.subset(range(1, len(blocks)))
    assert len(part) == len(blocks) - 1
    for index in range(len(part)):
        for name, tensor in part[index].items():
            assert torch.equal(tensor, blocks[index + 1][name])
    with pytest.raises(IndexError):
        part[len(part)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_chapters_of_a_book_become_one_document_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def chapter(book: str, number: int) -> dict[str, str]:
        return {"text": f"第{number}章　{book}\n\n　　他说了{number}句话。\n", "book": book, "chapter": str(number)}

    first = write_rows(tmp_path / "a.jsonl", [chapter("甲", 1), chapter("甲", 2), chapter("乙", 1)])
    second = write_rows(tmp_path / "b.jsonl", [chapter("乙", 2), {"text": "短篇。"}, {"text": "又一篇。"}])
    valid = write_rows(tmp_path / "valid.jsonl", [chapter("丙", 1), chapter("丙", 2)])
    texts = [
        "第1章　甲\n\n　　他说了1句话。\n\n第2章　甲\n\n　　他说了2句话。",
        "第1章　乙\n\n　　他说了1句话。\n\n第2章　乙\n\n　　他说了2句话。",
        "短篇。",
        "又一篇。",
    ]
    data = CorpusArguments(train_files=[first, second], valid_files=[valid], max_length=16)
    train, held_out = read_corpus(data, tokenizer)
    end = document_end_id(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == "<|endoftext|>"
    documents = [numpy.array([*encode(text, tokenizer), end]) for text in texts]
    assert unrolled(train, "input_ids") == numpy.concatenate(documents).tolist()
    assert unrolled(train, "labels") == expected_labels(documents)
    assert tokenizer.decode(unrolled(train, "input_ids")) == "".join(text + "<|endoftext|>" for text in texts)
    assert tokenizer.decode(unrolled(held_out, "input_ids")).count("<|endoftext|>") == 1


def test_the_end_of_the_text_is_held_out_and_nothing_lost(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(f"第{n}天，他又来了。\n" for n in range(200))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    data = CorpusArguments(train_files=[str(tmp_path / "book.txt")], max_length=32, valid_fraction=0.1)
    train, valid = read_corpus(data, tokenizer)
    stream = [*encode(text.strip("\n"), tokenizer), document_end_id(tokenizer)]
    assert unrolled(train, "input_ids") + unrolled(valid, "input_ids")[1:] == stream
    assert train.counts().trained + valid.counts().trained == len(stream) - 1
    assert len(valid) == -(-(len(train) + len(valid)) // 10)


@pytest.mark.parametrize(
    ("text", "settings", "cause"),
    [("短。", {}, "cannot be split"), ("短。", {"max_length": 1}, "--max_length 1"), ("\n", {}, "is empty")],
)
def test_too_little_text_is_a_user_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, text: str, settings: dict[str, int], cause: str
) -> None:
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=cause):
        read_corpus(CorpusArguments(train_files=[str(tmp_path / "book.txt")], **settings), tokenizer)


@pytest.fixture(scope="module", params=["packed", "eager"])
def model(request: pytest.FixtureRequest, base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """As training loads it."""
    return load_model(ModelArguments(model=str(base_folder), attention=request.param), tokenizer)


def logits(model: PreTrainedModel, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    batch = Collator(pad_token_id=END)(rows)
    assert "position_ids" in batch and "attention_mask" not in batch
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


def alone(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens[None]).logits[0]


@pytest.mark.parametrize("training", [True, False])
def test_documents_do_not_see_each_other(model: PreTrainedModel, training: bool) -> None:
    model.train(training)
    draw = numpy.random.default_rng(0)
    first, other, second = (numpy.append(draw.integers(3, 999, size), END) for size in (12, 12, 15))
    packed = PackedBlocks([TokenizedText(first), TokenizedText(second)], 40)[0]
    replaced = PackedBlocks([TokenizedText(other), TokenizedText(second)], 40)[0]
    border = len(first)
    kept, changed = logits(model, [packed])[0, border:], logits(model, [replaced])[0, border:]
    assert_close(kept, changed)
    assert_close(kept, alone(model, torch.from_numpy(second)))
    leaking = alone(model, packed["input_ids"])[border:]
    assert (kept - leaking).abs().max() > 1e-2  # were the border not there, it would show


def test_documents_in_padded_batches_are_as_alone(model: PreTrainedModel) -> None:
    model.train()
    draw = numpy.random.default_rng(1)
    documents = [numpy.append(draw.integers(3, 999, size), END) for size in (9, 0, 4, 30, 1, 17, 2, 6)]
    blocks = PackedBlocks([*map(TokenizedText, documents)], 23)
    rows = [blocks[index] for index in range(len(blocks))]
    assert len({len(row["input_ids"]) for row in rows}) == 2  # the last is shorter
    outputs = logits(model, rows)
    for row, output in zip(rows, outputs, strict=True):
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        for begin, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert_close(output[begin:stop], alone(model, row["input_ids"][begin:stop]))
    assert outputs.isfinite().all()
