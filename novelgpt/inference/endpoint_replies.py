"""Replies of an OpenAI-compatible server, validated."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from novelgpt.inference.generation import Answer

# Finish reasons of OpenAI, text-generation-inference, Together, Anthropic, Mistral and Gemini, which gateways pass on.
ENDED_BY_MODEL = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
CUT = ("length", "max_tokens", "model_length")
# The server gave up: the answer is not kept.
ABORTED = ("abort", "error")
REASON = re.compile(r"[a-z][a-z0-9_]{0,31}")
MAX_TOKENS = 10**9
MAX_NAME = 1000  # characters of a model's name


class InvalidReplyError(Exception):
    """A reply of status 200 that does not follow this API; the message says why."""


class _Part(BaseModel):
    """Ignores other fields; strings are not converted from other types."""

    model_config = ConfigDict(extra="ignore")


class _Message(_Part):
    content: StrictStr | None = None
    # Of servers that return the reasoning separately; vLLM has renamed the field.
    reasoning: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    refusal: StrictStr | None = None
    tool_calls: Any = None  # only checked for presence


Reply = TypeVar("Reply", bound=_Part)


class _ChatChoice(_Part):
    message: _Message
    finish_reason: StrictStr | None = None


class _TextChoice(_Part):
    text: StrictStr
    finish_reason: StrictStr | None = None


class _Usage(_Part):
    prompt_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    completion_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)


class _ChatReply(_Part):
    choices: list[_ChatChoice] = Field(min_length=1)
    usage: Any = None


class _TextReply(_Part):
    choices: list[_TextChoice] = Field(min_length=1)
    usage: Any = None


class _Model(_Part):
    id: StrictStr = Field(min_length=1, max_length=MAX_NAME)


class _Models(_Part):
    data: list[_Model]


def read_chat_reply(data: bytes) -> Answer:
    """Parse a chat completion.

    Raises:
        InvalidReplyError: it is not a chat completion, or holds no answer.
    """
    reply = _validated(_ChatReply, data)
    choice, usage = reply.choices[0], _usage(reply.usage)
    message, reason = choice.message, _reason(choice.finish_reason)
    thought = next((one for one in (message.reasoning_content, message.reasoning) if one and one.strip()), "")
    text = message.refusal if message.content is None else message.content
    # Some servers send null for an empty answer, which consists of the end token alone.
    explained = (
        thought or message.tool_calls or usage.completion_tokens == 1 or reason not in ("stop", "length", "unknown")
    )
    if text is None and not explained:
        raise InvalidReplyError("choices.0.message.content holds no text")
    return Answer(text or "", reason, usage.completion_tokens, usage.prompt_tokens, thought)


def read_text_reply(data: bytes) -> Answer:
    """Parse a completion of raw text.

    Raises:
        InvalidReplyError: it is not a completion.
    """
    reply = _validated(_TextReply, data)
    choice, usage = reply.choices[0], _usage(reply.usage)
    return Answer(choice.text, _reason(choice.finish_reason), usage.completion_tokens, usage.prompt_tokens)


def read_model_names(data: bytes) -> list[str]:
    """Parse the list of a server's models.

    Raises:
        InvalidReplyError: it is not a list of models.
    """
    return [model.id for model in _validated(_Models, data).data]


def error_message(data: bytes) -> str:
    """The message of an error reply, in any form: {"error": {"message"}}, {"detail"}, {"message"}, or any text."""
    text = data.decode("utf-8", errors="replace")
    try:
        found: Any = json.loads(text)
        for key in ("error", "detail", "message"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _validated(kind: type[Reply], data: bytes) -> Reply:
    try:
        return kind.model_validate_json(data.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        if not place:
            raise InvalidReplyError(f"not JSON of this API but {error_message(data[:2000])!r}") from error
        said = error_message(data) if b'"error"' in data[:2000] else ""
        raise InvalidReplyError(f"{place}: {first['msg']}" + (f"; it says {said}" if said else "")) from error


def _usage(usage: Any) -> _Usage:
    """Token counts; 0 if the server reports none, or invalid ones."""
    try:
        return _Usage.model_validate(usage)
    except ValidationError:
        return _Usage()


def _reason(reason: str | None) -> str:
    """The finish reason: "stop" if the model ended the answer, "length" if it was cut, else as the server names it.

    Raises:
        InvalidReplyError: the server aborted.
    """
    reason = None if reason is None else reason.lower()
    if reason in ABORTED:
        raise InvalidReplyError(f"choices.0.finish_reason is {reason}")
    if reason in ENDED_BY_MODEL:
        return "stop"
    if reason in CUT:
        return "length"
    return reason if reason is not None and REASON.fullmatch(reason) else "unknown"
