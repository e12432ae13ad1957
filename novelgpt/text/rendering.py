"""A conversation as its chat template renders it, with nothing lost on the way and no mark where a text spells one."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.text.encoding import encode
from novelgpt.text.marks import encode_ordinary, mark_pattern, mark_texts
from novelgpt.text.messages import Message
from novelgpt.text.template_bounds import render_template

# Fields of messages that a template may read.
_READ = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
# Of these planes no character has a meaning: they stand for marks while a template renders a text that spells them.
_STAND_INS = range(0xF0000, 0xFFFFE)
_PROBE = "novelgpt"


class RenderedConversation:
    """A conversation, its tools, and the text and tokens that its chat template makes of it.

    While the template renders, each mark that a text of the conversation spells is a stand-in of one character, which
    `tokens` takes for the mark's letters. So a mark in a text that was rendered is always the template's own.

    Args:
        messages: of the conversation; what no template reads is taken out.
        tokenizer: whose template is used.
        tools: that the assistant may call, as templates take them.

    Attributes:
        messages: as they are rendered, with stand-ins.
        trained: of each message, whether it is trained if it is an answer.

    Raises:
        UserError: the template fails on the messages, or leaves out the tools or a call.
    """

    def __init__(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.trained = [bool(message.get("trained", True)) for message in messages]
        self._spelled: dict[int, str] = {}
        read = [{name: message[name] for name in _READ if name in message} for message in messages]
        self._find_marks([read, list(tools)])
        self.messages: list[Message] = self._hidden(read)
        self._tools: list[dict[str, Any]] | None = self._hidden(list(tools)) or None
        self._calls = [
            (number, place)
            for number, message in enumerate(self.messages)
            for place in range(len(message.get("tool_calls", ())))
        ]
        if self._calls:
            self._settle_calls()
        if self._tools and self._renders_alike(self.messages, self.messages, None):
            raise UserError(
                "field tools: the chat template has no place for a list of tools",
                "take a model whose template has one (Qwen2.5, Qwen3), or leave out tools and the rows that call them",
            )

    def render(self, count: int, thinking: bool, add_generation_prompt: bool) -> str:
        """The text of the first `count` messages.

        Args:
            count: of messages.
            thinking: whether the next answer may begin with a thought, for templates that prompt for it.
            add_generation_prompt: whether the text goes on to where the next answer starts.

        Raises:
            UserError: the template fails on them.
        """
        return self._render(self.messages[:count], self._tools, thinking, add_generation_prompt)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a part of what was rendered."""
        if not self._spelled or not any(chr(stand_in) in text for stand_in in self._spelled):
            return encode(text, self.tokenizer)
        ids: list[int] = []
        parts = re.split(f"({mark_pattern(self.tokenizer).pattern})", text)
        # Between marks of the template lie texts; those with stand-ins are told apart, all else stays in one piece.
        for spelled, group in itertools.groupby(parts, self._is_spelled):
            joined = "".join(group)
            ids += encode_ordinary(self.told(joined), self.tokenizer) if spelled else encode(joined, self.tokenizer)
        return ids

    def told(self, text: str) -> str:
        """A part of what was rendered, as the conversation spells it."""
        return text.translate(self._spelled)

    def _is_spelled(self, text: str) -> bool:
        return any(chr(stand_in) in text for stand_in in self._spelled)

    def _find_marks(self, value: Any) -> None:
        """Choose a stand-in for each mark that the texts in `value` spell."""
        texts = list(_texts(value))
        marks = [mark for mark in mark_texts(self.tokenizer) if any(mark in text for text in texts)]
        free = (number for number in _STAND_INS if not any(chr(number) in text for text in texts))
        self._spelled = dict(zip(free, marks, strict=False)) if marks else {}

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            for stand_in, mark in self._spelled.items():  # the longest first
                value = value.replace(mark, chr(stand_in))
            return value
        if isinstance(value, list):
            return [self._hidden(item) for item in value]
        if isinstance(value, dict):
            return {self._hidden(name): self._hidden(item) for name, item in value.items()}
        return value

    def refuse_lost_texts(self, rendered: str, count: int) -> None:
        """Check that the template writes what each system and tool message says.

        Args:
            rendered: what `render` gave for the first `count` messages.
            count: of messages.

        Raises:
            UserError: it leaves one of them out.
        """
        for number, message in enumerate(self.messages[:count]):
            said = message["content"].strip() if message["role"] in ("system", "tool") else ""
            others = [one["content"] or "" for one in (*self.messages[:number], *self.messages[number + 1 : count])]
            if not said or rendered.count(said) > sum(other.count(said) for other in others):
                continue
            changed = self.messages[:count]
            changed[number] = {**message, "content": _PROBE + message["content"]}
            if self._renders_alike(self.messages[:count], changed, self._tools):
                raise UserError(
                    f"message {number + 1}: the chat template leaves out what the role {message['role']!r} says",
                    "take a model whose template has a place for it, or leave the message out",
                )

    def _settle_calls(self) -> None:
        """Give the template the calls in the form that it writes out.

        Arguments are mappings, or JSON where it takes them for a text; beside calls, no text is "" or null
        (which transformers takes out).

        Raises:
            UserError: it writes out none of these forms.
        """
        given = self.messages
        for empty, as_text in itertools.product(("", None), (False, True)):
            self.messages = copy.deepcopy(given)
            for number, place in self._calls:
                message = self.messages[number]
                message["content"] = message["content"] or empty
                function = message["tool_calls"][place]["function"]
                if as_text:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            if self._lost_call() is None:
                return
        self.messages = given
        self.render(len(given), False, add_generation_prompt=False)  # raises, where it fails on something else
        number, _ = self._lost_call() or self._calls[0]
        raise UserError(
            f"field tool_calls of message {number + 1} (or its function_call): the chat template has no place for "
            "calls of tools",
            "take a model whose template has one (Qwen2.5, Qwen3), or leave out the rows that call tools",
        )

    def _lost_call(self) -> tuple[int, int] | None:
        """The first call (number of the message, place in it) that the template does not write out as JSON."""
        try:
            rendered = self.render(len(self.messages), False, add_generation_prompt=False)
        except UserError:
            return self._calls[0]
        for number, place in self._calls:
            changed = copy.deepcopy(self.messages)
            function = changed[number]["tool_calls"][place]["function"]
            arguments, other = function["arguments"], {_PROBE: _PROBE}
            in_python = str(arguments) != json.dumps(arguments, ensure_ascii=False) and str(arguments) in rendered
            function["arguments"] = json.dumps(other) if isinstance(arguments, str) else other
            if (in_python and not isinstance(arguments, str)) or self._renders_alike(
                self.messages, changed, self._tools
            ):
                return number, place
        return None

    def _renders_alike(
        self, messages: list[Message], others: list[Message], tools: list[dict[str, Any]] | None
    ) -> bool:
        """Whether the template makes the same of `others` and `tools` as of `messages` and the tools of these."""
        rendered = self._render(messages, self._tools, False, False)
        try:
            return rendered == self._render(others, tools, False, False)
        except UserError:
            return False

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, thinking: bool, add_generation_prompt: bool
    ) -> str:
        try:
            # enable_thinking: where it is off, the empty think block of Qwen3 stands in the prompt, outside the loss.
            return render_template(
                self.tokenizer,
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=thinking,
            )
        except UserError:
            raise
        except Exception as error:
            roles = " ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses messages of the roles {roles!r}: {error}",
                "order the roles as the template wants, or give the tokenizer another template",
            ) from error


def _texts(value: Any) -> Any:
    """All texts in a value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_texts, itertools.chain(value, value.values())))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_texts, value))
