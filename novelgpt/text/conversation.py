"""Conversations to (input_ids, labels): the only maker of prompts and of loss masks, for training and prediction.

A conversation is cut into segments of the text that the chat template renders for it: prompt, answer, what follows the
answer. Each segment is tokenized on its own, so that the tokens of a prompt are the same whether an answer follows (in
training) or is to be generated (in prediction), and the mask never depends on searching text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.text.messages import OWN_THOUGHT, THOUGHT, Message
from novelgpt.text.rendering import RenderedConversation
from novelgpt.text.templates import BAICHUAN_NAMES, USER_ID, template_record

IGNORE_INDEX = -100


@dataclass
class EncodedRow:
    """One training row.

    input_ids: [tokens]; labels: [tokens], not shifted, equal to input_ids where trained, else -100. With one exception:
    where a template puts nothing after an answer (Baichuan2), the label at the token after it, which begins the next
    question, is the end token, while the input there stays what it is. So the answer's last token learns to end, and
    the trained labels still read: answer, end token.

    loss_weights: [tokens], the factor of each label's loss, 0 where there is no label; None where no factor is other
    than 0 and 1.

    source: file and row that it came from, as errors name them.
    """

    input_ids: list[int]
    labels: list[int]
    loss_weights: list[float] | None = None
    source: str = field(default="", compare=False)


class _HistoryRewrittenError(Exception):
    """The chat template renders earlier turns differently once later ones follow (Qwen3 drops old thoughts)."""


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()
) -> list[EncodedRow]:
    """Rows that train every assistant turn: decode(trained labels) == answer + end token, for each turn.

    One row as a rule. Where the template rewrites earlier turns, one row for each turn, each with the very prompt that
    prediction would use. Messages after the last answer are left out; a conversation without answers gives no row.
    Answers of weight 0 are context; the tokens of an answer, its end token among them, have its weight.

    An answer that starts with a thought (<think>…</think>, or "reasoning_content") is trained with it, in the line
    feeds that the template puts around thoughts. An empty thought is not part of an answer where the template puts it
    into the prompt. The calls of an answer are trained as the template writes them. A special token that a text spells
    is text.

    Args:
        messages: in order.
        tokenizer: whose template is used.
        tools: that the assistant may call, as templates take them.

    Raises:
        UserError: the template fails on the messages, has no place for tools or calls, or changes an answer beyond
            whitespace at its ends.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    chat = RenderedConversation(messages[: turns[-1] + 1], tokenizer, tools)
    try:
        row, rendered = _encode_turns(chat, turns)
        if chat.instructions:
            chat.refuse_lost_texts(rendered, turns[-1] + 1)
        return [row]
    except _HistoryRewrittenError:
        trained = [turn for turn in turns if chat.weights[turn]] or turns[-1:]
        thinking = {turn: OWN_THOUGHT.match(chat.answers[turn]) is not None for turn in trained}
        return [_encode_turns(chat, [turn], prompt=_prompt_ids(chat, turn, thinking[turn]))[0] for turn in trained]


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

    The end of an answer in the template; the tokenizer's end token; with ChatML, <|endoftext|>, with which a base model
    ends texts; in Baichuan's formats the token that begins a question, since only a finished answer is followed by it.
    """
    probe: list[Message] = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    last = [label for label in encode_conversation(probe, tokenizer)[0].labels if label != IGNORE_INDEX][-1]
    ends = {last, int(tokenizer.eos_token_id)}
    vocabulary = tokenizer.get_vocab()
    if last == vocabulary.get("<|im_end|>") and "<|endoftext|>" in vocabulary:
        ends.add(vocabulary["<|endoftext|>"])
    if template_record(tokenizer)["name"] in BAICHUAN_NAMES:
        ends.add(USER_ID)
    return sorted(ends)


def _encode_turns(
    chat: RenderedConversation, turns: Sequence[int], asks: bool | None = None, prompt: list[int] | None = None
) -> tuple[EncodedRow, str]:
    """Encode a conversation through one answer after the other.

    Args:
        chat: the conversation.
        turns: numbers of the messages that are answers, in order.
        asks: if given, the row ends where the last answer of `turns` would start, and this says whether it may think.
        prompt: tokens of all before the first of `turns`, where the template rewrites earlier turns; by default, the
            row is encoded from the start of the conversation.

    Returns:
        the row, and the text that was rendered for it.

    Raises:
        UserError: the template fails on the messages, or changes an answer.
        _HistoryRewrittenError: a turn cannot follow the text of those before.
    """
    end_id = int(chat.tokenizer.eos_token_id)
    input_ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    rendered = ""
    weight = 1.0  # of the last answer
    end_label: int | None = None  # of the end token that the last answer lacks, as the template puts nothing there
    for turn in turns:
        is_prompt = asks is not None and turn == turns[-1]
        thinking = bool(asks) if is_prompt else OWN_THOUGHT.match(chat.answers[turn]) is not None
        before = chat.render(chat.messages[:turn], thinking, add_generation_prompt=True)
        if not before.startswith(rendered):
            raise _HistoryRewrittenError
        ids = chat.tokens(before[len(rendered) :]) if prompt is None else prompt
        if end_label is not None and not ids:  # an answer right after an answer
            ids = [end_id]
        input_ids += ids
        labels += [IGNORE_INDEX] * len(ids)
        weights += [0.0] * len(ids)
        if end_label is not None:
            labels[-len(ids)], weights[-len(ids)] = end_label, weight
        if is_prompt:
            return EncodedRow(input_ids, labels), before
        rendered = chat.render(chat.messages[: turn + 1], thinking)
        rest = rendered[len(before) :]
        answer: str | None = chat.answers[turn]
        if chat.messages[turn].get("tool_calls"):
            answer = _calls_as_rendered(chat, turn, rest)
        elif thinking or not rest.startswith(chat.answers[turn]):
            answer = _as_rendered(chat.answers[turn], rest)
        if answer is None or not rendered.startswith(before):
            raise _changed_answer(chat, turn)
        ids = chat.tokens(answer)
        tail = chat.tokens(rest[len(answer) :])
        if tail:
            ids.append(tail.pop(0) if tail[0] in chat.special.added_ids else end_id)
        input_ids += ids + tail
        weight = chat.weights[turn]
        labels += [*(ids if weight else [IGNORE_INDEX] * len(ids)), *[IGNORE_INDEX] * len(tail)]
        weights += [*[weight] * len(ids), *[0.0] * len(tail)]
        end_label = None
        if rest == answer:
            end_label = end_id if weight else IGNORE_INDEX
    if end_label is not None:
        input_ids.append(end_id)
        labels.append(end_label)
        weights.append(weight)
    weighted = any(chat.weights[turn] not in (0, 1) for turn in turns)
    return EncodedRow(input_ids, labels, weights if weighted else None), rendered


def _prompt_ids(chat: RenderedConversation, count: int, thinking: bool) -> list[int]:
    """Tokens of the first `count` messages up to where the next answer starts."""
    try:
        row, prompt = _encode_turns(chat, [*(turn for turn in chat.answers if turn < count), count], asks=thinking)
        ids = row.input_ids
    except (_HistoryRewrittenError, UserError):
        # Nor does training encode it turn by turn, where the template rewrites earlier turns or changes their answers.
        prompt = chat.render(chat.messages[:count], thinking, add_generation_prompt=True)
        ids = chat.tokens(prompt)
    if chat.instructions:
        chat.refuse_lost_texts(prompt, count)
    return ids


def _as_rendered(answer: str, rest: str) -> str | None:
    """How the template writes the answer at the start of `rest`, the text after its prompt; None where it does not."""
    thought = THOUGHT.fullmatch(answer)
    if thought is not None and OWN_THOUGHT.match(answer):
        # The template sets a thought in line feeds of its own; the opening tag may stand in the prompt.
        proper = thought[2].rstrip()
        pattern = rf"(?:\s*<think>)?\s*{re.escape(thought[1].strip())}\s*</think>\s*{re.escape(proper.lstrip())}"
        rendered = re.match(pattern, rest)
        if rendered is None:
            return None
        trailing = thought[2][len(proper) :] if proper else ""
        forms = [trailing, trailing.rstrip("\n"), ""]
        return rendered[0] + next(form for form in forms if rest.startswith(form, rendered.end()))
    # Where the template puts the empty thought into the prompt, only what follows it is left.
    contents = [answer] if thought is None else [answer, thought[2]]
    # Templates trim whitespace at either end (Qwen3's: leading line feeds); the longest form found there is it.
    forms = [form for content in contents for ends in ("\n", None)
             for form in (content, content.lstrip(ends), content.rstrip(ends), content.strip(ends))]  # fmt: skip
    return max((form for form in forms if rest.startswith(form)), key=len, default=None)


def _calls_as_rendered(chat: RenderedConversation, turn: int, rest: str) -> str | None:
    """Thought, text and calls of an answer as the template writes them: all before the token that ends the answer.

    None where no special token ends it, or the text is not there.
    """
    specials = list(chat.special.pattern.finditer(rest))
    if not specials or rest[specials[-1].end() :].strip():
        return None
    answer = rest[: specials[-1].start()]
    said = chat.answers[turn].strip()
    return answer if not said or _as_rendered(said, answer) is not None else None


def _changed_answer(chat: RenderedConversation, turn: int) -> UserError:
    answer = chat.answers[turn][:20].translate(chat.spelled)
    if chat.messages[turn].get("reasoning_content"):
        return UserError(
            f"field reasoning_content: the chat template has no place for the thought before the answer {answer!r}…",
            "take a model whose template has one (Qwen3), write the thought into the answer, or leave it out",
        )
    if chat.messages[turn].get("tool_calls"):
        return UserError(
            f"field tool_calls: the chat template leaves out what the answer {answer!r}… says beside its calls, or "
            "where the calls end is unclear",
            "leave out the text beside the calls, or put a chat_template.jinja beside the weights that writes it "
            "and ends calls with a special token",
        )
    return UserError(
        f"the chat template changes the answer {answer!r}…, so what to train on is unclear",
        "take reasoning tags out of the answers, or put a chat_template.jinja beside the weights "
        "that keeps answers as they are",
    )
