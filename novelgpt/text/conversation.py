"""Conversations to (input_ids, labels): the only maker of prompts and of loss masks, for training and prediction.

A conversation is cut into pieces of text by what the chat template renders for it: prompt, answer, what follows the
answer. Each piece is tokenised on its own, so that the tokens of a prompt are the same whether an answer follows (in
training) or is to be generated (in prediction), and the mask never depends on searching text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.text.encoding import encode
from novelgpt.text.templates import BAICHUAN_NAMES, USER_ID, record_thinking, template_record

IGNORED = -100
Message = dict[str, str]
# An answer that begins with a thought, as Qwen3 and its kin write them: (thought, answer proper).
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


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
        self.labels += ids if trained else [IGNORED] * len(ids)


class _HistoryRewrittenError(Exception):
    """The chat template renders earlier turns differently once later ones follow (Qwen3 drops old thoughts)."""


def encode_conversation(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[EncodedRow]:
    """Rows that train every assistant turn: decode(trained labels) == answer + end token, for each turn.

    One row as a rule. Where the template rewrites earlier turns, one row for each turn, each with the very prompt that
    prediction would use. Messages after the last answer are left out; a conversation without answers gives no row.

    An answer that begins with a thought (<think>…</think>) is trained with it, in the blanks that the template puts
    around thoughts. An empty thought is no part of an answer where the template puts it into the prompt.

    Raises:
        UserError: the template fails on the messages, or changes an answer beyond blanks at its ends.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    try:
        return [_read_turns(messages[: turns[-1] + 1], tokenizer).finish()]
    except _HistoryRewrittenError:
        rows = []
        for turn in turns:
            thinking = begins_with_thought(messages[turn]["content"])
            prompt = _render(messages[:turn], tokenizer, thinking, add_generation_prompt=True)
            reader = _Reader(tokenizer, prompt)
            reader.row.extend(encode_prompt(messages[:turn], tokenizer, thinking), trained=False)
            reader.read_answer(messages[: turn + 1])
            rows.append(reader.finish())
        return rows


def encode_prompt(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None
) -> list[int]:
    """Tokens up to where the next answer starts: exactly those that training saw before that answer.

    Args:
        messages: of the conversation so far.
        tokenizer: whose template is used.
        thinking: whether the answer may begin with a thought, for templates that prompt for it (Qwen3); by default,
            what most answers of the training did, and no thought where nothing is known of a training.
    """
    if thinking is None:
        thinking = bool(template_record(tokenizer).get("thinking", False))
    prompt = _render(messages, tokenizer, thinking, add_generation_prompt=True)
    try:
        reader = _read_turns(messages, tokenizer)
        reader.read_prompt(prompt)
        return reader.row.input_ids
    except (_HistoryRewrittenError, UserError):
        # Nor does training piece it together, where the template rewrites earlier turns or changes their answers.
        return encode(prompt, tokenizer)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens at which generation stops, sorted.

    The end of an answer in the template; the tokenizer's end token; with ChatML, <|endoftext|>, by which a base model
    ends texts; in Baichuan's formats the token that begins a question, since only a finished answer is followed by it.
    """
    probe = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    row = encode_conversation(probe, tokenizer)[0]
    last = [label for label in row.labels if label != IGNORED][-1]
    ends = {last, int(tokenizer.eos_token_id)}
    vocabulary = tokenizer.get_vocab()
    if last == vocabulary.get("<|im_end|>") and "<|endoftext|>" in vocabulary:
        ends.add(vocabulary["<|endoftext|>"])
    if template_record(tokenizer)["name"] in BAICHUAN_NAMES:
        ends.add(USER_ID)
    return sorted(ends)


def begins_with_thought(answer: str) -> bool:
    """Whether an answer begins with a thought of its own; an empty one is none."""
    thought = THOUGHT.fullmatch(answer)
    return thought is not None and bool(thought[1].strip("\n"))


def record_answers(conversations: Iterable[list[Message]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Note with the template whether most answers begin with a thought, for which later prompts then leave room."""
    thoughts = [
        begins_with_thought(message["content"])
        for messages in conversations
        for message in messages
        if message["role"] == "assistant"
    ]
    record_thinking(tokenizer, 2 * sum(thoughts) > len(thoughts))


@dataclass
class _Reader:
    """Takes up a conversation piece by piece.

    tokenizer: makes the tokens; rendered: text that has been read; row: its tokens; unended: whether the last answer
    still lacks its end token, as the template puts nothing there.
    """

    tokenizer: PreTrainedTokenizerBase
    rendered: str = ""
    row: EncodedRow = field(default_factory=lambda: EncodedRow([], []))
    unended: bool = False

    def read_prompt(self, prompt: str) -> None:
        """Go on to where an answer starts: `prompt` is all text before it."""
        if not prompt.startswith(self.rendered):
            raise _HistoryRewrittenError
        ids = encode(prompt[len(self.rendered) :], self.tokenizer)
        border = len(self.row.labels)
        self.row.extend(ids, trained=False)
        if self.unended and ids:
            self.row.labels[border] = int(self.tokenizer.eos_token_id)
            self.unended = False
        self.rendered = prompt

    def read_answer(self, messages: list[Message]) -> None:
        """Go on through the answer of the last message, its end token and what the template puts after."""
        content = messages[-1]["content"]
        full = _render(messages, self.tokenizer, begins_with_thought(content), add_generation_prompt=False)
        rest = full[len(self.rendered) :]
        answer = _as_rendered(content, rest)
        if not full.startswith(self.rendered) or answer is None:
            raise UserError(
                f"the chat template changes the answer {content[:20]!r}…, so what to train on is unclear",
                "take reasoning tags out of the answers, or put a chat_template.jinja beside the weights "
                "that keeps answers as they are",
            )
        self.finish()  # an answer right after an answer that the template does not end
        self.row.extend(encode(answer, self.tokenizer), trained=True)
        tail = encode(rest[len(answer) :], self.tokenizer)
        if tail:
            special = tail[0] in self.tokenizer.added_tokens_decoder
            self.row.extend([tail.pop(0) if special else int(self.tokenizer.eos_token_id)], trained=True)
            self.row.extend(tail, trained=False)
        self.unended = rest == answer
        self.rendered = full

    def finish(self) -> EncodedRow:
        """The row; an answer at its end that the template does not end gets its end token."""
        if self.unended:
            self.row.extend([int(self.tokenizer.eos_token_id)], trained=True)
            self.unended = False
        return self.row


def _read_turns(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> _Reader:
    """All up to the last answer, what the template puts after it included."""
    reader = _Reader(tokenizer)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            thinking = begins_with_thought(message["content"])
            reader.read_prompt(_render(messages[:index], tokenizer, thinking, add_generation_prompt=True))
            reader.read_answer(messages[: index + 1])
    return reader


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


def _render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, thinking: bool, add_generation_prompt: bool
) -> str:
    try:
        # enable_thinking: where it is off, the empty think block of Qwen3 stands in the prompt, outside the loss.
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=thinking
        )
    except Exception as error:
        roles = " ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses messages of the roles {roles!r}: {error}",
            "order the roles as the template wants, or give the tokenizer another template",
        ) from error
    assert isinstance(text, str)
    return text
