"""Conversations to (input_ids, labels): the only maker of prompts and of loss masks, for training and prediction.

A conversation is cut into pieces of text by what the chat template renders for it: prompt, answer, what follows the
answer. Each piece is tokenised on its own, so that the tokens of a prompt are the same whether an answer follows (in
training) or is to be generated (in prediction), and the mask never depends on searching text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.text.marks import mark_pattern
from novelgpt.text.messages import THOUGHT, Message, answer_text, begins_with_thought
from novelgpt.text.rendering import RenderedConversation
from novelgpt.text.templates import BAICHUAN_NAMES, USER_ID, record_thinking, template_record

__all__ = [
    "IGNORE_INDEX", "EncodedRow", "Message", "begins_with_thought", "encode_conversation", "encode_prompt",
    "end_token_ids", "record_answers",
]  # fmt: skip

IGNORE_INDEX = -100


@dataclass
class EncodedRow:
    """One training row.

    input_ids: [tokens]; labels: [tokens], not shifted, equal to input_ids where trained, else -100. With one exception:
    where a template puts nothing after an answer (Baichuan2), the label at the token after it, which begins the next
    question, is the end token, while the input there stays what it is. So the answer's last token learns to end, and
    the trained labels still read: answer, end token.

    source: file and row that it came from, as errors name them.
    """

    input_ids: list[int]
    labels: list[int]
    source: str = field(default="", compare=False)

    def extend(self, ids: list[int], trained: bool) -> None:
        """Append tokens, all trained or all not."""
        self.input_ids += ids
        self.labels += ids if trained else [IGNORE_INDEX] * len(ids)


class _HistoryRewrittenError(Exception):
    """The chat template renders earlier turns differently once later ones follow (Qwen3 drops old thoughts)."""


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()
) -> list[EncodedRow]:
    """Rows that train every assistant turn: decode(trained labels) == answer + end token, for each turn.

    One row as a rule. Where the template rewrites earlier turns, one row for each turn, each with the very prompt that
    prediction would use. Messages after the last answer are left out; a conversation without answers gives no row.
    Answers that are marked "trained": False are context.

    An answer that begins with a thought (<think>…</think>, or "reasoning_content") is trained with it, in the blanks
    that the template puts around thoughts. An empty thought is no part of an answer where the template puts it into the
    prompt. The calls of an answer are trained as the template writes them. A special token that a text spells is text.

    Args:
        messages: in order.
        tokenizer: whose template is used.
        tools: that the assistant may call, as templates take them.

    Raises:
        UserError: the template fails on the messages, has no place for tools or calls, or changes an answer beyond
            blanks at its ends.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    chat = RenderedConversation(messages[: turns[-1] + 1], tokenizer, tools)
    try:
        reader = _read_turns(chat, turns[-1] + 1)
        chat.refuse_lost_texts(reader.rendered, turns[-1] + 1)
        return [reader.finish()]
    except _HistoryRewrittenError:
        rows = []
        for turn in [turn for turn in turns if chat.trained[turn]] or turns[-1:]:
            thinking = _thinks(chat.messages[turn])
            reader = _Reader(chat, chat.render(turn, thinking, add_generation_prompt=True))
            reader.row.extend(_prompt_ids(chat, turn, thinking), trained=False)
            reader.read_answer(turn)
            rows.append(reader.finish())
        return rows


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Tokens up to where the next answer starts: exactly those that training saw before that answer.

    Args:
        messages: of the conversation so far.
        tokenizer: whose template is used.
        thinking: whether the answer may begin with a thought, for templates that prompt for it (Qwen3); by default,
            what most answers of the training did, and no thought where nothing is known of a training.
        tools: that the assistant may call.

    Raises:
        UserError: the template fails on the messages, or has no place for tools or calls.
    """
    if thinking is None:
        thinking = bool(template_record(tokenizer).get("thinking", False))
    return _prompt_ids(RenderedConversation(messages, tokenizer, tools), len(messages), thinking)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens at which generation stops, sorted.

    The end of an answer in the template; the tokenizer's end token; with ChatML, <|endoftext|>, by which a base model
    ends texts; in Baichuan's formats the token that begins a question, since only a finished answer is followed by it.
    """
    probe = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    row = encode_conversation(probe, tokenizer)[0]
    last = [label for label in row.labels if label != IGNORE_INDEX][-1]
    ends = {last, int(tokenizer.eos_token_id)}
    vocabulary = tokenizer.get_vocab()
    if last == vocabulary.get("<|im_end|>") and "<|endoftext|>" in vocabulary:
        ends.add(vocabulary["<|endoftext|>"])
    if template_record(tokenizer)["name"] in BAICHUAN_NAMES:
        ends.add(USER_ID)
    return sorted(ends)


def record_answers(conversations: Iterable[list[Message]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Note with the template whether most answers begin with a thought, for which later prompts then leave room."""
    thoughts = [
        _thinks(message) for messages in conversations for message in messages if message["role"] == "assistant"
    ]
    record_thinking(tokenizer, 2 * sum(thoughts) > len(thoughts))


@dataclass
class _Reader:
    """Takes up a conversation piece by piece.

    chat: the conversation; rendered: text of it that has been read; row: its tokens; unended: whether the last answer
    still lacks its end token, as the template puts nothing there; trained: whether that answer is trained.
    """

    chat: RenderedConversation
    rendered: str = ""
    row: EncodedRow = field(default_factory=lambda: EncodedRow([], []))
    unended: bool = False
    trained: bool = True

    @property
    def end_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.chat.tokenizer.eos_token_id)

    def read_prompt(self, prompt: str) -> None:
        """Go on to where an answer starts: `prompt` is all text before it."""
        if not prompt.startswith(self.rendered):
            raise _HistoryRewrittenError
        ids = self.chat.tokens(prompt[len(self.rendered) :])
        border = len(self.row.labels)
        self.row.extend(ids, trained=False)
        if self.unended and ids:
            if self.trained:
                self.row.labels[border] = self.end_id
            self.unended = False
        self.rendered = prompt

    def read_answer(self, turn: int) -> None:
        """Go on through the answer that is message `turn`, its end token and what the template puts after."""
        message = self.chat.messages[turn]
        full = self.chat.render(turn + 1, _thinks(message), add_generation_prompt=False)
        rest = full[len(self.rendered) :]
        answer = self._calls_as_rendered(message, rest) if message.get("tool_calls") else None
        if answer is None and not message.get("tool_calls"):
            answer = _as_rendered(answer_text(message), rest)
        if not full.startswith(self.rendered) or answer is None:
            raise self._changed(message)
        self.finish()  # an answer right after an answer that the template does not end
        self.trained = self.chat.trained[turn]
        self.row.extend(self.chat.tokens(answer), self.trained)
        tail = self.chat.tokens(rest[len(answer) :])
        if tail:
            special = tail[0] in self.chat.tokenizer.added_tokens_decoder
            self.row.extend([tail.pop(0) if special else self.end_id], self.trained)
            self.row.extend(tail, trained=False)
        self.unended = rest == answer
        self.rendered = full

    def finish(self) -> EncodedRow:
        """The row; an answer at its end that the template does not end gets its end token."""
        if self.unended:
            self.row.extend([self.end_id], self.trained)
            self.unended = False
        return self.row

    def _calls_as_rendered(self, message: Message, rest: str) -> str | None:
        """Thought, text and calls of an answer as the template writes them: all before the mark that ends the answer.

        None where no mark ends it, or the text does not stand there.
        """
        marks = list(mark_pattern(self.chat.tokenizer).finditer(rest))
        said = answer_text(message)
        if not marks or rest[marks[-1].end() :].strip():
            return None
        answer = rest[: marks[-1].start()]
        return answer if not said.strip() or _as_rendered(said.strip(), answer) is not None else None

    def _changed(self, message: Message) -> UserError:
        told = self.chat.told(answer_text(message)[:20])
        if message.get("reasoning_content"):
            return UserError(
                f"field reasoning_content: the chat template has no place for the thought before the answer {told!r}…",
                "take a model whose template has one (Qwen3), write the thought into the answer, or leave it out",
            )
        if message.get("tool_calls"):
            return UserError(
                f"field tool_calls: the chat template leaves out what the answer {told!r}… says beside its calls, or "
                "where the calls end is unclear",
                "leave out the text beside the calls, or put a chat_template.jinja beside the weights that writes it "
                "and ends calls with a special token",
            )
        return UserError(
            f"the chat template changes the answer {told!r}…, so what to train on is unclear",
            "take reasoning tags out of the answers, or put a chat_template.jinja beside the weights "
            "that keeps answers as they are",
        )


def _read_turns(chat: RenderedConversation, count: int) -> _Reader:
    """The first `count` messages up to their last answer, what the template puts after it included."""
    reader = _Reader(chat)
    for turn, message in enumerate(chat.messages[:count]):
        if message["role"] == "assistant":
            reader.read_prompt(chat.render(turn, _thinks(message), add_generation_prompt=True))
            reader.read_answer(turn)
    return reader


def _prompt_ids(chat: RenderedConversation, count: int, thinking: bool) -> list[int]:
    """Tokens of the first `count` messages up to where the next answer starts."""
    prompt = chat.render(count, thinking, add_generation_prompt=True)
    chat.refuse_lost_texts(prompt, count)
    try:
        reader = _read_turns(chat, count)
        reader.read_prompt(prompt)
        return reader.row.input_ids
    except (_HistoryRewrittenError, UserError):
        # Nor does training piece it together, where the template rewrites earlier turns or changes their answers.
        return chat.tokens(prompt)


def _thinks(answer: Message) -> bool:
    return begins_with_thought(answer_text(answer))


def _as_rendered(answer: str, rest: str) -> str | None:
    """How the answer stands at the start of `rest`, the text after its prompt; None where it does not."""
    thought = THOUGHT.fullmatch(answer)
    if thought is not None and begins_with_thought(answer):
        # A thought is set in line feeds of the template's own; its opening tag may stand in the prompt.
        proper = thought[2].rstrip()
        pattern = rf"(?:\s*<think>)?\s*{re.escape(thought[1].strip())}\s*</think>\s*{re.escape(proper.lstrip())}"
        rendered = re.match(pattern, rest)
        if rendered is None:
            return None
        blanks_after = thought[2][len(proper) :] if proper else ""
        forms = [blanks_after, blanks_after.rstrip("\n"), ""]
        return rendered[0] + next(form for form in forms if rest.startswith(form, rendered.end()))
    # Where the template puts the empty thought into the prompt, only what follows it is left.
    contents = [answer] if thought is None else [answer, thought[2]]
    # Templates trim blanks at either end (Qwen3's: line feeds in front); the longest form that stands there is it.
    forms = [form for content in contents for blanks in ("\n", None)
             for form in (content, content.lstrip(blanks), content.rstrip(blanks), content.strip(blanks))]  # fmt: skip
    return max((form for form in forms if rest.startswith(form)), key=len, default=None)
