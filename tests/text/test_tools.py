"""Tools, calls of tools and thoughts go through the template's own block, token by token; or they are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dataset.encoded_rows import encode_rows
from dataset.readers import read_conversation_rows
from dataset.sources import find_row_sources
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation, encode_prompt
from novelgpt.text.statistics import TokenCounts
from novelgpt.text.templates import CHATML_TEMPLATE
from predict.rows import read_prompt_rows
from tests.text.test_templates import with_template

# As Qwen2.5 has it: tools in the system message, calls as JSON in tags, results as the user's.
_SYSTEM = r"""
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{{ '<|im_start|>system\n' + first + '\n\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif first %}{{ '<|im_start|>system\n' + first + '<|im_end|>\n' }}{% endif %}"""
_CALLS = r"""
    {%- for call in message.tool_calls or [] %}
        {{- '\n' if part.answer or not loop.first }}
        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + ARGUMENTS + '}\n</tool_call>' }}
    {%- endfor %}"""
_RESULT = r"""
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"""
_TOOLS = (
    _SYSTEM
    + r"""
{%- for message in messages %}
    {%- set part = namespace(answer=message.content or '') %}
    {%- if message.role == 'tool' %}"""
    + _RESULT
    + r"""
    {%- elif message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\n' + part.answer }}"""
    + _CALLS
    + r"""
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)
TOOLS = _TOOLS.replace("ARGUMENTS", "(call.function.arguments | tojson)")
# Older templates take the arguments for a text: with a mapping, one fails, the other writes Python.
FOR_TEXTS = {
    "joins": _TOOLS.replace("ARGUMENTS", "call.function.arguments"),
    "prints": _TOOLS.replace("+ ARGUMENTS +", "~ call.function.arguments ~"),
}
# As Qwen3 has it, besides: thoughts after the last question, from their own field or from the answer.
THINKING_TOOLS = (
    _SYSTEM
    + r"""
{%- set last = namespace(question=-1) %}
{%- for message in messages if message.role == 'user' %}{% set last.question = messages.index(message) %}{% endfor %}
{%- for message in messages %}
    {%- set part = namespace(thought=message.reasoning_content or '', answer=message.content or '') %}
    {%- if not part.thought and message.role == 'assistant' and '</think>' in part.answer %}
        {%- set part.thought = part.answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set part.answer = part.answer.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if message.role == 'tool' %}"""
    + _RESULT
    + r"""
    {%- elif message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.role == 'assistant' and loop.index0 > last.question and (loop.last or part.thought) %}
            {{- '<think>\n' + part.thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- part.answer }}"""
    + _CALLS.replace("ARGUMENTS", "(call.function.arguments | tojson)")
    + r"""
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "查天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
TIME = {"type": "function", "function": {"name": "get_time", "description": "几点", "parameters": {}}}
CITY = {"city": "北京"}
USER = {"role": "user", "content": "北京天气怎么样？"}
CALL = {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": CITY}}
RESULT = {"role": "tool", "content": '{"t": 20}', "tool_call_id": "c1"}
ANSWER = {"role": "assistant", "content": "北京20度。"}
BLOCK = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'


def call(content: str | None = "", arguments: Any = CITY) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{**CALL, "function": function}]}


def openai(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"tools": [WEATHER], "messages": [USER, *messages]}


def sharegpt(tools: str, value: str, call_role: str = "function_call", result: str = "observation") -> dict[str, Any]:
    turns = [("human", USER["content"]), (call_role, value), (result, RESULT["content"]), ("gpt", ANSWER["content"])]
    return {"tools": tools, "conversations": [{"from": role, "value": text} for role, text in turns]}


CALL_TEXT = json.dumps({"name": "get_weather", "arguments": CITY}, ensure_ascii=False)
BARE = json.dumps([WEATHER["function"]], ensure_ascii=False)
# One exchange as other tools write it: a row, and what its call says before the block.
FORMS = {
    "content empty": (openai(call(""), RESULT, ANSWER), ""),
    "content null": (openai(call(None), RESULT, ANSWER), ""),
    "content missing": (
        openai({"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER), "",
    ),
    "content": (openai(call("我查一下。"), RESULT, ANSWER), "我查一下。\n"),
    "arguments as JSON": (openai(call("", json.dumps(CITY)), RESULT, ANSWER), ""),
    "OpenAI's first form": (
        {
            "functions": [WEATHER["function"]],
            "messages": [
                USER, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "get_weather", "content": RESULT["content"]}, ANSWER,
            ],
        }, "",
    ),
    "LLaMA-Factory": (sharegpt(BARE, CALL_TEXT), ""),
    "LLaMA-Factory, a list of calls": (sharegpt(BARE, f"[{CALL_TEXT}]"), ""),
    "ms-swift": (sharegpt(json.dumps([WEATHER]), CALL_TEXT, "tool_call", "tool_response"), ""),
    "columns of JSON": (
        {"tools": json.dumps([WEATHER]), "messages": json.dumps([USER, call(), RESULT, ANSWER])}, "",
    ),
    "fields of other rows": (
        {**openai({**call(), "name": None, "refusal": None}, {**RESULT, "tool_calls": None}, ANSWER), "images": []}, "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(tokenizer, "own", TOOLS)


@pytest.fixture(scope="module")
def qwen3(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(tokenizer, "own", THINKING_TOOLS)


def encoded(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[list[EncodedRow], TokenCounts]:
    """As training reads a file of this one row."""
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    return encode_rows(list(read_conversation_rows(file)), tokenizer, ConversationArguments())


def trained(row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX]))


@pytest.mark.parametrize("form", FORMS)
def test_calls_and_tools_have_the_tokens_of_the_template(
    form: str, chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    record, said = FORMS[form]
    (row,), counts = encoded(record, chat, tmp_path)
    messages = [USER, call(said.strip()), RESULT, ANSWER]
    whole = chat.apply_chat_template(messages, tools=[WEATHER], tokenize=True, return_dict=False)
    assert row.input_ids == whole
    assert trained(row, chat) == f"{said}{BLOCK}<|im_end|>{ANSWER['content']}<|im_end|>"
    assert counts.dropped == 0 and counts.tokens_in == counts.trained + counts.context
    for turn in (1, 3):
        prompt = encode_prompt(messages[:turn], chat, tools=[WEATHER])
        rendered = chat.apply_chat_template(
            messages[:turn], tools=[WEATHER], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert prompt == rendered == row.input_ids[: len(prompt)] and row.labels[len(prompt)] != IGNORE_INDEX


def test_several_calls_and_results(chat: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    second = {"name": "get_time", "arguments": {}}
    parallel = {"role": "assistant", "content": "", "tool_calls": [CALL, {"type": "function", "function": second}]}
    turns = [
        ("human", USER["content"]), ("tool_call", CALL_TEXT), ("tool_call", json.dumps(second)),
        ("tool", "20"), ("tool", "八点"), ("gpt", "答"),
    ]  # fmt: skip
    swift = {"tools": [WEATHER, TIME], "conversations": [{"from": role, "value": text} for role, text in turns]}
    results = [{"role": "tool", "content": text} for text in ("20", "八点")]
    messages = [USER, parallel, *results, {"role": "assistant", "content": "答"}]
    (row,), _ = encoded({"tools": [WEATHER, TIME], "messages": messages}, chat, tmp_path)
    (same,), _ = encoded(swift, chat, tmp_path)
    assert row == same
    assert row.input_ids == chat.apply_chat_template(messages, tools=[WEATHER, TIME], tokenize=True, return_dict=False)
    assert trained(row, chat).startswith(BLOCK + '\n<tool_call>\n{"name": "get_time", "arguments": {}}')


@pytest.mark.parametrize("kind", FOR_TEXTS)
@pytest.mark.parametrize("arguments", [CITY, json.dumps(CITY)])
def test_templates_that_take_arguments_for_texts_get_json(
    kind: str, arguments: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    older = with_template(tokenizer, "own", FOR_TEXTS[kind])
    (row,), _ = encoded(openai(call("", arguments), RESULT, ANSWER), older, tmp_path)
    assert trained(row, older) == f"{BLOCK}<|im_end|>{ANSWER['content']}<|im_end|>"


# As other families have them: the call of an answer, after the mark of its role.
FAMILIES = {
    # One call, ended by a token of its own (Llama 3.1).
    "llama": (
        "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}<|endoftext|>' }}",
        "if message.tool_calls",
        '{"name": "get_weather", "parameters": {"city": "北京"}}<|endoftext|>',
    ),
    # Where there is not a text, and from arguments that are one (DeepSeek V3); the block has special tokens in it.
    "deepseek": (
        "{{ '<|im_start|>' + call.name + '\n' + call.arguments + '\n<|im_start|><|im_end|>' }}",
        "if message.content is not defined",
        '<|im_start|>get_weather\n{"city": "北京"}\n<|im_start|><|im_end|>',
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_other_families(family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    block, condition, written = FAMILIES[family]
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% " + condition + " %}"
        "{% set call = message.tool_calls[0].function %}" + block + "{% else %}{{ message.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = with_template(tokenizer, "own", template)
    for content in ("", None):
        (row,), _ = encoded({"messages": [USER, call(content), RESULT, ANSWER]}, chat, tmp_path)
        assert trained(row, chat) == f"{written}{ANSWER['content']}<|im_end|>"
        for turn in (1, 3):
            prompt = encode_prompt([USER, call(content), RESULT][:turn], chat)
            assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != IGNORE_INDEX
    # What is said beside a call has no place here.
    with pytest.raises(UserError, match="field tool_calls"):
        encoded({"messages": [USER, call("我查一下。"), RESULT, ANSWER]}, chat, tmp_path)


def test_calls_after_thoughts(qwen3: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    thinking = {**call(), "reasoning_content": "先查天气。"}
    (row,), _ = encoded(openai(thinking, RESULT, ANSWER), qwen3, tmp_path)
    first = f"<think>\n先查天气。\n</think>\n\n{BLOCK}<|im_end|>"
    assert trained(row, qwen3) == f"{first}{ANSWER['content']}<|im_end|>"
    for turn in (1, 3):
        prompt = encode_prompt([USER, thinking, RESULT][:turn], qwen3, turn == 1, tools=[WEATHER])
        assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != IGNORE_INDEX
        assert row.labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_its_own_field_is_one_in_the_answer(
    field: str, qwen3: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    answer = {"role": "assistant", "content": "雨下了一夜。"}
    question = {"role": "user", "content": "写一个开头。"}
    written = {**answer, "content": "<think>\n先想天气。\n</think>\n\n雨下了一夜。"}
    expected = encode_conversation([question, written], qwen3)
    for record in (
        {"messages": [question, {**answer, field: "先想天气。"}]},
        {"instruction": "写一个开头。", "output": "雨下了一夜。", field: "先想天气。"},
        {"query": "写一个开头。", "response": "雨下了一夜。", field: "先想天气。"},
    ):
        rows, _ = encoded(record, qwen3, tmp_path)
        assert rows == expected
        (asked,) = read_prompt_rows(find_row_sources([str(tmp_path / "rows.jsonl")]), qwen3, None)
        assert asked.reference == written["content"]
        assert asked.prompt_ids == encode_prompt([question], qwen3, thinking=True)


DROPS = CHATML_TEMPLATE.replace("message in messages", "message in messages if message.role in ['user', 'assistant']")
THOUGHTFUL = {**ANSWER, "reasoning_content": "想"}
# What the template has no place for: template, row, what the error names.
LOST = {
    "calls": (CHATML_TEMPLATE, {"messages": [USER, call("查。"), RESULT, ANSWER]}, "field tool_calls of message 2"),
    "an empty call": (CHATML_TEMPLATE, {"messages": [USER, call(None), RESULT, ANSWER]}, "field tool_calls"),
    "ShareGPT's calls": (CHATML_TEMPLATE, {**sharegpt("", CALL_TEXT)}, "function_call"),
    "tools": (CHATML_TEMPLATE, openai(ANSWER), "field tools"),
    "thoughts": (CHATML_TEMPLATE, {"messages": [USER, THOUGHTFUL]}, "field reasoning_content"),
    "thoughts beside calls": (TOOLS, openai({**call(), "reasoning_content": "想"}), "field reasoning_content"),
    "results": (DROPS, {"messages": [USER, ANSWER, RESULT, ANSWER]}, "'tool'"),
    "system messages": (DROPS, {"messages": [{"role": "system", "content": "你是诗人。"}, USER, ANSWER]}, "'system'"),
    "the second call": (
        TOOLS.replace("in message.tool_calls or []", "in (message.tool_calls or [])[:1]"),
        openai({**call(), "tool_calls": [CALL, {"function": TIME["function"]}]}), "field tool_calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_the_template_has_no_place_for_is_refused(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template, record, named = LOST[name]
    without = with_template(tokenizer, "own", template)
    with pytest.raises(UserError) as caught:
        encoded(record, without, tmp_path)
    assert caught.value.cause.startswith(f"{tmp_path / 'rows.jsonl'}:1: ") and named in caught.value.cause
    if "thoughts" not in name:  # those of earlier turns are no part of a prompt
        with pytest.raises(UserError) as caught:
            read_prompt_rows(find_row_sources([str(tmp_path / "rows.jsonl")]), without, None)
        assert caught.value.cause.startswith(f"{tmp_path / 'rows.jsonl'}:1: ")


BROKEN = [
    (openai(call("", "{not JSON"), ANSWER), ["messages[1].tool_calls[0].arguments", "invalid JSON"]),
    (openai(call("", [1]), ANSWER), ["messages[1].tool_calls[0].arguments", "not a mapping"]),
    (openai({**call(), "tool_calls": {"a": 1}}, ANSWER), ["messages[1].tool_calls", "not a list"]),
    (openai({**call(), "tool_calls": ["get_weather"]}, ANSWER), ["messages[1].tool_calls[0]", "not a call"]),
    ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, ["messages[0]", "'user'"]),
    (sharegpt(BARE, "查一下天气"), ["conversations[1].value", "invalid JSON"]),
    (sharegpt(BARE, '"get_weather"'), ["conversations[1].value", "not a call"]),
    (sharegpt("[1]", CALL_TEXT), ["field tools[0]", "not a tool"]),
    (sharegpt("天气", CALL_TEXT), ["field tools", "invalid JSON"]),
    ({"messages": [{**USER, "tools": [WEATHER]}, ANSWER]}, ["messages[0].tools", "row"]),
    ({"messages": [USER, {**ANSWER, "content": "<think>甲</think>乙", "reasoning_content": "丙"}]}, ["<think>"]),
]


@pytest.mark.parametrize(("record", "parts"), BROKEN)
def test_broken_tools_and_calls_name_their_field(
    record: dict[str, Any], parts: list[str], chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        encoded(record, chat, tmp_path)
    for part in ["rows.jsonl:1", *parts]:
        assert part in caught.value.cause


def test_prediction_asks_with_the_tools_and_has_the_calls_as_reference(
    chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows, _ = encoded(openai(call()), chat, tmp_path)
    file = str(tmp_path / "rows.jsonl")
    (asked,) = read_prompt_rows(find_row_sources([file]), chat, None)
    assert asked.prompt_ids == encode_prompt([USER], chat, tools=[WEATHER]) and asked.reference == BLOCK
    assert asked.asked == [USER] and asked.encoded_reference(chat) == rows[0]
    with pytest.raises(UserError, match="field tools"):
        read_prompt_rows(find_row_sources([file]), None, None)
