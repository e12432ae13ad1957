"""Rows under other names become the rows that one would write by hand: by --columns, and by a dataset_info.json."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.readers import SourceRow, read_conversation
from dataset.records import load_record
from dataset.sources import RowSource, find_row_sources
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun
from novelgpt.text.conversation import encode_conversation

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '{"name": "weather", "arguments": {"city": "北京"}}'
# Name -> (rows of the file, what dataset_info.json says of them, the same rows by hand).
DESCRIBED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]] = {
    "alpaca": (
        [{"instruction": "续写", "input": "春", "output": "天来了。", "system": "作者", "history": [["问", "答"]]}],
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system",
                     "history": "history"}},
        [{"instruction": "续写", "input": "春", "output": "天来了。", "system": "作者", "history": [["问", "答"]]}],
    ),
    "alpaca without columns": (
        [{"instruction": "续写", "input": "春", "output": "天来了。", "system": "不读", "history": [["不", "读"]]}],
        {},
        [{"instruction": "续写", "input": "春", "output": "天来了。"}],
    ),
    "alpaca renamed": (
        [{"content": "写诗", "extra": "关于海", "summary": "潮。", "label": 1,
          "instruction": "不读", "output": "不读"}],
        {"columns": {"prompt": "content", "query": "extra", "response": "summary"}},
        [{"instruction": "写诗", "input": "关于海", "output": "潮。"}],
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "题目？"}, {"from": "gpt", "value": "夜雨"}], "system": "作者"}],
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
        [{"system": "作者", "prompt": "题目？", "completion": "夜雨"}],
    ),
    "own tags": (
        [{"chat": [{"who": "sys", "says": "作者"}, {"who": "me", "says": "题目？"},
                   {"who": "bot", "says": "夜", "loss": False}, {"who": "me", "says": "再短"},
                   {"who": "bot", "says": "雨"}]}],
        {"formatting": "sharegpt", "columns": {"messages": "chat"},
         "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "bot",
                  "system_tag": "sys"}},
        [{"messages": [{"role": "system", "content": "作者"}, {"role": "user", "content": "题目？"},
                       {"role": "assistant", "content": "夜", "loss": False}, {"role": "user", "content": "再短"},
                       {"role": "assistant", "content": "雨"}]}],
    ),
    "own tags of tools": (
        [{"talk": [{"r": "u", "c": "天气？"}, {"r": "f", "c": CALL}, {"r": "o", "c": "晴"}, {"r": "a", "c": "晴天。"}],
          "can": json.dumps([TOOL])}],
        {"formatting": "sharegpt", "columns": {"messages": "talk", "tools": "can"},
         "tags": {"role_tag": "r", "content_tag": "c", "user_tag": "u", "assistant_tag": "a", "observation_tag": "o",
                  "function_tag": "f"}},
        [{"conversations": [{"from": "human", "value": "天气？"}, {"from": "function_call", "value": CALL},
                            {"from": "observation", "value": "晴"}, {"from": "gpt", "value": "晴天。"}],
          "tools": [TOOL]}],
    ),
    "openai": (
        [{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "在。"}]}],
        {"formatting": "openai", "columns": {"messages": "messages"},
         "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                  "system_tag": "system"}},
        [{"prompt": "你好", "completion": "在。"}],
    ),
}  # fmt: skip


def encoded(source: RowSource, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row, as a worker process makes them."""
    source = pickle.loads(pickle.dumps(source))
    made = []
    for number, row in enumerate(source.rows()):
        where = f"{source.files[row.file]}{row.place}"
        record = source.record(load_record(row.text, where), where)
        conversation = read_conversation(SourceRow(str(number), record, where))
        whole = encode_conversation(conversation["messages"], tokenizer, conversation.get("tools", ()))
        made += [(list(part.input_ids), list(part.labels)) for part in whole]
    return made


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", DESCRIBED)
def test_described_rows_have_the_ids_of_rows_by_hand(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, described, by_hand = DESCRIBED[name]
    write(tmp_path / "rows.jsonl", rows * 2)  # a file of one row may be a list of rows under a name
    info = {"it": {"file_name": "rows.jsonl", **described}, "other": {"file_name": "none"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    if name == "own tags of tools":
        tokenizer = with_tools(tokenizer)
    (hand,) = find_row_sources([write(tmp_path / "hand.jsonl", by_hand * 2)])
    expected = encoded(hand, tokenizer)
    assert expected and any(label != -100 for _, labels in expected for label in labels)
    for folder in (str(tmp_path), str(tmp_path / "dataset_info.json")):
        (source,) = find_row_sources([], ["it"], folder)
        assert (source.name, encoded(source, tokenizer)) == ("it", expected)


def with_tools(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer whose template writes tools, calls and their results."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.city }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return own


@pytest.mark.parametrize(
    ("columns", "row", "by_hand"),
    [
        ({"prompt": "question", "response": "std_answer"}, {"question": "问", "std_answer": "答"},
         {"prompt": "问", "response": "答"}),
        ({"instruction": "q", "output": "a"}, {"q": "问", "a": "答", "input": "其一", "system": "师"},
         {"instruction": "问", "output": "答", "input": "其一", "system": "师"}),
        ({"output": "a"}, {"instruction": "问", "a": "答"}, {"instruction": "问", "output": "答"}),
        ({"prompt": "q", "response": "a"}, {"q": "问", "a": "答", "instruction": "别", "output": "的", "messages": 5},
         {"prompt": "问", "response": "答"}),
        ({"messages": "chat", "system": "role"}, {"chat": [{"role": "user", "content": "问"},
                                                           {"role": "assistant", "content": "答"}], "role": "师"},
         {"system": "师", "prompt": "问", "completion": "答"}),
        ({"prompt": "response", "response": "prompt"}, {"prompt": "答", "response": "问"},
         {"prompt": "问", "response": "答"}),
        ({"prompt": "q", "response": "a"}, {"q": "问", "a": "答", "loss": False},
         {"prompt": "问", "response": "答", "loss": False}),
    ],
)  # fmt: skip
def test_columns_rename_fields(
    columns: dict[str, str], row: dict[str, Any], by_hand: dict[str, Any], tmp_path: Path
) -> None:
    (source,) = find_row_sources([write(tmp_path / "rows.jsonl", [row, by_hand])], columns=columns)
    first, second = (load_record(raw.text, "row") for raw in source.rows())
    made, expected = (read_conversation(SourceRow("", one, "row")) for one in (source.record(first, "row"), by_hand))
    assert made == expected
    if columns.keys().isdisjoint(columns.values()):
        assert source.record(second, "row") == by_hand  # a row that has the standard names keeps them


@pytest.mark.parametrize(
    ("columns", "cause", "remedy"),
    [
        ({"question": "prompt"}, "--columns: question is not a field that is read", "prompt"),
        ({"prompt": "q", "query": "more", "response": "a"}, "prompt, query, response belong to no row", "input"),
        ({"prompt": "quesiton", "response": "a"}, "no row has a field quesiton", "they have q, a, rare"),
        ({"prompt": 5, "response": "a"}, "no row has a field 5", "they have q"),
    ],
)
def test_columns_that_fit_nothing(columns: dict[str, str], cause: str, remedy: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"q": "问", "a": "答"}] * 3 + [{"q": "问", "a": "答", "rare": "少"}])
    with pytest.raises(UserError) as refused:
        find_row_sources([file], columns=columns)
    assert cause in refused.value.cause and remedy in refused.value.remedy
    find_row_sources([file], columns={"prompt": "q", "response": "a", "system": "rare"})


@pytest.mark.parametrize(
    "written",
    [
        ["--columns", "prompt=q, response=a b"],
        ["--columns", '{"prompt": "q", "response": "a b"}'],
        ["--config", "columns.yaml"],
    ],
)
def test_columns_are_written_as_pairs_json_or_yaml(
    written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "columns.yaml").write_text("columns:\n  prompt: q\n  response: a b\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    data = parse_arguments(FinetuneRun, ["--model", "tiny", *written]).data
    assert data.columns == {"prompt": "q", "response": "a b"}


@pytest.mark.parametrize("wrong", ["prompt", "prompt=", "=q", "prompt=q,prompt=a", "prompt=q,,"])
def test_pairs_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="columns"):
        parse_arguments(FinetuneRun, ["--model", "tiny", "--columns", wrong])


@pytest.mark.parametrize(
    ("described", "cause"),
    [
        ({"ranking": True}, "it holds preferences"),
        ({"columns": {"prompt": "q", "chosen": "a"}}, "it holds preferences"),
        ({"columns": {"kto_tag": "label"}}, "it holds preferences"),
        ({"columns": {"images": "pictures"}}, "it names images"),
        ({"columns": {"promt": "q"}}, "columns: promt is not known"),
        ({"tags": {"user": "me"}}, "tags: user is not known"),
        ({"formatting": "chatml"}, "formatting"),
        ({"num_samples": 0}, "num_samples"),
        ({"split": "test"}, "a file has no split 'test'"),
        ({"folder": "zh"}, "names a folder, zh, beside a file"),
        ({"file_name": None, "script_url": "rows.py"}, "is made by code, rows.py"),
        ({"file_name": None, "cloud_file_name": "s3://x"}, "lies in a cloud"),
        ({"file_name": None}, "it has no file_name"),
        ({"file_name": "none.jsonl"}, "none.jsonl does not exist"),
    ],
)
def test_descriptions_that_cannot_be_obeyed_are_refused_by_name(
    described: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", [{"q": "问", "a": "答"}])
    entry = {key: value for key, value in ({"file_name": "rows.jsonl"} | described).items() if value is not None}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"it": entry}), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        find_row_sources([], ["it"], str(tmp_path))
    assert cause in refused.value.cause


def test_names_of_data_sets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"instruction": f"{name}{number}", "output": "答"} for number in range(9)])
    info = {name: {"file_name": f"{name}.jsonl"} for name in "ab"} | {
        "part": {"file_name": "a.jsonl", "num_samples": 4}
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    sources = find_row_sources([str(tmp_path / "b.jsonl")], ["a, part", "b"], str(tmp_path), max_rows=5)
    counts = [(source.name, sum(1 for _ in source.rows())) for source in sources]
    assert [count for _, count in counts] == [5, 5, 4, 5]
    assert len({name for name, _ in counts}) == 4
    with pytest.raises(UserError, match="describes no dataset 'c'"):
        find_row_sources([], ["a,c"], str(tmp_path))
    with pytest.raises(UserError, match="dataset_info.json"):
        find_row_sources([], ["a"], str(tmp_path / "none"))
    with pytest.raises(UserError, match="on a hub is not read"):
        find_row_sources([], ["a"], "ONLINE")


def test_a_row_with_another_role_or_none_of_the_columns_is_named(tmp_path: Path) -> None:
    write(
        tmp_path / "rows.jsonl", [{"chat": [{"from": "me", "value": "问"}]}, {"chat": [{"from": "you"}]}, {"talk": []}]
    )
    tags = {"user_tag": "me", "assistant_tag": "bot"}
    info = {"it": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (source,) = find_row_sources([], ["it"], str(tmp_path))
    records = [json.loads(row.text) for row in source.rows()]
    assert source.record(records[0], "here") == {"messages": [{"role": "user", "content": "问"}]}
    with pytest.raises(UserError) as refused:
        source.record(records[1], "rows.jsonl:2")
    assert refused.value.cause == "rows.jsonl:2: field chat[0].from is 'you'" and "me, bot" in refused.value.remedy
    with pytest.raises(UserError) as refused:
        source.record(records[2], "rows.jsonl:3")
    assert (
        refused.value.cause.startswith("rows.jsonl:3: the row has none of the fields") and "chat" in refused.value.cause
    )


def test_data_sets_take_the_place_of_the_samples() -> None:
    data = parse_arguments(FinetuneRun, ["--model", "tiny", "--dataset", "a"]).data
    assert (data.train_files, data.dataset) == ([], ["a"])
    data = parse_arguments(FinetuneRun, ["--model", "tiny", "--dataset", "a", "--train_files", "b"]).data
    assert (data.train_files, data.dataset) == (["b"], ["a"])
    with pytest.raises(UserError, match="no model is named"):
        parse_arguments(FinetuneRun, ["--dataset", "a"])


def test_training_and_validation_rows_of_every_kind_of_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Packs of described, renamed and partly drawn rows are those of the same rows in one file by hand."""
    rows = [{"q": f"第{number}问", "a": f"第{number}答。"} for number in range(20)]
    by_hand = [{"instruction": row["q"], "output": row["a"]} for row in rows]
    info = {"it": {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    file = write(tmp_path / "rows.jsonl", rows)
    drawn = [json.loads(row.text)["q"] for row in find_row_sources([f"{file}#6"])[0].rows()]
    hand = [*by_hand[:6], *(row for row in by_hand if row["instruction"] in drawn), *by_hand[:6]]
    train_file, valid_file = write(tmp_path / "hand.jsonl", hand), write(tmp_path / "valid.jsonl", by_hand)
    named = {"dataset": ["it"], "eval_dataset": ["it"], "dataset_dir": str(tmp_path), "max_rows": 6, "max_length": 256}
    names = [file, f"{file}#6"]
    columns = {"prompt": "q", "response": "a"}
    mine = read_conversations(ConversationArguments(names, columns=columns, **named), tokenizer)  # type: ignore[arg-type]
    theirs = read_conversations(ConversationArguments([train_file], [valid_file], max_length=256), tokenizer)
    for one, other in zip(mine, theirs, strict=True):
        assert len(one) == len(other) > 0
        for index in range(len(one)):
            packs = [{name: list(values) for name, values in packs[index].items()} for packs in (one, other)]
            assert packs[0] == packs[1]
