"""Of every turn, decode(trained labels) == answer + end token, and the tokens before == the prompt of prediction."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.encoded_rows import encode_rows
from dataset.readers import TITLE_TO_ABSTRACT, messages_of
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import (
    IGNORE_INDEX,
    EncodedRow,
    encode_conversation,
    encode_prompt,
    end_token_ids,
)
from novelgpt.text.encoding import encode
from novelgpt.text.messages import Message
from novelgpt.text.packing import PackedRows
from novelgpt.text.templates import (
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    settle_template,
    template_record,
)
from tests.memory_rows import as_rows
from tests.text.test_templates import THINKING as QWEN3
from tests.text.test_templates import build_baichuan_folder, load_baichuan, with_template

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
QWEN25 = SHARED / "qwen2" / "chat_template.Qwen2.5-7B-Instruct.jinja"

CASES = ["embedded", "embedded, pad is end", "embedded, end of text is end", "embedded, plain template"]
CASES += ["qwen2, its template", "qwen2, template of Qwen2.5"] if QWEN25.is_file() else []
CASES += ["baichuan2-fast, plain template"] if (SHARED / "baichuan2-fast").is_dir() else []
CASES += ["small baichuan", "small baichuan2"]
CASES += ["baichuan1", "baichuan2"] if (SHARED / "baichuan1").is_dir() else []

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
SHAPES: dict[str, tuple[dict[str, Any], list[Message]]] = {
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
    "### 回答\n我", "assistant\n", "<think>", "<think>想。</think>答。", "<think>\n\n</think>\n\n答。",
    "1234 5678", "。" * 40, "的" * 300, "“你好……”他说——",
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer, and the token that ends an answer in its template."""
    name = request.param
    if name == "qwen2, its template":
        return real(name), "<|im_end|>"
    if name == "qwen2, template of Qwen2.5":
        return with_template(real(name), "own", QWEN25.read_text(encoding="utf-8")), "<|im_end|>"
    if name == "baichuan2-fast, plain template":
        return real(name), "</s>"
    if name in ("baichuan1", "baichuan2"):
        return load_baichuan(SHARED / name), "</s>"
    if name.startswith("small"):
        return small_baichuan(tmp_path_factory.mktemp("baichuan"), 2 if name.endswith("2") else 1), "</s>"
    own = copy.deepcopy(tokenizer)
    if name == "embedded, pad is end":
        own.pad_token = own.eos_token
    if name == "embedded, end of text is end":  # as in Qwen's bases, whose template still ends answers with <|im_end|>
        own.eos_token = "<|endoftext|>"
    if name == "embedded, plain template":
        own = with_template(own, "plain", PLAIN_TEMPLATE)
    return own, "<|im_end|>"


def real(case: str) -> PreTrainedTokenizerBase:
    folder = SHARED / case.split(",")[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settle_template(tokenizer, str(folder))
    return tokenizer


def small_baichuan(folder: Path, generation: int) -> PreTrainedTokenizerBase:
    return load_baichuan(build_baichuan_folder(folder / "base", generation))


def leaves_answers_open(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template puts nothing after an answer, so that the next token's label ends it."""
    return template_record(tokenizer)["name"] == "baichuan2"


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False))


def render_whole(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a row of these messages reads: the end token is added where the template puts none after the last answer."""
    return render(messages, tokenizer) + (tokenizer.eos_token if leaves_answers_open(tokenizer) else "")


def trained_spans(row: EncodedRow, end_id: int) -> list[range]:
    """Runs of trained tokens, each up to an end token."""
    spans: list[range] = []
    for index, label in enumerate(row.labels):
        if label == IGNORE_INDEX:
            continue
        if spans and spans[-1].stop == index and row.labels[index - 1] != end_id:
            spans[-1] = range(spans[-1].start, index + 1)
        else:
            spans.append(range(index, index + 1))
    return spans


def assert_contract(messages: list[Message], tokenizer: PreTrainedTokenizerBase, end: str) -> list[EncodedRow]:
    """Every turn, in order: prompt of prediction, then answer and end token, which alone are trained."""
    rows = encode_conversation(messages, tokenizer)
    end_id = int(tokenizer.get_vocab()[end])
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [messages[turn]["content"] for turn in turns]
    spans = [(row, span) for row in rows for span in trained_spans(row, end_id)]
    assert len(spans) == len(turns)
    for (row, span), turn, answer in zip(spans, turns, answers, strict=True):
        trained = row.labels[span.start : span.stop]
        assert trained == [*encode(answer, tokenizer), end_id]
        assert tokenizer.decode(trained) == answer + end
        read = row.input_ids[span.start : span.stop]
        assert read[:-1] == trained[:-1]
        # An open answer ends in the token that begins the next turn, but for the last one.
        begins_next = {195, 196} if leaves_answers_open(tokenizer) and span.stop < len(row.labels) else {end_id}
        assert read[-1] in begins_next
        prompt = encode_prompt(messages[:turn], tokenizer)
        # After an answer right before this one, the prompt holds that token already.
        assert row.input_ids[: len(prompt)] == prompt and len(prompt) == span.start
    together = [label for row in rows for label in row.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(together) == "".join(answer + end for answer in answers)
    for row in rows:
        assert len(row.labels) == len(row.input_ids)
    return rows


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_its_answers_and_nothing_else(shape: str, case: tuple[PreTrainedTokenizerBase, str]) -> None:
    record, messages = SHAPES[shape]
    assert messages_of(record, "rows.jsonl:1") == messages
    (row,) = assert_contract(messages, *case)
    assert case[0].decode(row.input_ids) == render_whole(messages, case[0])


def test_hard_answers(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    for answer in HARD_ANSWERS:
        messages = [USER, {"role": "assistant", "content": answer}]
        (row,) = assert_contract(messages, *case)
        assert case[0].decode(row.input_ids) == render_whole(messages, case[0])


def test_random_conversations(case: tuple[PreTrainedTokenizerBase, str], few_or_all: Callable[[int, int], int]) -> None:
    draw = random.Random(7)
    for _ in range(few_or_all(12, 30)):
        messages = [SYSTEM] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            question, answer = ("".join(draw.choices(HARD_ANSWERS, k=draw.randint(1, 3))) for _ in range(2))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert_contract(messages, *case)


def test_the_end_token_survives_padding(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    tokenizer, end = case
    short = encode_conversation([USER, ANSWER], tokenizer)[0]
    long = encode_conversation([USER, ANSWER, USER_2, ANSWER_2], tokenizer)[0]
    for pad in (int(tokenizer.pad_token_id), int(tokenizer.get_vocab()[end])):
        batch = Collator(pad)([vars(short), vars(long)])
        for row, ids, labels in zip((short, long), batch["input_ids"], batch["labels"], strict=True):
            assert labels[: len(row.labels)].tolist() == row.labels
            assert ids[len(row.input_ids) :].eq(pad).all() and labels[len(row.labels) :].eq(IGNORE_INDEX).all()
            assert labels[labels != IGNORE_INDEX][-1] == tokenizer.convert_tokens_to_ids(end)


def test_generation_stops_at_every_token_that_ends_an_answer(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    tokenizer, end = case
    further = {"<|im_end|>": [tokenizer.convert_tokens_to_ids("<|endoftext|>")], "</s>": []}[end]
    further += [195] if template_record(tokenizer)["name"].startswith("baichuan") else []
    ends = {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id, *further}
    assert end_token_ids(tokenizer) == sorted(ends)


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_template_that_drops_old_thoughts_gives_a_row_a_turn(
    tokenizer: PreTrainedTokenizerBase, system: list[Message]
) -> None:
    thinking = with_template(tokenizer, "own", THINKING)
    messages = [*system, USER, ANSWER, USER_2, ANSWER_2, USER, ANSWER]
    rows = assert_contract(messages, thinking, "<|im_end|>")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert [thinking.decode(row.input_ids) for row in rows] == [
        render(messages[: turn + 1], thinking) for turn in turns
    ]
    for row in rows:
        untrained = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE_INDEX]
        assert thinking.decode(untrained).count("<think>\n\n</think>\n\n") == 1
    assert len(assert_contract([*system, USER, ANSWER], thinking, "<|im_end|>")) == 1


@pytest.mark.parametrize("answer", ["答", "\n答\n", "\n\n 答 \n\n", " 答", "答 ", "\n"])
@pytest.mark.parametrize("trim", ["lstrip('\\n')", "strip('\\n')", "lstrip()", "rstrip()", "strip()"])
def test_blanks_that_the_template_trims_are_not_trained(
    tokenizer: PreTrainedTokenizerBase, trim: str, answer: str
) -> None:
    template = CHATML_TEMPLATE.replace("message['content']", f"message['content'].{trim}")
    trimming = with_template(tokenizer, "own", template)
    messages = [USER, {"role": "assistant", "content": answer}]
    (row,) = encode_conversation(messages, trimming)
    trimmed = {
        "lstrip('\\n')": answer.lstrip("\n"), "strip('\\n')": answer.strip("\n"), "lstrip()": answer.lstrip(),
        "rstrip()": answer.rstrip(), "strip()": answer.strip(),
    }[trim]  # fmt: skip
    assert trimming.decode([label for label in row.labels if label != IGNORE_INDEX]) == trimmed + "<|im_end|>"
    assert trimming.decode(row.input_ids) == render(messages, trimming)


@pytest.mark.parametrize(
    "changed", ["message['content'] | upper", "message['content'] | replace('b', 'c')", "'答：' + message['content']"]
)
def test_a_template_that_alters_the_answer_is_refused(tokenizer: PreTrainedTokenizerBase, changed: str) -> None:
    template = CHATML_TEMPLATE.replace("message['content']", changed)
    with pytest.raises(UserError) as caught:
        encode_conversation([USER, {"role": "assistant", "content": "abc"}], with_template(tokenizer, "own", template))
    assert "'abc'" in caught.value.cause and caught.value.remedy


def test_a_template_that_refuses_the_roles_is_a_user_error(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML_TEMPLATE
    refusing = with_template(tokenizer, "own", template)
    with pytest.raises(UserError) as caught:
        encode_conversation([SYSTEM, USER, ANSWER], refusing)
    assert "no system" in caught.value.cause and "system user" in caught.value.cause
    with pytest.raises(UserError):
        encode_prompt([SYSTEM, USER], refusing)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_message_that_is_left_out_is_noticed_where_another_says_the_same(
    role: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    template = (
        "{% for message in messages %}{% if message['role'] in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    lost = {"role": role, "content": "北风"}
    asked = {"role": "user", "content": "是北风三级吗？"}
    with pytest.raises(UserError) as caught:
        encode_conversation([asked, ANSWER, lost, ANSWER], with_template(tokenizer, "own", template))
    assert "message 3" in caught.value.cause and role in caught.value.cause


def test_without_answers_no_row(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    for messages in ([], [USER], [SYSTEM], [SYSTEM, USER, USER_2]):
        assert encode_conversation(messages, case[0]) == []


def test_messages_after_the_last_answer_are_left_out(case: tuple[PreTrainedTokenizerBase, str]) -> None:
    assert encode_conversation([USER, ANSWER, USER_2], case[0]) == encode_conversation([USER, ANSWER], case[0])


def test_the_trained_tokens_are_those_that_the_loss_predicts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Labels are not shifted: the models shift them, so that the first trained token needs one before it."""
    (row,) = encode_conversation([SYSTEM, USER, ANSWER], tokenizer)
    shifted = torch.tensor(row.labels)[1:]
    assert tokenizer.decode(shifted[shifted != IGNORE_INDEX]) == ANSWER["content"] + "<|im_end|>"


@pytest.fixture(scope="module")
def baichuan2(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return small_baichuan(tmp_path_factory.mktemp("baichuan"), 2)


def test_baichuan2_answers_learn_to_end_before_the_next_question(baichuan2: PreTrainedTokenizerBase) -> None:
    system, user, answer, user_2, answer_2 = (
        encode(message["content"], baichuan2) for message in (SYSTEM, USER, ANSWER, USER_2, ANSWER_2)
    )
    (row,) = encode_conversation([SYSTEM, USER, ANSWER, USER_2, ANSWER_2], baichuan2)
    assert row.input_ids == [*system, 195, *user, 196, *answer, 195, *user_2, 196, *answer_2, 2]
    context = [IGNORE_INDEX] * (len(system) + 1 + len(user) + 1)
    assert row.labels == [*context, *answer, 2, *([IGNORE_INDEX] * (len(user_2) + 1)), *answer_2, 2]
    # What a model learns, token by token: after the answer's last token comes the end.
    learnt = [pair for pair in zip(row.input_ids, row.labels[1:], strict=False) if pair[1] != IGNORE_INDEX]
    assert learnt == [
        *zip([196, *answer], [*answer, 2], strict=True), *zip([196, *answer_2], [*answer_2, 2], strict=True),
    ]  # fmt: skip


def test_baichuan2_rows_keep_their_labels_through_packs_padding_and_cuts(baichuan2: PreTrainedTokenizerBase) -> None:
    messages = [SYSTEM, USER, ANSWER, USER_2, ANSWER_2, USER, ANSWER]
    (row,) = encode_conversation(messages, baichuan2)
    (short,) = encode_conversation([USER, ANSWER], baichuan2)
    pack = PackedRows(as_rows([row, short]), 512)[0]
    assert pack["input_ids"].tolist() == row.input_ids + short.input_ids
    assert pack["labels"].tolist() == row.labels + short.labels
    batch = Collator(0)([vars(row), vars(short)])
    assert batch["labels"][0].tolist() == row.labels
    assert batch["labels"][1].tolist()[: len(short.labels)] == short.labels
    for length in (2, 5, 11):
        data = ConversationArguments(max_length=length, overlong="split")
        kept, counts = encode_rows([{"messages": messages, "source": "rows:1"}], baichuan2, data)
        assert [label for part in kept for label in part.labels if label != IGNORE_INDEX] == [
            label for label in row.labels if label != IGNORE_INDEX
        ]
        assert counts.tokens_in == len(row.input_ids) == counts.trained + counts.context + counts.dropped


NO_THOUGHT = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\n先想天气。\n</think>\n\n雨下了一夜。"


@pytest.fixture(scope="module")
def qwen3(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(tokenizer, "own", QWEN3)


def trained_text(row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX]))


def test_the_empty_thought_belongs_to_the_prompt(qwen3: PreTrainedTokenizerBase) -> None:
    for messages in ([USER, ANSWER], [SYSTEM, USER, ANSWER, USER_2, ANSWER_2]):
        rows = assert_contract(messages, qwen3, "<|im_end|>")
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        assert [qwen3.decode(row.input_ids) for row in rows] == [render(messages[: turn + 1], qwen3) for turn in turns]
    prompt = str(qwen3.decode(encode_prompt([SYSTEM, USER, ANSWER, USER_2], qwen3)))
    assert prompt.endswith("<|im_start|>assistant\n" + NO_THOUGHT) and prompt.count("<think>") == 1


@pytest.mark.parametrize("blanks", ["\n\n", "", "\n", "\n\n\n"])
def test_an_empty_thought_of_the_answer_is_that_of_the_prompt(blanks: str, qwen3: PreTrainedTokenizerBase) -> None:
    own = {"role": "assistant", "content": f"<think>{blanks}</think>{blanks}{ANSWER['content']}"}
    (row,) = encode_conversation([USER, own], qwen3)
    assert row == encode_conversation([USER, ANSWER], qwen3)[0]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (THOUGHT, THOUGHT),
        ("<think>先想天气。</think>雨下了一夜。", THOUGHT),
        ("\n<think>\n\n先想天气。\n\n</think>\n雨下了一夜。\n\n", THOUGHT + "\n\n"),
        ("<think>\n先想天气。\n</think>\n\n\n", "<think>\n先想天气。\n</think>\n\n"),
        ("<think>\n第一。\n\n第二。\n</think>\n\n甲\n\n乙 ", "<think>\n第一。\n\n第二。\n</think>\n\n甲\n\n乙 "),
    ],
)
def test_thoughts_of_answers_are_trained_as_the_template_writes_them(
    content: str, kept: str, qwen3: PreTrainedTokenizerBase
) -> None:
    answer = {"role": "assistant", "content": content}
    for before in ([USER], [SYSTEM, USER, ANSWER, USER_2], [USER, answer, USER_2]):
        row = encode_conversation([*before, answer], qwen3)[-1]
        assert trained_text(row, qwen3) == kept + "<|im_end|>"
        prompt = encode_prompt(before, qwen3, thinking=True)
        assert row.input_ids[: len(prompt)] == prompt
        assert set(row.labels[: len(prompt)]) == {IGNORE_INDEX} and row.labels[len(prompt)] != IGNORE_INDEX
        assert str(qwen3.decode(prompt)).endswith("<|im_start|>assistant\n")
        assert qwen3.decode(row.input_ids) == render([*before, answer], qwen3)


def test_each_turn_thinks_as_its_answer_does(qwen3: PreTrainedTokenizerBase) -> None:
    thoughtful = {"role": "assistant", "content": THOUGHT}
    first, second = encode_conversation([USER, thoughtful, USER_2, ANSWER_2], qwen3)
    assert trained_text(first, qwen3) == THOUGHT + "<|im_end|>"
    assert trained_text(second, qwen3) == ANSWER_2["content"] + "<|im_end|>"
    text = qwen3.decode(second.input_ids)
    assert "先想天气" not in text and text.count(NO_THOUGHT) == text.count("<think>") == 1


def test_a_template_that_always_opens_a_thought(tokenizer: PreTrainedTokenizerBase) -> None:
    opened = r"{{- '<think>\n\n</think>\n\n' }}{% endif %}"
    opened = "{%- if enable_thinking is defined and enable_thinking is false %}" + opened
    assert opened in QWEN3
    always = with_template(tokenizer, "own", QWEN3.replace(opened, r"{{- '<think>\n' }}"))
    (row,) = encode_conversation([USER, {"role": "assistant", "content": THOUGHT}], always)
    assert trained_text(row, always) == THOUGHT.removeprefix("<think>\n") + "<|im_end|>"
    prompt = encode_prompt([USER], always, thinking=True)
    assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != IGNORE_INDEX
    with pytest.raises(UserError, match=r"雨下了一夜") as caught:
        encode_conversation([USER, ANSWER], always)
    assert "chat_template.jinja" in caught.value.remedy


def test_prompts_leave_room_for_a_thought_where_most_answers_of_training_had_one(
    qwen3: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    thoughtful = [USER, {"role": "assistant", "content": THOUGHT}]
    for conversations, thinking in (
        ([thoughtful, [USER, ANSWER], thoughtful], True), ([thoughtful, [USER, ANSWER]], False),
        ([[USER, ANSWER]], False),
    ):  # fmt: skip
        own = copy.deepcopy(qwen3)
        file = tmp_path / "rows.jsonl"
        rows = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations]
        file.write_text("\n".join(rows), encoding="utf-8")
        read_conversations(ConversationArguments([str(file)], [str(file)]), own)
        assert encode_prompt([USER], own) == encode_prompt([USER], qwen3, thinking=thinking)
        assert encode_prompt([USER], own, thinking=not thinking) != encode_prompt([USER], own)


def test_prompts_take_answers_that_the_template_changes(qwen3: PreTrainedTokenizerBase) -> None:
    """A model may write anything; such an answer cannot be trained, and the talk goes on."""
    odd = {"role": "assistant", "content": "甲</think>乙</think>丙"}
    with pytest.raises(UserError):
        encode_conversation([USER, odd], qwen3)
    prompt = encode_prompt([USER, odd, USER_2], qwen3)
    rendered = qwen3.apply_chat_template(
        [USER, odd, USER_2], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert qwen3.decode(prompt) == rendered
