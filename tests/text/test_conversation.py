"""Of every turn, decode(trained tokens) == answer + end token, and the tokens before == the prompt of prediction."""

import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dataset.readers import TITLE_TO_ABSTRACT, messages_of
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import (
    IGNORED,
    EncodedRow,
    Message,
    encode_conversation,
    encode_prompt,
    end_token_ids,
)
from novelgpt.text.tokenizer import CHATML_TEMPLATE, PLAIN_TEMPLATE, encode, load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
QWEN25 = SHARED / "qwen2" / "chat_template.Qwen2.5-7B-Instruct.jinja"

CASES = ["embedded", "embedded, pad is end", "embedded, end of text is end", "embedded, plain template"]
CASES += ["qwen2, its template", "qwen2, template of Qwen2.5"] if QWEN25.is_file() else []
CASES += ["baichuan2, plain template"] if (SHARED / "baichuan2-fast").is_dir() else []

# Like Qwen3's: an empty thought before the last answer, and in the prompt where thinking is off; none in the history.
THINKING = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

SYSTEM = {"role": "system", "content": "你是一位小说家。"}
USER = {"role": "user", "content": "写一个开头。"}
ANSWER = {"role": "assistant", "content": "雨下了一夜。"}
USER_2 = {"role": "user", "content": "再写一句。"}
ANSWER_2 = {"role": "assistant", "content": "天亮时，他推开了门。"}

# name: (record, the messages it stands for)
SHAPES = {
    "alpaca": (
        {"instruction": "写一个开头。", "output": "雨下了一夜。"},
        [USER, ANSWER],
    ),
    "alpaca, empty input": (
        {"instruction": "写一个开头。", "input": "", "output": "雨下了一夜。"},
        [USER, ANSWER],
    ),
    "alpaca, input": (
        {"instruction": "续写。", "input": "从前", "output": "雨下了一夜。"},
        [{"role": "user", "content": "续写。\n从前"}, ANSWER],
    ),
    "alpaca, system and history": (
        {
            "instruction": "再写一句。", "input": "", "output": "天亮时，他推开了门。", "system": "你是一位小说家。",
            "history": [["写一个开头。", "雨下了一夜。"]],
        },
        [SYSTEM, USER, ANSWER, USER_2, ANSWER_2],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "写一个开头。"}, {"from": "gpt", "value": "雨下了一夜。"}]},
        [USER, ANSWER],
    ),
    "sharegpt, system turn, two turns": (
        {
            "conversations": [
                {"from": "system", "value": "你是一位小说家。"},
                {"from": "human", "value": "写一个开头。"}, {"from": "gpt", "value": "雨下了一夜。"},
                {"from": "human", "value": "再写一句。"}, {"from": "gpt", "value": "天亮时，他推开了门。"},
            ]
        },
        [SYSTEM, USER, ANSWER, USER_2, ANSWER_2],
    ),
    "sharegpt, system field": (
        {
            "system": "你是一位小说家。",
            "conversations": [{"from": "human", "value": "写一个开头。"}, {"from": "gpt", "value": "雨下了一夜。"}],
        },
        [SYSTEM, USER, ANSWER],
    ),
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "messages, system, two turns": (
        {"messages": [SYSTEM, USER, ANSWER, USER_2, ANSWER_2]},
        [SYSTEM, USER, ANSWER, USER_2, ANSWER_2],
    ),
    "messages, two answers in a row": ({"messages": [USER, ANSWER, ANSWER_2]}, [USER, ANSWER, ANSWER_2]),
    "prompt, completion": ({"prompt": "写一个开头。", "completion": "雨下了一夜。"}, [USER, ANSWER]),
    "prompt, completion, system": (
        {"prompt": "写一个开头。", "completion": "雨下了一夜。", "system": "你是一位小说家。"},
        [SYSTEM, USER, ANSWER],
    ),
    "prompt, completion as lists": (
        {"prompt": [SYSTEM, USER, ANSWER, USER_2], "completion": [ANSWER_2]},
        [SYSTEM, USER, ANSWER, USER_2, ANSWER_2],
    ),
    "query, response": ({"query": "写一个开头。", "response": "雨下了一夜。"}, [USER, ANSWER]),
    "title, abstract": (
        {"title": "图神经网络综述", "abstract": "本文综述了图神经网络。"},
        [
            {"role": "user", "content": TITLE_TO_ABSTRACT.format(title="图神经网络综述")},
            {"role": "assistant", "content": "本文综述了图神经网络。"},
        ],
    ),
}  # fmt: skip

HARD_ANSWERS = [
    "", " ", "\n", " 前空", "后空 ", "\n\n换行\n", "\t制表\t", "　　全角缩进。", "🙂👨\u200d👩\u200d👧🇨🇳",
    "𠮷野家，龘", "a\r\nb", "第一行\n\n　　第二行\n",
    "### 回答\n我", "assistant\n", "<think>", "1234 5678", "。" * 40, "的" * 300, "“你好……”他说——",
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer, and the token that ends an answer in its template."""
    name = request.param
    if name == "qwen2, its template":
        return load_tokenizer(str(SHARED / "qwen2")), "<|im_end|>"
    if name == "qwen2, template of Qwen2.5":
        return with_template(load_tokenizer(str(SHARED / "qwen2")), QWEN25.read_text(encoding="utf-8")), "<|im_end|>"
    if name == "baichuan2, plain template":
        return load_tokenizer(str(SHARED / "baichuan2-fast")), "</s>"
    own = copy.deepcopy(tokenizer)
    if name == "embedded, pad is end":
        own.pad_token = own.eos_token
    if name == "embedded, end of text is end":  # as in Qwen's bases, whose template still ends answers with <|im_end|>
        own.eos_token = "<|endoftext|>"
    if name == "embedded, plain template":
        own.chat_template = PLAIN_TEMPLATE
    return own, "<|im_end|>"


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)


def trained_spans(row: EncodedRow) -> list[range]:
    """Unbroken runs of trained tokens."""
    spans: list[range] = []
    for index, label in enumerate(row.labels):
        if label == IGNORED:
            continue
        assert label == row.input_ids[index]
        if spans and spans[-1].stop == index:
            spans[-1] = range(spans[-1].start, index + 1)
        else:
            spans.append(range(index, index + 1))
    return spans


def assert_contract(messages: list[Message], tokenizer: PreTrainedTokenizerBase, end: str) -> list[EncodedRow]:
    """Every turn, in order: prompt of prediction, then answer and end token, which alone are trained."""
    rows = encode_conversation(messages, tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [messages[turn]["content"] for turn in turns]
    spans = [(row, span) for row in rows for span in trained_spans(row)]
    assert len(spans) == len(turns)
    for (row, span), turn, answer in zip(spans, turns, answers, strict=True):
        trained = row.input_ids[span.start : span.stop]
        assert trained == [*encode(answer, tokenizer), end_id]
        assert tokenizer.decode(trained) == answer + end
        assert row.input_ids[: span.start] == encode_prompt(messages[:turn], tokenizer)
    together = [label for row in rows for label in row.labels if label != IGNORED]
    assert tokenizer.decode(together) == "".join(answer + end for answer in answers)
    for row in rows:
        assert len(row.labels) == len(row.input_ids)
    return rows


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_its_answers_and_nothing_else(shape: str, case: tuple[PreTrainedTokenizerBase, str]) -> None:
    record, messages = SHAPES[shape]
    assert messages_of(record, "rows.jsonl:1") == messages
    (row,) = assert_contract(messages, *case)
    assert case[0].decode(row.input_ids) == render(messages, case[0])


def test_hard_answers(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    for answer in HARD_ANSWERS:
        messages = [USER, {"role": "assistant", "content": answer}]
        (row,) = assert_contract(messages, *case)
        assert case[0].decode(row.input_ids) == render(messages, case[0])


def test_random_conversations(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    draw = random.Random(7)
    for _ in range(30):
        messages = [SYSTEM] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            question, answer = ("".join(draw.choices(HARD_ANSWERS, k=draw.randint(1, 3))) for _ in range(2))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert_contract(messages, *case)


def test_the_end_token_survives_padding(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    tokenizer, end = case
    short = encode_conversation([USER, ANSWER], tokenizer)[0]
    long = encode_conversation([USER, ANSWER, USER_2, ANSWER_2], tokenizer)[0]
    for pad in (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(end)):
        batch = Collator(pad)([vars(short), vars(long)])
        for row, ids, labels in zip((short, long), batch["input_ids"], batch["labels"], strict=True):
            assert labels[: len(row.labels)].tolist() == row.labels
            assert ids[len(row.input_ids) :].eq(pad).all() and labels[len(row.labels) :].eq(IGNORED).all()
            assert labels[labels != IGNORED][-1] == tokenizer.convert_tokens_to_ids(end)


def test_generation_stops_where_training_ended(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    tokenizer, end = case
    assert end_token_ids(tokenizer) == sorted({tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id})


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_template_that_drops_old_thoughts_gives_a_row_a_turn(
    tokenizer: PreTrainedTokenizerBase, system: list[Message]
) -> None:
    thinking = with_template(tokenizer, THINKING)
    messages = [*system, USER, ANSWER, USER_2, ANSWER_2, USER, ANSWER]
    rows = assert_contract(messages, thinking, "<|im_end|>")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert [thinking.decode(row.input_ids) for row in rows] == [
        render(messages[: turn + 1], thinking) for turn in turns
    ]
    for row in rows:
        untrained = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED]
        assert thinking.decode(untrained).count("<think>\n\n</think>\n\n") == 1
    assert len(assert_contract([*system, USER, ANSWER], thinking, "<|im_end|>")) == 1


@pytest.mark.parametrize("answer", ["答", "\n答\n", "\n\n 答 \n\n", " 答", "答 ", "\n"])
@pytest.mark.parametrize("trim", ["lstrip('\\n')", "strip('\\n')", "lstrip()", "rstrip()", "strip()"])
def test_blanks_that_the_template_trims_are_not_trained(
    tokenizer: PreTrainedTokenizerBase, trim: str, answer: str
) -> None:
    template = CHATML_TEMPLATE.replace("message['content']", f"message['content'].{trim}")
    trimming = with_template(tokenizer, template)
    messages = [USER, {"role": "assistant", "content": answer}]
    (row,) = encode_conversation(messages, trimming)
    trimmed = {
        "lstrip('\\n')": answer.lstrip("\n"), "strip('\\n')": answer.strip("\n"), "lstrip()": answer.lstrip(),
        "rstrip()": answer.rstrip(), "strip()": answer.strip(),
    }[trim]  # fmt: skip
    assert trimming.decode([label for label in row.labels if label != IGNORED]) == trimmed + "<|im_end|>"
    assert trimming.decode(row.input_ids) == render(messages, trimming)


@pytest.mark.parametrize(
    "changed", ["message['content'] | upper", "message['content'] | replace('b', 'c')", "'答：' + message['content']"]
)
def test_a_template_that_alters_the_answer_is_refused(tokenizer: PreTrainedTokenizerBase, changed: str) -> None:
    template = CHATML_TEMPLATE.replace("message['content']", changed)
    with pytest.raises(UserError) as caught:
        encode_conversation([USER, {"role": "assistant", "content": "abc"}], with_template(tokenizer, template))
    assert "'abc'" in caught.value.cause and caught.value.remedy


def test_a_template_that_refuses_the_roles_is_a_user_error(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML_TEMPLATE
    refusing = with_template(tokenizer, template)
    with pytest.raises(UserError) as caught:
        encode_conversation([SYSTEM, USER, ANSWER], refusing)
    assert "no system" in caught.value.cause and "system user" in caught.value.cause
    with pytest.raises(UserError):
        encode_prompt([SYSTEM, USER], refusing)


def test_without_answers_no_row(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    for messages in ([], [USER], [SYSTEM], [SYSTEM, USER, USER_2]):
        assert encode_conversation(messages, case[0]) == []


def test_messages_after_the_last_answer_are_left_out(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    assert encode_conversation([USER, ANSWER, USER_2], case[0]) == encode_conversation([USER, ANSWER], case[0])


def test_the_trained_tokens_are_those_that_the_loss_predicts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Labels are not shifted: the models shift them, so that the first trained token needs one before it."""
    (row,) = encode_conversation([SYSTEM, USER, ANSWER], tokenizer)
    shifted = torch.tensor(row.labels)[1:]
    assert tokenizer.decode(shifted[shifted != IGNORED]) == ANSWER["content"] + "<|im_end|>"
