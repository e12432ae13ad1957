"""Messages of conversations, and what is told from one alone, without a tokenizer."""

from __future__ import annotations

import re
from typing import Any

Message = dict[str, Any]
"""{"role", "content"}, both texts. An answer may have "reasoning_content" (text), "tool_calls" (a list, each
{"type", "function": {"name", "arguments": mapping}}) and "trained": False, where it is read and not trained; the
result of a tool may have "name" and "tool_call_id"."""

# An answer that begins with a thought, as Qwen3 and its kin write them: (thought, answer proper).
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def answer_text(message: Message) -> str:
    """What an answer says, its thought in front where the message holds that apart; its calls are no part of it."""
    thought, content = message.get("reasoning_content"), str(message["content"] or "")
    return f"<think>\n{thought}\n</think>\n\n{content}" if thought else content


def begins_with_thought(answer: str) -> bool:
    """Whether an answer begins with a thought of its own; an empty one is none."""
    thought = THOUGHT.fullmatch(answer)
    return thought is not None and bool(thought[1].strip("\n"))


def is_empty_answer(message: Message) -> bool:
    """Whether an answer says nothing and calls nothing, so that its end token alone would be trained."""
    answer = answer_text(message)
    thought = THOUGHT.fullmatch(answer)
    said = answer if thought is None else thought[1] + thought[2]
    return not said.strip() and not message.get("tool_calls")
