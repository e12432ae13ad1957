"""A few answers on the terminal, as a first look at what a model writes."""

from __future__ import annotations

from collections.abc import Sequence

from novelgpt.inference.generation import Answer
from novelgpt.settings.terminal import counted, say
from predict.rows import PromptRow

SHOWN_ANSWERS = 2
SHOWN_CHARACTERS = 160


def show_answers(rows: Sequence[PromptRow], answers: Sequence[Answer]) -> None:
    """Print the first answers without their thoughts, each below the end of its prompt and the beginning of its
    reference."""
    for row, answer in list(zip(rows, answers, strict=True))[:SHOWN_ANSWERS]:
        _, text = row.told_apart(answer)
        _, reference = row.reference_told_apart()
        say(
            f"row {row.id}",
            f"  prompt        {_end(row.prompt)}",
            *([f"  reference     {_begin(reference)}"] if reference else []),
            f"  prediction    {_begin(text)}  ({answer.finish_reason}, {counted(answer.completion_tokens, 'token')})",
        )


def _begin(text: str) -> str:
    return _lines(text[:SHOWN_CHARACTERS]) + ("…" if len(text) > SHOWN_CHARACTERS else "")


def _end(text: str) -> str:
    return ("…" if len(text) > SHOWN_CHARACTERS else "") + _lines(text[-SHOWN_CHARACTERS:])


def _lines(text: str) -> str:
    return text.replace("\n", "⏎")
