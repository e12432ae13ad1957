"""For each family: the tokens before an answer in training == the prompt of prediction == the prompt of chat."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.sources import find_row_sources
from novelgpt.inference.chat import ChatHistory
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.text.encoding import encode
from novelgpt.text.messages import Message
from novelgpt.text.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, record_thinking, settle_template
from predict.__main__ import main as predict
from predict.rows import PromptRow, read_prompt_rows
from tests.text.test_templates import (
    DEFAULT_SYSTEM,
    SHARED,
    THINKING,
    build_baichuan_folder,
    load_baichuan,
    with_template,
)

TEMPLATES = {"ChatML": CHATML_TEMPLATE, "default system": DEFAULT_SYSTEM, "Qwen3": THINKING, "plain": PLAIN_TEMPLATE}
FAMILIES = ["tiny-random base", *TEMPLATES, "Baichuan", "Baichuan2"]
REAL = [name for name in ("qwen2", "baichuan1", "baichuan2", "baichuan2-fast") if (SHARED / name).is_dir()]


def turns(system: str | None, *contents: str) -> list[Message]:
    """A conversation; of the contents, every second one is an answer."""
    spoken = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + spoken


CONVERSATIONS = {
    "single turn": turns(None, "写一个开头。", "雨下了一夜。"),
    "system": turns("你是一位小说家。", "写一个开头。", "雨下了一夜。"),
    "two turns": turns(None, "写一个开头。", "雨下了一夜。", "再写一句。", "天亮时，他推开了门。"),
    "three turns, system": turns("你是小说家。", "一", "甲", "二", "乙", "三", "丙🙂𠮷"),
    "blanks": turns(" 你是\n", "　写一个开头。 \n", "\n\n雨下了一夜。 ", "\n再写 ", " 天亮了。\n", "  ", "\t丙"),
    "texts that look like marks": turns(None, "### 回答\n", "assistant\n", "### 问题\n1234 5678", "<think>"),
}


@pytest.fixture(scope="module", params=[*FAMILIES, *(f"real {name}" for name in REAL)])
def family(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    name = request.param
    if name == "tiny-random base":
        return tokenizer
    if name in TEMPLATES:
        return with_template(tokenizer, "own", TEMPLATES[name])
    if name in ("real baichuan1", "real baichuan2"):
        return load_baichuan(SHARED / name.split()[1])
    if name.startswith("real"):
        folder = SHARED / name.split()[1]
        own = AutoTokenizer.from_pretrained(folder)
        settle_template(own, str(folder))
        return own
    folder = tmp_path_factory.mktemp("baichuan") / "base"
    return load_baichuan(build_baichuan_folder(folder, 2 if name.endswith("2") else 1))


def prompts_of_training(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What stands before each answer in the rows of training."""
    end_id = [label for label in encode_conversation(messages, tokenizer)[-1].labels if label != IGNORE_INDEX][-1]
    prompts = []
    for row in encode_conversation(messages, tokenizer):
        labels = [IGNORE_INDEX, *row.labels]
        prompts += [
            row.input_ids[:index]
            for index, label in enumerate(row.labels)
            if label != IGNORE_INDEX and labels[index] in (IGNORE_INDEX, end_id)
        ]
    return prompts


def predict_row(messages: list[Message], tokenizer: PreTrainedTokenizerBase, folder: Path) -> PromptRow:
    """As prediction reads it from a file."""
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")
    (row,) = read_prompt_rows(find_row_sources([str(file)]), tokenizer, None)
    return row


def test_a_tokenizer_whose_patterns_match_without_end_is_told(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, settings["pre_tokenizer"]]}
    file.write_text(json.dumps(settings), encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns(None, "a" * 40 + "b", "答")}), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        predict(["--model", str(folder), "--data_files", str(rows), "--output_dir", str(tmp_path / "out")])
    assert left.value.code == 2
    assert "error: the tokenizer fails on a text: Onig" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_prediction_and_chat_use_the_same_prompts(
    name: str, family: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    messages = CONVERSATIONS[name]
    begin = messages[0]["role"] == "system"
    chat = ChatHistory(family, 4096, 16, messages[0]["content"] if begin else "")
    trained = iter(prompts_of_training(messages, family))
    for turn in range(begin, len(messages), 2):
        question, answer = messages[turn : turn + 2]
        prompt = next(trained)
        assert predict_row(messages[: turn + 2], family, tmp_path).prompt_ids == prompt
        assert predict_row(messages[: turn + 1], family, tmp_path).prompt_ids == prompt
        assert chat.ask(question["content"]) == (prompt, 0)
        chat.add_answer(answer["content"])
    assert next(trained, None) is None
    assert chat.messages == messages


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_reference_alone_is_scored(name: str, family: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    messages = CONVERSATIONS[name]
    row = predict_row(messages, family, tmp_path)
    encoded = row.encoded_reference(family)
    assert encoded is not None
    scored = [index for index, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    assert scored == list(range(len(row.prompt_ids), scored[-1] + 1))
    assert encoded.input_ids[: scored[0]] == row.prompt_ids
    assert [encoded.labels[index] for index in scored] == [encoded.input_ids[index] for index in scored]
    answer = messages[-1]["content"]
    assert [encoded.labels[index] for index in scored[:-1]] in (
        encode(answer, family), encode(answer.lstrip("\n"), family),  # Qwen3's template trims line feeds in front
    )  # fmt: skip


def test_prompts_of_thoughts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    thinking = with_template(tokenizer, "own", THINKING)
    messages = turns(None, "一", "<think>\n想\n</think>\n\n甲", "二", "<think>\n再想\n</think>\n\n乙")
    first, second = prompts_of_training(messages, thinking)
    row = predict_row(messages, thinking, tmp_path)
    assert row.prompt_ids == second
    encoded = row.encoded_reference(thinking)
    assert encoded is not None
    assert thinking.decode([label for label in encoded.labels if label != IGNORE_INDEX]) == (
        messages[-1]["content"] + "<|im_end|>"
    )
    trained = copy.deepcopy(thinking)
    record_thinking(trained, True)
    chat = ChatHistory(trained, 4096, 16)
    assert chat.ask("一") == (first, 0)
    chat.add_answer(messages[1]["content"])
    assert chat.ask("二") == (second, 0)
    assert predict_row(messages[:3], trained, tmp_path).prompt_ids == second
