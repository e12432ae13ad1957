"""A conversation as its chat template renders it: nothing is lost, and every special token is the template's own."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.text import template_bounds
from novelgpt.text.encoding import AS_IT_IS, AS_IT_IS_FAST, encode, fast_backend
from novelgpt.text.messages import Message, full_answer, map_texts
from novelgpt.text.special_tokens import encode_literally, special_tokens

# Fields of messages that a template may read.
_READ = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
# Characters of a plane without meanings: they replace special tokens that a text spells while a template renders it.
_STAND_INS = range(0xF0000, 0xFFFFE)
_PROBE = "novelgpt"
# Texts of so few characters are kept with their tokens: what templates put behind each answer is always the same.
SHORT = 16


class RenderedConversation:
    """A conversation, its tools, and the text and tokens that its chat template makes of them.

    While the template renders, each special token that a text of the conversation spells is replaced by one character,
    its stand-in, which `tokens` encodes as the letters of that token. So a special token in rendered text is always the
    template's own.

    Args:
        messages: of the conversation; fields that no template reads are left out.
        tokenizer: whose template is used.
        tools: that the assistant may call, as templates take them.

    Attributes:
        messages: as they are rendered, with stand-ins.
        weights: of each message in the loss, if it is an answer.
        spelled: code of each stand-in -> the special token that it replaces.
        answers: number of each answer -> its text, thought included.
        instructions: numbers of the system and tool messages, which the template must write (`refuse_lost_texts`).

    Raises:
        UserError: the template fails on the messages, or leaves out the tools or a call.
    """

    def __init__(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self.weights = [message.get("weight", 1.0) for message in messages]
        self.messages: list[Any] = [{name: dict(one)[name] for name in _READ if name in one} for one in messages]
        self._tools = list(tools)
        self._calls = [
            (number, place)
            for number, message in enumerate(self.messages)
            for place in range(len(message.get("tool_calls", ())))
        ]
        self.spelled: dict[int, str] = {}
        texts = [text for message in self.messages for text in message.values() if isinstance(text, str)]
        if self._tools or self._calls:
            map_texts([self.messages, self._tools], texts.append)
        if any(token in text for token in self.special.texts for text in texts):
            self._hide_spelled(texts)
        self.answers = {
            number: full_answer(message) if message.get("reasoning_content") else message["content"] or ""
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant"
        }
        self.instructions = [
            number
            for number, message in enumerate(self.messages)
            if message["role"] in ("system", "tool") and message["content"].strip()
        ]
        if self._calls:
            self._settle_calls()
        if self._tools and self._renders_alike(self.messages, self.messages, with_tools=False):
            raise UserError(
                "field tools: the chat template has no place for a list of tools",
                "take a model whose template has one (Qwen2.5, Qwen3), or leave out tools and the rows that call them",
            )

    def render(
        self,
        messages: Sequence[Any],
        thinking: bool = False,
        add_generation_prompt: bool = False,
        with_tools: bool = True,
    ) -> str:
        """The text of `messages`, which are those of the conversation or variants of them.

        Args:
            messages: with stand-ins.
            thinking: whether the next answer may begin with a thought, for templates that prompt for it; if not,
                Qwen3's puts an empty thought into the prompt, outside the loss.
            add_generation_prompt: whether the text continues to where the next answer starts.
            with_tools: whether the template gets the tools.

        Raises:
            UserError: the template fails on them, takes too long or writes too much.
        """
        tools: list[Any] | None = (self._tools or None) if with_tools else None
        try:
            with template_bounds.processor_time(template_bounds.RENDER_SECONDS):
                text = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, tools=tools, enable_thinking=thinking,
                    add_generation_prompt=add_generation_prompt,
                )  # fmt: skip
        except template_bounds.OverrunError:
            limit = f"{template_bounds.RENDER_SECONDS} s"
            raise UserError(f"the chat template has not ended after {limit}", template_bounds.REMEDY) from None
        except Exception as error:
            roles = " ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses messages of the roles {roles!r}: {error}",
                "order the roles as the template wants, or give the tokenizer another template",
            ) from error
        rendered = str(text)
        if len(rendered) > template_bounds.MAX_OWN_CHARACTERS:
            given = len(str(messages)) + len(str(tools))
            if len(rendered) > template_bounds.MAX_OWN_CHARACTERS + template_bounds.MAX_CHARACTERS_EACH * given:
                cause = f"the chat template writes {len(rendered):,} characters for messages of {given:,}"
                raise UserError(cause, template_bounds.REMEDY)
        return rendered

    def tokens(self, text: str) -> list[int]:
        """Tokens of a part of the rendered text."""
        if not any(chr(stand_in) in text for stand_in in self.spelled):
            if len(text) <= SHORT:
                return list(_encode_short(text, self.tokenizer, len(self.tokenizer)))
            backend = fast_backend(self.tokenizer)
            if backend is not None:
                return list(backend.encode_batch_fast([text], **AS_IT_IS_FAST)[0].ids)
            return list(self.tokenizer(text, **AS_IT_IS)["input_ids"])
        ids: list[int] = []
        parts = re.split(f"({self.special.pattern.pattern})", text)
        # Between the template's special tokens lie texts; those with stand-ins are set apart, all else stays together.
        for spells, group in itertools.groupby(parts, lambda part: any(chr(code) in part for code in self.spelled)):
            joined = "".join(group).translate(self.spelled)
            ids += (encode_literally if spells else encode)(joined, self.tokenizer)
        return ids

    def _hide_spelled(self, texts: Sequence[str]) -> None:
        """Replace each special token that `texts`, all those of the conversation, spell by a character not in them."""
        spelled = [token for token in self.special.texts if any(token in text for text in texts)]
        free = (number for number in _STAND_INS if not any(chr(number) in text for text in texts))
        self.spelled = dict(zip(free, spelled, strict=False))
        stand_ins = {token: chr(number) for number, token in self.spelled.items()}
        pattern = re.compile("|".join(map(re.escape, stand_ins)))  # the longest first
        hide = functools.partial(pattern.sub, lambda match: stand_ins[match[0]])
        self.messages, self._tools = map_texts([self.messages, self._tools], hide)

    def refuse_lost_texts(self, rendered: str, count: int) -> None:
        """Check that the template writes what each system and tool message says.

        Args:
            rendered: text of the first `count` messages.
            count: of messages.

        Raises:
            UserError: it leaves one of them out.
        """
        messages = self.messages[:count]
        for number in (number for number in self.instructions if number < count):
            message = messages[number]
            said = message["content"].strip()
            others = [one["content"] or "" for one in (*messages[:number], *messages[number + 1 :])]
            if rendered.count(said) > sum(other.count(said) for other in others):
                continue
            changed = [*messages[:number], {**message, "content": _PROBE + message["content"]}, *messages[number + 1 :]]
            if self._renders_alike(messages, changed):
                raise UserError(
                    f"message {number + 1}: the chat template leaves out what the role {message['role']!r} says",
                    "take a model whose template has a place for it, or leave the message out",
                )

    def _settle_calls(self) -> None:
        """Give the template the calls in the form that it writes out.

        Arguments are mappings, or JSON where the template takes them as text; beside calls, no text is "" or null
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
        self.render(given)  # raises, where it fails on something else
        number, _ = self._lost_call() or self._calls[0]
        raise UserError(
            f"field tool_calls of message {number + 1} (or its function_call): the chat template has no place for "
            "calls of tools",
            "take a model whose template has one (Qwen2.5, Qwen3), or leave out the rows that call tools",
        )

    def _lost_call(self) -> tuple[int, int] | None:
        """The first call (number of the message, place in it) that the template does not write out as JSON."""
        try:
            rendered = self.render(self.messages)
        except UserError:
            return self._calls[0]
        for number, place in self._calls:
            changed = copy.deepcopy(self.messages)
            function = changed[number]["tool_calls"][place]["function"]
            arguments, other = function["arguments"], {_PROBE: _PROBE}
            is_text = isinstance(arguments, str)
            in_python = str(arguments) != json.dumps(arguments, ensure_ascii=False) and str(arguments) in rendered
            function["arguments"] = json.dumps(other) if is_text else other
            if (in_python and not is_text) or self._renders_alike(self.messages, changed):
                return number, place
        return None

    def _renders_alike(self, messages: Sequence[Any], others: Sequence[Any], with_tools: bool = True) -> bool:
        """Whether the template makes the same text of `messages` with the tools, and of `others` with or without."""
        rendered = self.render(messages)
        try:
            return rendered == self.render(others, with_tools=with_tools)
        except UserError:
            return False


@functools.lru_cache(maxsize=1024)
def _encode_short(text: str, tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[int, ...]:
    """`encode`; `size` is that of the vocabulary, to which tokens may be added."""
    return tuple(encode(text, tokenizer))
