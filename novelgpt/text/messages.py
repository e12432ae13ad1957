"""Messages of a conversation, and the thoughts in its answers (<think>…</think>), as text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, TypedDict


class _Speech(TypedDict):
    role: str
    content: str


class Message(_Speech, total=False):
    """One message.

    An answer may have `reasoning_content` (the thought before it), `tool_calls` (each {"type", "function": {"name",
    "arguments": mapping}}) and `weight`, the factor of its tokens in the loss where that is not 1: 0 makes it context.
    The result of a tool may have `name` and `tool_call_id`.
    """

    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    name: str
    tool_call_id: str
    weight: float


# An answer that starts with a thought: (thought, answer proper).
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
# The start of an answer whose thought holds more than line feeds.
OWN_THOUGHT = re.compile(r"\s*<think>\n*(?!\n|</think>).*?</think>", re.DOTALL)
# Content of an answer that says nothing: whitespace, around an empty thought or not.
EMPTY_CONTENT = re.compile(r"\s*(?:<think>\s*</think>\s*)?")
# Number of tokens at the end of a prompt that always hold an opening <think> tag with the whitespace around it.
PROMPT_END = 16
_TAG = re.compile(r"</?think>")
_OPENED = re.compile(r"<think>\s*\Z")


def map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """A value of JSON in which `change` has replaced every text, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {change(name): map_texts(item, change) for name, item in value.items()}
    return value


def full_answer(message: Message) -> str:
    """An answer with its thought in front where the message holds that in its own field; without its calls."""
    thought, content = message.get("reasoning_content"), str(message["content"] or "")
    return f"<think>\n{thought}\n</think>\n\n{content}" if thought else content


def begins_with_thought(answer: str) -> bool:
    """Whether an answer starts with a thought of its own; an empty one does not count."""
    return OWN_THOUGHT.match(answer) is not None


def is_empty_answer(message: Message) -> bool:
    """Whether an answer says, thinks and calls nothing, so that its end token alone would be trained."""
    says_more = message.get("tool_calls") or message.get("reasoning_content")
    return not says_more and EMPTY_CONTENT.fullmatch(message["content"] or "") is not None


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends in an opening <think> tag, so that the answer starts inside a thought."""
    return _OPENED.search(prompt) is not None


def split_thought(text: str, opened: bool | None) -> tuple[str, str]:
    """Split what a model wrote into (thought, answer), without the tags and the whitespace around them.

    Only thoughts at the start count; tags further on are part of the answer. A thought ends at the tag that closes its
    opening one; where the tags inside are unbalanced, at the last closing tag. A thought that is never closed is
    everything, and the answer is empty. An answer without a thought is returned unchanged.

    Args:
        text: what the model wrote.
        opened: whether the prompt opens a thought (`opens_thought`); None where the prompt is unknown: then a text
            that closes more thoughts than it opens started inside one.

    >>> split_thought("<think>想</think>答", False)
    ('想', '答')
    >>> split_thought("标签 <think> 是什么？", False)
    ('', '标签 <think> 是什么？')
    """
    thoughts: list[str] = []
    while True:
        opening = re.match(r"\s*<think>", text)
        if opened is None:
            opened = any(depth < 0 for _, depth in _tag_depths(text))
        if opening is None and not opened:
            return "\n".join(filter(None, thoughts)), text
        text = text if opening is None else text[opening.end() :]
        tags = _tag_depths(text)
        last = next((tag for tag, _ in reversed(tags) if tag[0] == "</think>"), None)
        closing = next((tag for tag, depth in tags if depth < 0), last)
        thought, text = (text, "") if closing is None else (text[: closing.start()], text[closing.end() :])
        thoughts.append(thought.strip())
        text = text.lstrip("\r\n")  # other whitespace may indent a paragraph
        opened = False


def _tag_depths(text: str) -> list[tuple[re.Match[str], int]]:
    """Each tag of a thought in a text, with the number of thoughts that are open after it."""
    tags = list(_TAG.finditer(text))
    return list(zip(tags, itertools.accumulate(1 if tag[0] == "<think>" else -1 for tag in tags), strict=True))
