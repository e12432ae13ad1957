"""Rows in Alpaca, ShareGPT, OpenAI, prompt/completion, task or title/abstract shape, as messages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dataset.instructions import PAPERS_TASK, Instructions, load_instructions
from dataset.records import Record, load_json
from dataset.row_fields import THOUGHTS, check_message_fields, is_absent, read_flag, read_thought
from dataset.tool_rows import merge_calls, read_call_text, read_calls
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pipeline_name, python_module
from novelgpt.text.messages import THOUGHT, Message

TITLE_TO_ABSTRACT = "请根据下面的论文标题，写出这篇论文的摘要。\n标题：{title}"
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "tool": "tool",
    "tool_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")
_PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("query", "response"))
# Fields of messages that templates may read as they are.
_KEPT = ("name", "tool_call_id")


def messages_of(record: Record, where: str, instructions: Instructions | None = None) -> list[Message]:
    """Messages of a row in Alpaca, ShareGPT, OpenAI, prompt/completion, task or title/abstract shape.

    The last answer, where there is one, comes last: in every shape the answers are the messages of role "assistant".
    Rows that name a task are worded by `instructions` (by default, by the first of the built-in wordings);
    title/abstract rows that name none have one wording, unless `instructions` word them, too.

    A message has "role" and "content"; where the row says more, "tool_calls" (arguments as mappings), "name",
    "tool_call_id", "reasoning_content" (what was thought before the answer) and "trained": False for an answer that is
    to be read and not trained.

    Raises:
        UserError: no shape fits, a field is no text, or a role or a task is unknown.
    """
    for field, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if field in record:
            _refuse(record, ("history", *THOUGHTS), where, "beside a list of messages")
            return _with_system(record, where, _turns(record[field], role_key, content_key, where, field))
    for prompt, completion in _PAIRS:
        if prompt in record and completion in record:
            return _with_system(record, where, _pair(record, prompt, completion, where))
    used = fields_read(record, where, instructions)
    _refuse(record, {"history", *THOUGHTS}.difference(used), where, "in a row of a task")
    if record.get("task"):
        worded = (instructions or load_instructions()).messages(record["task"], record, where)
    elif "title" in record and "abstract" in record:
        if instructions is not None and instructions.words_papers:
            worded = instructions.messages(PAPERS_TASK, record, where)
        else:
            question = TITLE_TO_ABSTRACT.format(title=_text(record, "title", where))
            worded = [_message("user", question), _message("assistant", _text(record, "abstract", where))]
    else:
        raise UserError(
            f"{where}: the row has the fields {', '.join(map(str, record)) or 'none'}, which make no known shape",
            f"text is for pretraining: {pipeline_name('pretrain')}; {python_module('dataset conversations')} makes "
            "conversations of it"
            if isinstance(record.get("text"), str)
            else "use messages, conversations, instruction+output, prompt+completion, title+abstract or a task",
        )
    return worded if "system" in used else _with_system(record, where, worded)


def fields_read(record: Record, where: str, instructions: Instructions | None = None) -> Collection[str]:
    """Fields with a meaning of their own that a row of a task, or of title and abstract, reads as texts."""
    if any(field in record for field in ("messages", "conversations")):
        return ()
    if any(prompt in record and completion in record for prompt, completion in _PAIRS):
        return ()
    if record.get("task"):
        return [name for side in (instructions or load_instructions()).fields(record["task"], where) for name in side]
    return ("title", "abstract")


def _pair(record: Record, prompt: str, completion: str, where: str) -> list[Message]:
    """Question and answer, with the history before them; in Alpaca rows, the input belongs to the question."""
    messages = _history(record, where)
    for field, role in ((prompt, "user"), (completion, "assistant")):
        if isinstance(record[field], list) and field != "instruction" and field != "output":
            if messages and field == prompt:
                raise UserError(f"{where}: field history stands beside a list of messages", f"put it into {field}")
            messages += _turns(record[field], "role", "content", where, field)
            continue
        text = _text(record, field, where)
        if field == "instruction" and record.get("input"):
            text = "\n".join(part for part in (text, _text(record, "input", where)) if part)
        messages.append(_message(role, text))
    thought = read_thought(record, where)
    if thought and messages[-1]["role"] == "assistant":
        messages[-1] = _with_thought(messages[-1], thought, where, completion)
    return messages


def _history(record: Record, where: str) -> list[Message]:
    history = record.get("history") or []
    if isinstance(history, str):
        history = load_json(history, f"{where} field history")  # a column of a .csv
    if not isinstance(history, (list, tuple)):
        raise UserError(f"{where}: field history is no list of pairs", 'write [["question", "answer"], …]')
    messages = []
    for number, turn in enumerate(history):
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UserError(f"{where}: field history[{number}] is no pair of texts", 'write ["question", "answer"]')
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    return messages


def _with_system(record: Record, where: str, messages: list[Message]) -> list[Message]:
    """The messages with one system message at most before them, whether a field or messages hold it."""
    systems = [_text(record, "system", where)] if record.get("system") else []
    begin = 0
    while begin < len(messages) and messages[begin]["role"] == "system":
        systems.append(messages[begin]["content"])
        begin += 1
    if any(text.strip() != systems[0].strip() for text in systems):
        raise UserError(
            f"{where}: {'field system and ' if record.get('system') else ''}the first messages hold "
            f"{len(systems)} system messages that differ",
            "write one, with all that it is to say",
        )
    first = [_message("system", systems[0])] if systems else []
    return [*first, *messages[begin:]]


def _turns(turns: Any, role_key: str, content_key: str, where: str, field: str) -> list[Message]:
    if isinstance(turns, str):
        turns = load_json(turns, f"{where} field {field}")  # a column of a .csv
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: field {field} is no list of messages", f"write [{{{role_key!r}: …}}, …]")
    messages = []
    called = set()
    for number, turn in enumerate(turns):
        name = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where}: field {name} is no message", f"write {{{role_key!r}: …, {content_key!r}: …}}")
        role = turn.get(role_key, turn.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{where}: field {name}.{role_key} is {role!r}", f"use one of {', '.join(_ROLES)}")
        key = content_key if content_key in turn else "content"
        messages.append(_turn(turn, role, key, where, name))
        if role in _CALLS:
            called.add(number)
    return merge_calls(messages, called)


def _turn(turn: Record, role: str, key: str, where: str, name: str) -> Message:
    """A message with all that its turn says."""
    check_message_fields(turn, where, name)
    answer = _ROLES[role] == "assistant"
    calls = read_calls(turn, where, name)
    if calls and not answer:
        raise UserError(f"{where}: field {name} is a call of a tool by the role {role!r}", "let the assistant call")
    if role in _CALLS and not calls:
        calls, content = read_call_text(turn.get(key), where, f"{name}.{key}"), ""
    elif calls and is_absent(turn.get(key)):
        content = ""
    else:
        content = _text(turn, key, where, f"{name}.{key}")
    message: Message = _message(_ROLES[role], content)
    message |= {field: turn[field] for field in _KEPT if isinstance(turn.get(field), str)}
    if calls:
        message["tool_calls"] = calls
    flag = read_flag(turn, where, f"{name}.")
    if flag is not None and flag[1] and not answer:
        raise UserError(
            f"{where}: field {name}.{flag[0]} asks to train what the role {role!r} says, and answers alone are trained",
            "leave it out, or set it to false",
        )
    if flag is not None and not flag[1] and answer:
        message["trained"] = False
    thought = read_thought(turn, where, f"{name}.")
    if thought and not answer:
        raise UserError(f"{where}: field {name} holds a thought of the role {role!r}", "let the assistant think")
    return _with_thought(message, thought, where, f"{name}.{key}") if thought else message


def _with_thought(message: Message, thought: str, where: str, name: str) -> Message:
    if THOUGHT.fullmatch(message["content"]):
        raise UserError(
            f"{where}: field {name} begins with <think>, and {THOUGHTS[0]} holds a thought, too", "keep one of them"
        )
    return {**message, THOUGHTS[0]: thought}


def _refuse(record: Record, fields: Collection[str], where: str, place: str) -> None:
    for field in sorted(fields):
        if not is_absent(record.get(field)):
            raise UserError(
                f"{where}: field {field} is not read {place}", "put what it says into the messages, or leave it out"
            )


def _text(record: Record, field: str, where: str, name: str | None = None) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name or field} is {'missing' if value is None else 'no text'}",
                        "give it a text, or remove the row")  # fmt: skip
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
