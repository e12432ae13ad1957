"""Lists of tools and calls of tools, as chat templates take them, from the forms in which data holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataset.records import load_json
from dataset.row_fields import is_absent
from novelgpt.settings.errors import UserError

Fields = dict[str, Any]


def read_tools(record: Mapping[str, Any], where: str) -> list[Fields]:
    """The tools of a row, [] for none: {"type": "function", "function": {…}} each.

    They stand in `tools`, as a list or as JSON text (LLaMA-Factory, ms-swift), or in `functions` (OpenAI's first form).
    A tool without the outer mapping gets it.

    Raises:
        UserError: no list of tools with names; names the field.
    """
    tools: list[Fields] = []
    for field in ("tools", "functions"):
        value = record.get(field)
        if isinstance(value, str) and value.strip():
            value = load_json(value, f"{where} field {field}")
        if is_absent(value) or (isinstance(value, str) and not value.strip()):
            continue
        for number, tool in enumerate(value if isinstance(value, list) else [value]):
            bare = tool.get("function") if isinstance(tool, dict) and "function" in tool else tool
            if not isinstance(bare, dict) or not isinstance(bare.get("name"), str):
                raise UserError(
                    f"{where}: field {field}[{number}] is no tool with a name",
                    'write [{"type": "function", "function": {"name": …, "description": …, "parameters": …}}, …]',
                )
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def read_calls(message: Mapping[str, Any], where: str, name: str) -> list[Fields]:
    """The calls of a message in `tool_calls`, or in `function_call` (OpenAI's first form); [] for none.

    Raises:
        UserError: a call without a name, or arguments that are no mapping; names the field.
    """
    calls: list[Fields] = []
    for field in ("tool_calls", "function_call"):
        value = message.get(field)
        if isinstance(value, str) and value.strip():
            value = load_json(value, f"{where} field {name}.{field}")
        if is_absent(value):
            continue
        if field == "tool_calls" and not isinstance(value, list):
            raise UserError(f"{where}: field {name}.{field} is no list of calls", 'write [{"function": {…}}, …]')
        for number, call in enumerate(value if isinstance(value, list) else [value]):
            place = f"{name}.{field}[{number}]" if isinstance(value, list) else f"{name}.{field}"
            calls.append(_call(call, where, place))
    return calls


def read_call_text(text: Any, where: str, name: str) -> list[Fields]:
    """The calls that the content of a `function_call` or `tool_call` turn holds as JSON: one, or a list.

    Raises:
        UserError: no JSON, or no call; names the field.
    """
    value = load_json(text, f"{where}: field {name}") if isinstance(text, str) else text
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise UserError(f"{where}: field {name} holds no call", 'write {"name": …, "arguments": {…}}')
    return [_call(call, where, name) for call in calls]


def _call(call: Any, where: str, place: str) -> Fields:
    """{"type", "function": {"name", "arguments": mapping}} and what else stands beside them, such as the id."""
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function")
    inner: Fields = function if isinstance(function, dict) else outer
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise UserError(f"{where}: field {place} is no call of a tool", 'write {"name": …, "arguments": {…}}')
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = load_json(arguments, f"{where}: field {place}.arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: field {place}.arguments is no mapping", 'write {"argument": value}, or its JSON')
    further = {key: value for key, value in inner.items() if key not in ("arguments", "parameters")}
    made = {**further, "arguments": arguments}
    return {"type": "function", **(outer if inner is function else {}), "function": made}


def merge_calls(messages: list[Fields], called: set[int]) -> list[Fields]:
    """Messages in which each turn that was written as a call alone is part of the answer right before it.

    Args:
        messages: in order.
        called: numbers of those that stand for calls alone, as ShareGPT's `function_call`.
    """
    merged: list[Fields] = []
    for number, message in enumerate(messages):
        before = merged[-1] if merged else {"role": ""}
        alike = before.get("trained", True) == message.get("trained", True)
        if number in called and before["role"] == "assistant" and alike:
            merged[-1] = {**before, "tool_calls": [*before.get("tool_calls", []), *message["tool_calls"]]}
        else:
            merged.append(message)
    return merged
