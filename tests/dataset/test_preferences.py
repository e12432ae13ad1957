"""Preference rows: each tool's shape is the same row, shown by the preview, written for TRL, refused by fine-tuning."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.preferences import as_trl, main, read_preference, read_preference_rows
from dataset.preview import main as preview
from dataset.readers import SourceRow
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import encode_prompt
from novelgpt.text.messages import Message

SHARED_CASE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "rows" / "dpo_rows" / "a.jsonl"
SYSTEM: Message = {"role": "system", "content": "你是诗人。"}
HELLO: Message = {"role": "user", "content": "你好"}
ANSWER: Message = {"role": "assistant", "content": "你好，请说。"}
AGAIN: Message = {"role": "user", "content": "写一句诗"}
GOOD: Message = {"role": "assistant", "content": "床前明月光"}
BAD: Message = {"role": "assistant", "content": "月亮很亮"}
PROMPT = [SYSTEM, HELLO, ANSWER, AGAIN]


def from_value(*messages: Message) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


HISTORY = [[HELLO["content"], ANSWER["content"]]]
SIDES = {"chosen": GOOD["content"], "rejected": BAD["content"]}
# The same row as each tool writes it.
SHAPES: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]},
    "TRL, implicit prompt": {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
    "a flag in the prompt": {"prompt": [SYSTEM, HELLO, {**ANSWER, "loss": False}, AGAIN], "chosen": [GOOD],
                             "rejected": [BAD]},
    "prompt beside whole lists": {"prompt": PROMPT, "messages": [*PROMPT, GOOD], "chosen": [*PROMPT, GOOD],
                                  "rejected": [*PROMPT[1:], BAD]},
    "texts": {"prompt": AGAIN["content"], **SIDES, "history": HISTORY, "system": SYSTEM["content"]},
    "LLaMA-Factory sharegpt": {"conversations": from_value(*PROMPT), "chosen": from_value(GOOD)[0],
                               "rejected": from_value(BAD)[0]},
    "LLaMA-Factory sharegpt, system beside": {
        "system": SYSTEM["content"], "conversations": from_value(*PROMPT[1:]), "chosen": from_value(GOOD)[0],
        "rejected": from_value(BAD)[0],
    },
    "LLaMA-Factory alpaca": {"instruction": AGAIN["content"], "input": "", **SIDES, "history": HISTORY,
                             "system": SYSTEM["content"]},
    "LLaMA-Factory alpaca, input alone": {"instruction": "", "input": AGAIN["content"], **SIDES, "history": HISTORY,
                                          "system": SYSTEM["content"]},
    "ms-swift, a text": {"messages": [*PROMPT, GOOD], "rejected_response": BAD["content"]},
    "ms-swift, messages": {"messages": [*PROMPT, GOOD], "rejected_messages": [*PROMPT, BAD]},
    "ms-swift, query and response": {"query": AGAIN["content"], "response": GOOD["content"], "history": HISTORY,
                                     "system": SYSTEM["content"], "rejected_response": BAD["content"]},
}  # fmt: skip


def read(record: dict[str, Any]) -> dict[str, Any]:
    return dict(read_preference(SourceRow("a", record, "rows.jsonl:1")))


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_the_same_row(shape: str) -> None:
    row = {"id": "a", "messages": PROMPT, "chosen": GOOD, "rejected": BAD, "source": "rows.jsonl:1"}
    assert read(SHAPES[shape]) == row
    # Formats with columns have every field in every row.
    assert read({"chosen": None, "tools": None, "label": None, "margin": None, "output": "", **SHAPES[shape]}) == row


def test_the_row_for_trl_reads_as_the_same_row(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get_rhymes", "parameters": {}}}]
    thinking = {**GOOD, "reasoning_content": "押韵"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_rhymes", "arguments": {}}}]}
    more = [{"prompt": [HELLO], "chosen": [thinking], "rejected": [call], "tools": json.dumps(tools), "margin": 2}]
    file = write(tmp_path / "rows.jsonl", *SHAPES.values(), *more)
    main([str(file), str(tmp_path / "pairs.jsonl")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "rows.jsonl"]
    rows, again = list(read_preference_rows(file)), list(read_preference_rows(tmp_path / "pairs.jsonl"))
    assert rows[-1]["tools"] == tools and rows[-1]["margin"] == 2.0
    assert [{**row, "source": ""} for row in rows] == [{**row, "source": ""} for row in again]
    written = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_bytes().splitlines()]
    assert written == [as_trl(row) for row in rows]


def test_columns_of_a_parquet_file_and_the_shared_case(tmp_path: Path) -> None:
    records = [
        SHAPES["TRL"] | {"margin": None},
        {"prompt": [HELLO], "chosen": [GOOD], "rejected": [BAD], "margin": 0.5},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    first, second = read_preference_rows(tmp_path / "rows.parquet")
    assert first["messages"] == PROMPT and "margin" not in first
    assert second["messages"] == [HELLO] and second["margin"] == 0.5
    if not SHARED_CASE.is_file():
        pytest.skip("the cases are not beside the checkout")
    (row,) = read_preference_rows(SHARED_CASE)
    assert [row["messages"][0], row["chosen"]["content"], row["rejected"]["content"]] == [HELLO, "好", "坏"]


PAIR = {"prompt": [HELLO], "chosen": [GOOD], "rejected": [BAD]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one answer": ({"prompt": "你好", "chosen": "好"}, "field rejected is missing"),
    "no preferred answer": ({"prompt": [HELLO], "rejected": "坏"}, "no known shape"),
    "no prompt": (SIDES, "the prompt of the row's two answers is missing"),
    "nothing shared": ({"chosen": [HELLO, GOOD], "rejected": [AGAIN, BAD]}, "the prompt of the row's two answers is"),
    "a prompt that ends in an answer": ({**PAIR, "prompt": [HELLO, ANSWER]}, "two answers ends in an answer"),
    "further turns": ({**PAIR, "chosen": [GOOD, AGAIN, GOOD]}, "field chosen is not one answer to the prompt"),
    "a question as answer": ({**PAIR, "rejected": [HELLO, AGAIN]}, "field rejected is not one answer to the prompt"),
    "the same answers": ({**PAIR, "rejected": [GOOD]}, "fields chosen and rejected are the same answer"),
    "an empty answer": ({**PAIR, "chosen": [{**GOOD, "content": " "}]}, "fields chosen and rejected prefer an empty"),
    "no text": ({**PAIR, "chosen": [{**GOOD, "content": 3}]}, "field chosen[0].content is not a text"),
    "no role": ({**PAIR, "rejected": [{"role": "teacher", "content": "坏"}]}, "field rejected[0].role is 'teacher'"),
    "no messages": ({**PAIR, "chosen": 3}, "field chosen is not a list of messages"),
    "a margin in words": ({**PAIR, "margin": "much"}, "field margin is not a number"),
    "a flag": ({**PAIR, "loss": False}, "field loss is not read in a preference row"),
    "a weight": ({**PAIR, "chosen": [{**GOOD, "weight": 0}]}, "field chosen weighs an answer in the loss"),
    "KTO beside it": ({**PAIR, "kto_tag": True}, "field kto_tag says that an answer is good or bad (KTO)"),
    "images": ({**PAIR, "images": ["a.png"]}, "field images names images"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused_by_file_line_and_field(name: str, tmp_path: Path) -> None:
    record, words = REFUSED[name]
    file = write(tmp_path / "rows.jsonl", PAIR, record)
    with pytest.raises(UserError) as caught:
        list(read_preference_rows(file))
    assert caught.value.cause.startswith(f"{file}:2: ") and words in caught.value.cause
    assert caught.value.remedy and "\n" not in caught.value.cause + caught.value.remedy
    with pytest.raises(SystemExit) as ended:
        main([str(file), str(tmp_path / "pairs.jsonl")])
    assert ended.value.code == 2 and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("shape", SHAPES)
def test_fine_tuning_names_what_reads_such_rows(shape: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *[SHAPES[shape]] * 9)
    with pytest.raises(UserError) as caught:
        read_conversations(ConversationArguments([str(file)]), tokenizer)
    assert caught.value.cause.startswith(f"{file}:1: field ") and "a preference row" in caught.value.cause
    for reader in ("-m dataset preview FILE`", "DPOTrainer", "stage: dpo", "swift rlhf", "-m dataset preferences FILE"):
        assert reader in caught.value.remedy


def test_the_preview_shows_the_prompt_and_both_answers(
    tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    ordinary = {"id": "plain", "messages": [*PROMPT, GOOD]}
    file = write(tmp_path / "rows.jsonl", {"id": "pair", **SHAPES["TRL"]}, ordinary)
    preview([str(file), "--model", str(base_folder), "--color", "never"])
    pair, plain = capsys.readouterr().out.split("plain   ")
    name, prompt, chosen, rejected = re.split("──── .* ────\n", pair)
    prompt_ids = encode_prompt(PROMPT, tokenizer)
    assert prompt.removesuffix("\n") == tokenizer.decode(prompt_ids)  # earlier answers in it are not trained
    assert re.findall("⟦(.*?)⟧", chosen) == [GOOD["content"] + "<|im_end|>"]
    assert re.findall("⟦(.*?)⟧", rejected) == [BAD["content"] + "<|im_end|>"]
    assert f" trained, {len(prompt_ids)} context, 0 dropped" in name
    assert "1 preference rows, which no pipeline here trains on" in name and "preference" not in plain.split("Data")[0]
