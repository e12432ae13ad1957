"""The thought before an answer, as reasoning models write it: <think>…</think>, told apart from the answer."""

from __future__ import annotations

import re

MARK = re.compile(r"</?think>")
# Tokens at the end of a prompt, in which the mark of a thought is looked for: more than it and the blanks around it.
PROMPT_END = 16
OPENED = re.compile(r"<think>\s*\Z")


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends in the mark of a thought, so that the answer begins within it."""
    return OPENED.search(prompt) is not None


def split_thought(text: str, opened: bool | None) -> tuple[str, str]:
    """(thought, answer) of what a model wrote, without the marks and the blanks around them.

    A thought stands at the beginning only, else the marks are part of what the answer says. It ends at the mark that
    belongs to its first one; where the marks in it do not pair up, at the last. One that does not end is all of it, and
    the answer is empty. An answer without a thought stays as it is, to the last blank.

    Args:
        text: what the model wrote.
        opened: whether the prompt opens a thought (`opens_thought`); None where the prompt is not known: then a text
            that closes more thoughts than it opens began within one.

    >>> split_thought("<think>想</think>答", False)
    ('想', '答')
    >>> split_thought("标签 <think> 是什么？", False)
    ('', '标签 <think> 是什么？')
    """
    thoughts: list[str] = []
    while True:
        begin = re.match(r"\s*<think>", text)
        if begin is not None:
            thought, text = _until_closed(text[begin.end() :])
        elif opened or (opened is None and _closes_first(text)):
            thought, text = _until_closed(text)
        else:
            return "\n".join(filter(None, thoughts)), text
        thoughts.append(thought.strip())
        text = text.lstrip("\r\n")  # other blanks may indent a paragraph
        opened = False


def _until_closed(text: str) -> tuple[str, str]:
    """What stands before and behind the mark that closes a thought, which has been opened before `text`."""
    depth, last = 1, None
    for mark in MARK.finditer(text):
        if mark[0] == "<think>":
            depth += 1
            continue
        depth, last = depth - 1, mark
        if depth == 0:
            break
    return (text, "") if last is None else (text[: last.start()], text[last.end() :])


def _closes_first(text: str) -> bool:
    """Whether a thought is closed that was not opened within the text."""
    depth = 0
    for mark in MARK.finditer(text):
        depth += 1 if mark[0] == "<think>" else -1
        if depth < 0:
            return True
    return False
