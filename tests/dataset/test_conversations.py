"""tokens in == trained + context + dropped, whatever is done with rows above max_length."""

import copy
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.encoded_rows import encode_rows
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation
from novelgpt.text.statistics import TokenCounts
from novelgpt.text.templates import CHATML_TEMPLATE
from tests.memory_rows import as_list

Row = dict[str, object]


def conversation(draw: random.Random, number: int) -> Row:
    def text(most: int) -> str:
        return "".join(draw.choices("我你他的是在有来去说一二三四龘𠮷，。\n", k=draw.randint(0, most)))

    messages = [{"role": "system", "content": text(20)}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 4)):
        messages += [{"role": "user", "content": text(80)}, {"role": "assistant", "content": text(60)}]
    return {"id": str(number), "messages": messages, "source": f"rows.jsonl:{number}"}


def trained(row: EncodedRow) -> list[int]:
    return [label for label in row.labels if label != IGNORE_INDEX]


def settings(max_length: int, overlong: str, min_length: int = 0) -> ConversationArguments:
    return ConversationArguments(max_length=max_length, overlong=overlong, min_length=min_length)


def whole(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[EncodedRow]:
    return [piece for row in rows for piece in encode_conversation(row["messages"], tokenizer)]


def assert_accounts(kept: list[EncodedRow], counts: TokenCounts, full: list[EncodedRow], max_length: int) -> None:
    assert counts.tokens_in == counts.trained + counts.context + counts.dropped
    assert counts.tokens_in == sum(len(row.input_ids) for row in full)
    assert counts.trained == sum(len(trained(row)) for row in kept)
    assert counts.rows == len(kept)
    assert counts.lengths.tolist() == [len(row.input_ids) for row in kept]
    for row in kept:
        assert len(row.labels) == len(row.input_ids) <= max_length
        assert trained(row)
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    draw = random.Random(11)
    return [conversation(draw, number) for number in range(40)]


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop", "refuse"])
def test_rows_that_fit_are_kept_as_they_are(rows: list[Row], tokenizer: PreTrainedTokenizerBase, overlong: str) -> None:
    kept, counts = encode_rows(rows, tokenizer, settings(4096, overlong))
    assert kept == whole(rows, tokenizer)
    assert_accounts(kept, counts, kept, 4096)
    assert (counts.dropped, counts.notes) == (0, Counter())


@pytest.mark.parametrize("max_length", [2, 3, 10, 61, 200])
def test_truncate_drops_the_end_and_counts_it(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    full = whole(rows, tokenizer)
    kept, counts = encode_rows(rows, tokenizer, settings(max_length, "truncate"))
    cut = [EncodedRow(row.input_ids[:max_length], row.labels[:max_length]) for row in full]
    assert kept == [row for row in cut if trained(row)]
    assert_accounts(kept, counts, full, max_length)
    assert counts.dropped == sum(len(row.input_ids) for row in full) - sum(len(row.input_ids) for row in kept)
    above = sum(len(row.input_ids) > max_length for row in full)
    assert above and counts.notes[f"rows above {max_length} tokens (truncate)"] == above
    assert counts.notes["rows without a trainable token, left out"] == len(full) - len(kept)


@pytest.mark.parametrize("max_length", [2, 3, 10, 61, 200])
def test_split_trains_each_answer_token_once_after_true_context(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    full = whole(rows, tokenizer)
    kept, counts = encode_rows(rows, tokenizer, settings(max_length, "split"))
    assert_accounts(kept, counts, full, max_length)
    assert counts.trained == sum(len(trained(row)) for row in full)
    places = [(row, index) for row in kept for index, label in enumerate(row.labels) if label != IGNORE_INDEX]
    origins = [(row, index) for row in full for index, label in enumerate(row.labels) if label != IGNORE_INDEX]
    for (row, index), (origin, place) in zip(places, origins, strict=True):
        assert row.input_ids[: index + 1] == origin.input_ids[place - index : place + 1]
        assert index >= min(place, max_length // 2) > 0  # the loss predicts it, from at least half a row


@pytest.mark.parametrize(("least", "most"), [(0, 200), (61, 4096), (61, 200)])
def test_rows_of_other_lengths_are_left_out_and_counted(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, least: int, most: int
) -> None:
    full = whole(rows, tokenizer)
    kept, counts = encode_rows(rows, tokenizer, settings(most, "drop", least))
    assert kept == [row for row in full if least <= len(row.input_ids) <= most] and 0 < len(kept) < len(full)
    assert_accounts(kept, counts, full, most)
    assert counts.dropped == counts.tokens_in - sum(len(row.input_ids) for row in kept)
    above, below = (sum(map(outside, full)) for outside in (lambda row: len(row.input_ids) > most,
                                                            lambda row: len(row.input_ids) < least))  # fmt: skip
    named = {f"rows above {most} tokens (drop)": above, f"rows below {least} tokens, left out": below}
    assert counts.notes == {note: number for note, number in named.items() if number}


def test_limits_that_leave_no_row_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = json.dumps({"prompt": "问", "completion": "答" * 50}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4, encoding="utf-8")
    files = [str(tmp_path / "rows.jsonl")]
    for limits, cause, remedy in (
        ({"min_length": 600}, "no trainable token is left in the", "lower --min_length"),
        ({"max_length": 20, "overlong": "drop"}, "no trainable token is left in the", "raise --max_length"),
        ({"min_length": 99, "max_length": 64}, "--min_length 99 is above --max_length 64", "lower it"),
    ):
        with pytest.raises(UserError) as caught:
            read_conversations(ConversationArguments(files, files, **limits), tokenizer)
        assert cause in caught.value.cause and remedy in caught.value.remedy


def test_parts_of_a_weighted_row_keep_the_weights_of_their_tokens(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    weighted = [
        row | {"messages": [{**one, "weight": 0.5 + number} if one["role"] == "assistant" else one
                            for number, one in enumerate(row["messages"])]}
        for row in rows
    ]  # fmt: skip
    told = {}
    for overlong, most in (("truncate", 4096), ("split", 61)):
        kept, _ = encode_rows(weighted, tokenizer, settings(most, overlong))
        told[overlong] = [
            (label, weight)
            for row in kept
            for label, weight in zip(row.labels, row.loss_weights or [], strict=True)
            if weight
        ]
        assert sum(len(trained(row)) for row in kept) == len(told[overlong])
    assert told["split"] == told["truncate"]
    assert {weight for _, weight in told["split"]} > {1.5, 3.5}


def test_refuse_names_the_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [json.dumps({"prompt": "问", "completion": "答" * size}, ensure_ascii=False) for size in (1, 500, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = ConversationArguments(train_files=[str(tmp_path / "rows.jsonl")], max_length=64, overlong="refuse")
    with pytest.raises(UserError) as caught:
        read_conversations(data, tokenizer)
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答" * 500}]
    size = len(encode_conversation(messages, tokenizer)[0].input_ids)
    assert caught.value.cause.startswith(f"{tmp_path / 'rows.jsonl'}:2: {size} tokens")
    assert "--max_length 64" in caught.value.cause


def test_rows_without_answers_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    user, answer = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
    contents = ([user], [user, answer], [user, answer, user], [user, user])
    rows = [{"messages": messages, "source": f"rows.jsonl:{line}"} for line, messages in enumerate(contents, start=1)]
    kept, counts = encode_rows(rows, tokenizer, settings(512, "truncate"))
    assert kept == encode_conversation([user, answer], tokenizer) * 2
    assert counts.tokens_in == counts.trained + counts.context + counts.dropped
    assert counts.notes == {
        "rows without an answer, left out": 2,
        "rows whose last messages have no answer, which were left out": 1,
    }


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML_TEMPLATE
    )
    lines = [{"prompt": "问", "completion": "答"}, {"prompt": "问", "completion": "答", "system": "你是诗人。"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_conversations(ConversationArguments(train_files=[str(tmp_path / "rows.jsonl")]), refusing)
    assert f"{tmp_path / 'rows.jsonl'}:2" in caught.value.cause and "no system role" in caught.value.cause


def test_a_share_of_the_rows_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [json.dumps({"prompt": f"第{number}问", "completion": f"第{number}答"}) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = ConversationArguments(train_files=[str(tmp_path / "rows.jsonl")], valid_fraction=0.1, packing=False)
    train, valid = read_conversations(data, tokenizer)
    assert (len(train), len(valid)) == (27, math.ceil(30 * 0.1))
    answers = [tokenizer.decode(trained(row)) for part in (train, valid) for row in as_list(part)]
    assert sorted(answers) == sorted(f"第{number}答<|im_end|>" for number in range(30))
    again = read_conversations(data, tokenizer)
    assert list(map(as_list, again)) == [as_list(train), as_list(valid)]


@pytest.mark.parametrize(("max_length", "cause"), [(3, "no trainable token is left in the 19 train rows")])
def test_nothing_left_to_train_is_a_user_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, cause: str
) -> None:
    lines = [json.dumps({"prompt": "问", "completion": "答"})] * 20
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = ConversationArguments(train_files=[str(tmp_path / "rows.jsonl")], max_length=max_length)
    with pytest.raises(UserError, match=cause):
        read_conversations(data, tokenizer)


def test_a_half_character_names_its_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """JSON may spell half of an emoji (a lone surrogate), which is no text that a tokenizer takes."""
    lines = ['{"prompt": "问", "completion": "答"}', '{"prompt": "问", "completion": "答\\ud83d"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_conversations(ConversationArguments(train_files=[str(tmp_path / "rows.jsonl")]), tokenizer)
    assert f"{tmp_path / 'rows.jsonl'}:2" in caught.value.cause
