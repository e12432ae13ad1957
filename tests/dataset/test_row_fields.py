"""Fields that change training are obeyed or refused by name: flags, histories, systems, preferences, media."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.encoded_rows import encode_rows
from dataset.instructions import load_instructions
from dataset.preview import main as preview
from dataset.readers import read_conversation_rows
from dataset.sources import find_row_sources
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation, encode_prompt
from novelgpt.text.statistics import TokenCounts
from predict.rows import read_prompt_rows
from tests.text.test_templates import THINKING, build_baichuan_folder, load_baichuan, with_template

HELLO = {"role": "user", "content": "你好"}
OLD = {"role": "assistant", "content": "错误的旧回答"}
AGAIN = {"role": "user", "content": "再说一次"}
NEW = {"role": "assistant", "content": "新的回答"}
NO_ANSWER = {"role": "assistant", "content": ""}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return file


def encoded(file: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[EncodedRow], TokenCounts]:
    rows, counts = encode_rows(list(read_conversation_rows(file)), tokenizer, ConversationArguments())
    assert counts.tokens_in == counts.trained + counts.context + counts.dropped
    return rows, counts


def trained(row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX]))


def sharegpt(**flags: Any) -> dict[str, Any]:
    turns = [("human", HELLO), ("gpt", OLD), ("human", AGAIN), ("gpt", NEW)]
    conversations = [{"from": role, "value": message["content"]} for role, message in turns]
    conversations[1] |= flags
    return {"conversations": conversations}


FLAGGED = {
    "ms-swift": {"messages": [HELLO, {**OLD, "loss": False}, AGAIN, {**NEW, "loss": True}]},
    "OpenAI": {"messages": [HELLO, {**OLD, "weight": 0}, AGAIN, {**NEW, "weight": 1}]},
    "axolotl": sharegpt(train=False),
    "axolotl's other name": sharegpt(training=False),
    "a number with a point": {"messages": [HELLO, {**OLD, "weight": 0.0}, AGAIN, {**NEW, "weight": 1.0}]},
    "a scale": {"messages": [HELLO, {**OLD, "loss_scale": 0}, AGAIN, NEW]},
    "questions, too": {
        "messages": [{**HELLO, "train": False}, {**OLD, "train": False}, {**AGAIN, "train": False}, NEW]
    },
    "nulls": {
        "messages": [{**HELLO, "weight": None}, {**OLD, "weight": 0, "loss": None}, AGAIN, {**NEW, "loss": None}]
    },
    "a list in a column": {"messages": json.dumps([HELLO, {**OLD, "loss": False}, AGAIN, NEW])},
    "a prompt of messages": {"prompt": [HELLO, {**OLD, "loss": False}, AGAIN], "completion": NEW["content"]},
}


@pytest.mark.parametrize("name", FLAGGED)
def test_an_answer_that_a_flag_leaves_out_is_context(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write(tmp_path, FLAGGED[name])
    (row,), counts = encoded(file, tokenizer)
    (whole,) = encode_conversation([HELLO, OLD, AGAIN, NEW], tokenizer)
    assert row.input_ids == whole.input_ids
    assert trained(row, tokenizer) == NEW["content"] + "<|im_end|>"
    assert counts.notes == {"answers that a flag keeps out of the loss": 1} and counts.dropped == 0
    # Prediction asks for the last answer, whether it was trained or not.
    (asked,) = read_prompt_rows(find_row_sources([str(file)]), tokenizer, None)
    assert (asked.messages, asked.reference) == ([HELLO, OLD, AGAIN, NEW], NEW["content"])


@pytest.mark.parametrize("generation", [1, 2])
def test_flags_where_the_template_leaves_answers_open(generation: int, tmp_path: Path) -> None:
    tokenizer = load_baichuan(build_baichuan_folder(tmp_path / "base", generation))
    (whole,) = encode_conversation([HELLO, OLD, AGAIN, NEW], tokenizer)
    for flags, expected in (((False, True), NEW), ((True, False), OLD)):
        messages = [HELLO, {**OLD, "loss": flags[0]}, AGAIN, {**NEW, "loss": flags[1]}]
        (row,), _ = encoded(write(tmp_path, {"messages": messages}), tokenizer)
        assert row.input_ids == whole.input_ids and trained(row, tokenizer) == expected["content"] + "</s>"


def test_flags_where_the_template_rewrites_earlier_turns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    thinking = with_template(tokenizer, "own", THINKING)
    every = encode_conversation([HELLO, OLD, AGAIN, NEW], thinking)
    for flags, expected in (((False, True), every[1:]), ((True, False), every[:1])):
        messages = [HELLO, {**OLD, "loss": flags[0]}, AGAIN, {**NEW, "loss": flags[1]}]
        assert encoded(write(tmp_path, {"messages": messages}), thinking)[0] == expected
    messages = [HELLO, {**OLD, "loss": False}, AGAIN, {**NEW, "loss": False}]
    rows, counts = encoded(write(tmp_path, {"messages": messages}), thinking)
    assert rows == [] and counts.dropped == counts.tokens_in > 0


def weighted(row: EncodedRow) -> list[tuple[int, float]]:
    """(label, weight) of each trained token; tokens without a label have weight 0."""
    weights = row.loss_weights or [float(label != IGNORE_INDEX) for label in row.labels]
    pairs = list(zip(row.labels, weights, strict=True))
    assert all((label == IGNORE_INDEX) == (weight == 0) for label, weight in pairs)
    return [pair for pair in pairs if pair[1]]


WEIGHTED: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "a turn": ({"messages": [HELLO, {**OLD, "weight": 0.25}, AGAIN, NEW]}, (0.25, 1)),
    "a turn left out": ({"messages": [HELLO, {**OLD, "weight": 0}, AGAIN, {**NEW, "loss_weight": 3}]}, (0, 3)),
    "text": (sharegpt(loss_scale="1e-3"), (0.001, 1)),
    "the row": ({"messages": [HELLO, OLD, AGAIN, NEW], "weight": 2.5}, (2.5, 2.5)),
    "row and turn": ({"messages": [HELLO, {**OLD, "weight": 0.5}, AGAIN, NEW], "loss_scale": 3}, (1.5, 3)),
    "beside flags": ({"messages": [HELLO, {**OLD, "loss": True, "weight": 0.5}, AGAIN, {**NEW, "train": 1}]}, (0.5, 1)),
    "a history": ({"query": "再说一次", "response": NEW["content"], "history": [["你好", OLD["content"]]],
                   "weight": 0.5}, (0.5, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("generation", [0, 1, 2])
@pytest.mark.parametrize("name", WEIGHTED)
def test_each_token_of_an_answer_and_its_end_have_its_weight(
    name: str, generation: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Of templates that end answers (Baichuan's first generation among them) and of one that does not."""
    record, (first, second) = WEIGHTED[name]
    if generation:
        tokenizer = load_baichuan(build_baichuan_folder(tmp_path / "base", generation))
    (row,), _ = encoded(write(tmp_path, record), tokenizer)
    (whole,) = encode_conversation([HELLO, OLD, AGAIN, NEW], tokenizer)
    assert row.input_ids == whole.input_ids and whole.loss_weights is None
    learnt = [label for label in whole.labels if label != IGNORE_INDEX]
    end = learnt.index(learnt[-1]) + 1
    assert learnt[-1] == tokenizer.eos_token_id and 1 < end < len(learnt)
    expected = [(token, first) for token in learnt[:end]] + [(token, second) for token in learnt[end:]]
    assert weighted(row) == [(token, pytest.approx(weight)) for token, weight in expected if weight]


def test_weights_of_one_and_zero_change_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain = {"messages": [HELLO, OLD, AGAIN, NEW]}
    same = [
        {**plain, "weight": 1.0},
        {"messages": [HELLO, {**OLD, "weight": 4}, AGAIN, {**NEW, "weight": 4}], "loss_scale": 0.25},
    ]
    rows, _ = encoded(write(tmp_path, plain, *same), tokenizer)
    assert rows[0] == rows[1] == rows[2] and rows[0].loss_weights is None
    (row,), _ = encoded(write(tmp_path, {"messages": [HELLO, {**OLD, "weight": 0}, AGAIN, NEW]}), tokenizer)
    assert row.loss_weights is None


def test_weights_where_the_template_rewrites_earlier_turns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    thinking = with_template(tokenizer, "own", THINKING)
    messages = [HELLO, {**OLD, "weight": 0.5}, AGAIN, NEW]
    first, second = encoded(write(tmp_path, {"messages": messages}), thinking)[0]
    plain = encode_conversation([HELLO, OLD, AGAIN, NEW], thinking)
    assert (first.labels, second) == (plain[0].labels, plain[1])
    assert [weight for _, weight in weighted(first)] == [0.5] * len(weighted(plain[0]))


@pytest.mark.parametrize("template", ["whole", "rewritten"])
def test_mask_history_trains_the_last_answer_alone(
    template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    if template == "rewritten":
        tokenizer = with_template(tokenizer, "own", THINKING)
    conversations = [
        [HELLO, OLD, AGAIN, NEW], [HELLO, {**OLD, "weight": 0}, AGAIN, {**NEW, "weight": 0.5}], [HELLO, NEW],
        [HELLO, OLD, AGAIN, OLD, AGAIN, NEW, HELLO],
    ]  # fmt: skip
    file = write(tmp_path, *({"messages": messages} for messages in conversations))
    rows, counts = encode_rows(list(read_conversation_rows(file)), tokenizer, ConversationArguments(mask_history=True))
    assert len(rows) == len(conversations)
    assert [trained(row, tokenizer) for row in rows] == [NEW["content"] + "<|im_end|>"] * len(rows)
    assert [row.loss_weights is not None for row in rows] == [False, True, False, False]
    assert counts.tokens_in == counts.trained + counts.context == sum(len(row.input_ids) for row in rows)
    assert counts.notes["answers before the last one, not trained (mask_history)"] == 3
    assert counts.notes["answers that a flag keeps out of the loss"] == 1


SHAPES = {
    "messages": {"messages": [HELLO, OLD]},
    "sharegpt": {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "错误的旧回答"}]},
    "alpaca": {"instruction": "你好", "output": "错误的旧回答"},
    "pair": {"query": "你好", "response": "错误的旧回答"},
    "paper": {"title": "你好", "abstract": "错误的旧回答"},
    "task": {"task": "abstract_to_title", "title": "你好", "abstract": "错误的旧回答"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_a_flag_leaves_out_is_counted_and_dropped(
    shape: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    base_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (whole,), _ = encoded(write(tmp_path, SHAPES[shape]), tokenizer)
    for flag in ({"weight": 0}, {"loss": False}, {"train": "false"}, {"loss_weight": "0"}):
        file = write(tmp_path, {**SHAPES[shape], **flag}, {**SHAPES[shape], "weight": 1})
        rows, counts = encoded(file, tokenizer)
        assert rows == [whole]
        assert counts.dropped == len(whole.input_ids) and counts.rows == 1
        assert counts.notes == {
            "answers that a flag keeps out of the loss": 1, "rows without a trainable token, left out": 1,
        }  # fmt: skip
    preview([str(file), "--model", str(base_folder), "--wording", "first"])
    shown = capsys.readouterr().out
    assert "1 answers that a flag keeps out of the loss" in shown and "1 rows without a trainable token" in shown
    file = write(tmp_path, *[{**SHAPES[shape], "weight": 0}] * 4)
    with pytest.raises(UserError) as caught:
        read_conversations(ConversationArguments([str(file)], [str(file)]), tokenizer)
    assert "3 answers" in caught.value.cause or "4 answers" in caught.value.cause
    assert "max_length" not in str(caught.value.remedy)


EMPTY = ["", " ", "\n", "　\n", "<think>\n\n</think>\n\n", "<think></think>"]


@pytest.mark.parametrize("answer", EMPTY)
def test_empty_answers_are_left_out_and_counted(
    answer: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    empty = {"role": "assistant", "content": answer}
    records = [
        {"instruction": "写诗", "input": "", "output": answer}, {"messages": [HELLO, empty]},
        {"messages": [HELLO, empty, AGAIN, NEW]}, {"messages": [HELLO, NEW, AGAIN, empty]},
    ]  # fmt: skip
    file = write(tmp_path, *records)
    rows, counts = encoded(file, tokenizer)
    assert [trained(row, tokenizer) for row in rows] == [NEW["content"] + "<|im_end|>"] * 2
    left_out = [[{"role": "user", "content": "写诗"}, empty], [HELLO, empty]]
    assert counts.dropped == sum(len(encode_conversation(messages, tokenizer)[0].input_ids) for messages in left_out)
    assert counts.notes == {"empty answers, not trained": 4, "rows without a trainable token, left out": 2}
    asked = read_prompt_rows(find_row_sources([str(file)]), tokenizer, None)
    assert [row.reference for row in asked] == ["", "", NEW["content"], ""]
    assert asked[0].asked == left_out[0][:1] and asked[0].prompt_ids == encode_prompt(left_out[0][:1], tokenizer)


# Fields and values that no pipeline here obeys, in a row.
REFUSED_IN_ROWS: list[tuple[str, Any]] = [
    ("chosen", "好"), ("chosen", {"from": "gpt", "value": "好"}), ("rejected", "坏"), ("rejected_response", "坏"),
    ("rejected_messages", [OLD]), ("label", True), ("label", False), ("label", 1), ("kto_tag", False), ("margin", 0.5),
    ("images", ["a.png"]), ("image", "a.png"), ("videos", ["a.mp4"]), ("audios", ["a.wav"]), ("objects", {"ref": [1]}),
    ("channel", "小说"), ("mask", [0, 1]), ("loss_mask", 0), ("train_detail", [{"begin_offset": 0, "train": False}]),
    ("labels", [-100, 5]), ("input_ids", [5]), ("loss", 0.5), ("train", 2), ("loss_scale", "last_round"),
    ("loss", "maybe"), ("train", [1]), ("loss_weight", -1), ("weight", float("nan")), ("weight", float("inf")),
    ("weight", 1e-7), ("loss_scale", 1e7), ("weight", [0.5, 1.0]), ("system_prompt", "你是诗人。"),
    ("chat_template_kwargs", {"enable_thinking": True}), ("documents", [{"text": "…"}]), ("system", ["你是诗人。"]),
    ("enable_thinking", True), ("enable_thinking", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_that_are_not_obeyed_are_refused_by_name(shape: str, tmp_path: Path) -> None:
    for field, value in REFUSED_IN_ROWS:
        file = write(tmp_path, SHAPES[shape], {**SHAPES[shape], field: value})
        with pytest.raises(UserError) as caught:
            list(read_conversation_rows(file))
        assert caught.value.cause.startswith(f"{file}:2: ") and f"field {field}" in caught.value.cause, field
        assert caught.value.remedy
    # Formats with columns have every field in every row.
    nothing = {field: None for field, _ in REFUSED_IN_ROWS} | {
        "images": [],
        "channel": "",
        "tools": None,
        "objects": {},
    }
    assert list(read_conversation_rows(write(tmp_path, {**nothing, **SHAPES[shape]})))


REFUSED_IN_MESSAGES: list[tuple[str, Any]] = [
    ("loss", 0.3), ("weight", "half"), ("loss_scale", -2.0), ("loss_mask", [1, 0]), ("channel", "analysis"),
    ("train_detail", [{"begin_offset": 0, "end_offset": 8, "train": False}]), ("images", ["a.png"]),
    ("audio", {"id": "a1"}), ("refusal", "我不能回答。"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED_IN_MESSAGES)
def test_fields_of_messages_that_are_not_obeyed_are_refused_by_name(field: str, value: Any, tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": [HELLO, {**NEW, field: value}]})
    with pytest.raises(UserError) as caught:
        list(read_conversation_rows(file))
    assert caught.value.cause.startswith(f"{file}:1: field messages[1].{field} ")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": [{**HELLO, "loss": True}, NEW]}, "messages[0].loss"),
        (sharegpt(weight=0, train=True), "conversations[1].weight"),
        (sharegpt(weight=0.5, loss=False), "conversations[1].weight"),
        (sharegpt(weight=0.5, loss_scale=2), "conversations[1].weight"),
        ({"messages": [{**HELLO, "weight": 0.5}, NEW]}, "messages[0].weight"),
        ({"messages": [HELLO, NEW], "history": [["一", "二"]]}, "history"),
        ({"title": "题", "abstract": "文", "history": [["一", "二"]]}, "history"),
        ({"prompt": [HELLO], "completion": "好", "history": [["一", "二"]]}, "history"),
        ({"query": "问", "response": "答", "history": [["一"]]}, "history[0]"),
        ({"query": "问", "response": "答", "history": {"一": "二"}}, "history"),
        ({"messages": [HELLO, NEW], "reasoning_content": "想"}, "reasoning_content"),
        ({"messages": [{**HELLO, "reasoning_content": "想"}, NEW]}, "messages[0]"),
        (
            {"messages": [HELLO, {**NEW, "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[1].content is not a text",
        ),
    ],
)
def test_fields_in_the_wrong_place_are_refused_by_name(record: dict[str, Any], named: str, tmp_path: Path) -> None:
    file = write(tmp_path, record)
    with pytest.raises(UserError) as caught:
        list(read_conversation_rows(file))
    assert caught.value.cause.startswith(f"{file}:1: ") and named in caught.value.cause and caught.value.remedy


@pytest.mark.parametrize("fields", [("query", "response"), ("prompt", "response"), ("prompt", "completion")])
def test_history_of_pairs_is_read_as_that_of_alpaca(fields: tuple[str, str], tmp_path: Path) -> None:
    history = [["我姓周。", "记住了，周先生。"], ["好。", "嗯。"]]
    alpaca = {"system": "你是诗人。", "instruction": "今天星期几？", "output": "星期一。", "history": history}
    pair = {"system": "你是诗人。", fields[0]: "今天星期几？", fields[1]: "星期一。", "history": history}
    first, second = read_conversation_rows(write(tmp_path, alpaca, pair))
    assert first["messages"] == second["messages"] and len(first["messages"]) == 7


def test_one_system_message(tmp_path: Path) -> None:
    system = {"role": "system", "content": "你是甲。"}
    same = [
        {"system": "你是甲。", "messages": [system, HELLO, NEW]}, {"messages": [system, system, HELLO, NEW]},
        {"system": "你是甲。", "prompt": [system, HELLO], "completion": NEW["content"]},
        {"system": "", "messages": [system, HELLO, NEW]}, {"system": "你是甲。\n", "messages": [system, HELLO, NEW]},
    ]  # fmt: skip
    for row in read_conversation_rows(write(tmp_path, *same)):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"].strip() == "你是甲。"
    other = {"role": "system", "content": "你是乙。"}
    for record in (
        {"system": "你是甲。", "messages": [other, HELLO, NEW]}, {"messages": [system, other, HELLO, NEW]},
    ):  # fmt: skip
        with pytest.raises(UserError, match="2 system messages that differ"):
            list(read_conversation_rows(write(tmp_path, record)))


@pytest.mark.parametrize("shape", ["paper", "task"])
def test_papers_and_tasks_have_their_system_message(shape: str, tmp_path: Path) -> None:
    plain, with_system = read_conversation_rows(
        write(tmp_path, SHAPES[shape], {**SHAPES[shape], "system": "你是编辑。"})
    )
    assert with_system["messages"] == [{"role": "system", "content": "你是编辑。"}, *plain["messages"]]


def test_fields_that_a_task_words_are_texts(tmp_path: Path) -> None:
    """A wording may call its fields as it likes."""
    wordings = tmp_path / "mine.yaml"
    wordings.write_text('sort:\n  questions: ["{text}属于哪一类？"]\n  answers: ["{label}"]\n', encoding="utf-8")
    file = write(tmp_path, {"task": "sort", "text": "雨", "label": "天气"})
    (row,) = read_conversation_rows(file, load_instructions([str(wordings)]))
    assert [message["content"] for message in row["messages"]] == ["雨属于哪一类？", "天气"]


def test_the_switch_for_thoughts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    thinking = with_template(tokenizer, "own", THINKING)
    thoughtful = {"role": "assistant", "content": "<think>\n想\n</think>\n\n好"}
    records = [
        {"messages": [HELLO, thoughtful], "enable_thinking": True},
        {"messages": [HELLO, NEW], "enable_thinking": False},
        {"messages": [HELLO], "enable_thinking": True}, {"messages": [HELLO], "enable_thinking": False},
    ]  # fmt: skip
    asked = read_prompt_rows(find_row_sources([str(write(tmp_path, *records))]), thinking, None)
    assert [row.prompt_ids for row in asked] == [encode_prompt([HELLO], thinking, on) for on in (True, False) * 2]
    for record in ({"messages": [HELLO, NEW], "enable_thinking": True},
                   {"messages": [HELLO, thoughtful], "enable_thinking": False}):  # fmt: skip
        with pytest.raises(UserError, match="field enable_thinking"):
            list(read_conversation_rows(write(tmp_path, record)))


def with_carriage_returns(value: Any, line_end: str) -> Any:
    if isinstance(value, str):
        return value.replace("\n", line_end)
    if isinstance(value, list):
        return [with_carriage_returns(item, line_end) for item in value]
    return {name: with_carriage_returns(item, line_end) for name, item in value.items()}


LINES = "一\n二\n\n三"
FUNCTION = {"name": "f", "arguments": {"text": LINES}}
OF_LINES = {
    "alpaca": {"instruction": LINES, "input": LINES, "output": LINES, "system": LINES, "history": [[LINES, LINES]]},
    "messages": {"messages": [
        {"role": "system", "content": LINES}, {"role": "user", "content": LINES},
        {"role": "assistant", "content": LINES, "reasoning_content": LINES, "tool_calls": [{"function": FUNCTION}]},
        {"role": "tool", "content": LINES}, {"role": "assistant", "content": LINES},
    ], "tools": [{"name": "f", "description": LINES}]},
    "sharegpt": {"conversations": [{"from": "human", "value": LINES}, {"from": "gpt", "value": LINES}]},
    "pair": {"prompt": LINES, "completion": LINES}, "paper": {"title": LINES, "abstract": LINES},
    "task": {"task": "continue_text", "opening": LINES, "rest": LINES},
}  # fmt: skip


@pytest.mark.parametrize("shape", OF_LINES)
def test_line_ends_inside_texts_are_those_of_raw_text(shape: str, tmp_path: Path) -> None:
    expected = list(read_conversation_rows(write(tmp_path, OF_LINES[shape])))
    for line_end in ("\r\n", "\r"):
        record = with_carriage_returns(OF_LINES[shape], line_end)
        assert list(read_conversation_rows(write(tmp_path, record))) == expected
    assert "\r" not in json.dumps(expected)


def test_rows_without_an_id_get_one_that_no_other_row_has(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pair = {"query": "问", "response": "答"}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first = write(tmp_path / "a", {**pair, "id": None}, {**pair, "id": ""}, pair, {**pair, "id": "rows-1"})
    second = write(tmp_path / "b", {**pair, "id": None}, {**pair, "id": 0})
    rows = read_prompt_rows(find_row_sources([str(first), str(second)]), tokenizer, None)
    assert len({row.id for row in rows}) == 6
    assert [rows[number].id for number in (0, 2, 3, 5)] == ["rows-0", "rows-2", "rows-1", "0"]


@pytest.mark.parametrize("name", ["书.txt", "书.TXT", "prepared"])
def test_text_given_to_fine_tuning_names_the_right_command(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "prepared":
        path.mkdir()
    else:
        path.write_text("从前有一座山。", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read_conversation_rows(path))
    assert str(path) in caught.value.cause
    assert "scripts/run_pretrain.sh" in caught.value.remedy and "dataset conversations" in caught.value.remedy
    with pytest.raises(UserError, match="text, and|no known shape") as caught:
        list(read_conversation_rows(write(tmp_path, {"text": "从前有一座山。", "book": "山"})))
    assert "scripts/run_pretrain.sh" in caught.value.remedy


def test_columns_of_a_parquet_file_give_all_calls_the_same_fields(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"city": "北京"}, {"date": "今天"})]
    rows = [{"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in read_conversation_rows(path)]
    assert read == [{"city": "北京"}, {"date": "今天"}]
