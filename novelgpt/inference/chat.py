"""A conversation with a model, or a text that it continues; answers stream, and the cache is reused.

    chat = Chat(model, tokenizer, generation)
    for text in chat.reply("你好"):
        ...

Prompts are those of training. A caller that may stop early closes the iterator, which ends the answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from novelgpt.inference.generation import answer_end_ids, generation_config
from novelgpt.inference.preallocated_cache import PreallocatedLayer, preallocated_cache
from novelgpt.inference.valid_text import ValidText
from novelgpt.model.loading import longest_row
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.run_record import pipeline_of
from novelgpt.settings.terminal import counted
from novelgpt.text.conversation import encode_prompt
from novelgpt.text.encoding import decode_answer, document_begin_ids, document_end_id, encode_document
from novelgpt.text.messages import Message
from novelgpt.text.templates import template_record
from novelgpt.text.token_bytes import BROKEN


class _History:
    """What was said so far.

    Args:
        tokenizer: of the model.
        context: max tokens of prompt and answer together.
        max_new_tokens: max tokens of an answer; at most half of the context is reserved for it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.max_new_tokens = max_new_tokens
        self.prompt_room = context - min(max_new_tokens, context // 2)

    def answer_room(self, prompt: list[int]) -> int:
        """Max tokens of the answer to a prompt."""
        return min(self.max_new_tokens, self.context - len(prompt))


class ChatHistory(_History):
    """The messages of a conversation, and the prompts made from them.

    Attributes:
        messages: the conversation so far, which starts with the system message if there is one; after `ask`, the last
            message is the question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int, system: str = "") -> None:
        super().__init__(tokenizer, context, max_new_tokens)
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages: list[Message] = list(self.opening)

    def ask(self, question: str) -> tuple[list[int], int]:
        """Add a question.

        Returns:
            Token ids of the prompt, and how many of the oldest turns were dropped to make it fit.

        Raises:
            UserError: the question does not fit even alone; it is not added then.
        """
        turns = self.messages[len(self.opening) :]
        starts = [index for index, message in enumerate(turns) if message["role"] == "user"]
        for dropped, start in enumerate([*starts, len(turns)]):
            kept: list[Message] = [*self.opening, *turns[start:], {"role": "user", "content": question}]
            prompt = encode_prompt(kept, self.tokenizer)
            if len(prompt) <= self.prompt_room:
                self.messages = kept
                return prompt, dropped
        raise UserError(
            f"the question takes {counted(len(prompt), 'token')} with the system message, and {self.prompt_room} fit",
            f"shorten it, or lower --max_new_tokens {self.max_new_tokens}",
        )

    def add_answer(self, text: str) -> None:
        """Add the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})


class TextHistory(_History):
    """A text without any chat template and its continuation so far, and the prompts made from them.

    Attributes:
        text: everything so far.
    """

    text = ""

    def clear(self) -> None:
        """Forget the text."""
        self.text = ""

    def ask(self, text: str) -> tuple[list[int], int]:
        """Start a new text; "" continues the last one.

        Returns:
            Token ids of the prompt, and how many tokens at the start of the text were dropped to make it fit.
        """
        self.text = text or self.text
        ids = encode_document(self.text, self.tokenizer)
        dropped = max(0, len(ids) - self.prompt_room)
        begin = document_begin_ids(self.tokenizer) if dropped else []  # which the model has seen before every text
        return begin + ids[len(begin) + dropped :], dropped

    def add_answer(self, text: str) -> None:
        """Append the continuation."""
        self.text += text


class StreamedText(BaseStreamer):
    """Passes on the text of generated tokens, each character once it is complete.

    Args:
        tokenizer: of the model.
        ends: tokens that end an answer and have no text.
        emit: called with each part of the text.

    Attributes:
        text: the answer so far.
        tokens: of the answer so far, without the ones that end it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int], emit: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.emit = emit
        self.text = ""
        self.tokens: list[int] = []
        self.emitted = 0
        # Text is decoded from `start`, a few tokens before the first one that was not decoded yet (`decoded`): some
        # tokenizers decode a token depending on those before it, and decoding everything each time gets ever slower.
        self.start = 0
        self.decoded = 0
        self.in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt ([1, tokens], once, skipped), then each new token ([1])."""
        if self.in_prompt:
            self.in_prompt = False
            return
        self.tokens += [token for token in value.flatten().tolist() if token not in self.ends]
        if not decode_answer(self.tokens[self.start :], self.tokenizer, self.ends).endswith(BROKEN):
            self._decode()
            # "\r" stays with what follows: a line end of two characters is not split.
            self._emit(len(self.text.removesuffix("\r")))

    def end(self) -> None:
        """Pass on the rest, without the bytes of a character that a limit or the reader cut."""
        self._decode()
        self.text = self.text.rstrip(BROKEN)
        self._emit(len(self.text))

    def _decode(self) -> None:
        known = decode_answer(self.tokens[self.start : self.decoded], self.tokenizer, self.ends)
        self.text += decode_answer(self.tokens[self.start :], self.tokenizer, self.ends)[len(known) :]
        self.start, self.decoded = self.decoded, len(self.tokens)

    def _emit(self, end: int) -> None:
        if end > self.emitted:
            self.emit(self.text[self.emitted : end])
            self.emitted = end


class Chat:
    """A model that answers in a conversation, or continues a text.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        generation: how tokens are chosen, without beams; the caller sets the seed.
        system: first message of a conversation; "" for none.
        raw_text: continue a text, without the chat template.

    Attributes:
        context: max tokens of prompt and answer together.
        history: what was said so far.
        dropped: turns, or tokens of the text, that no longer fit into the prompt of the last reply.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationArguments,
        system: str = "",
        raw_text: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.generation = generation
        self.context = longest_row(model.config) or int(tokenizer.model_max_length)
        self.ends = answer_end_ids(model, tokenizer)
        self.history: ChatHistory | TextHistory
        if raw_text:
            self.history = TextHistory(tokenizer, self.context, generation.max_new_tokens)
            self.ends = sorted({*self.ends, document_end_id(tokenizer)})
        else:
            self.history = ChatHistory(tokenizer, self.context, generation.max_new_tokens, system)
        self.dropped = 0
        self._cache: DynamicCache | None = None
        self._cached: list[int] = []  # token ids in the cache

    def reply(self, message: str) -> Generator[str, None, None]:
        """Answer a message; "" continues the last text. The history keeps the answer as far as it got.

        Returns:
            Parts of the answer, as they are generated.

        Raises:
            UserError: the message does not fit into the context; nothing is kept then.
        """
        prompt, self.dropped = self.history.ask(message)
        return self._stream(prompt)

    def _stream(self, prompt: list[int]) -> Generator[str, None, None]:
        parts: SimpleQueue[str | None] = SimpleQueue()
        stopped = threading.Event()
        streamed = StreamedText(self.tokenizer, self.ends, parts.put)

        @torch.inference_mode()
        def generate() -> None:
            try:
                self._generate(prompt, streamed, stopped)
            finally:
                parts.put(None)

        try:
            with ThreadPoolExecutor(1) as pool:
                generated = pool.submit(generate)
                try:
                    yield from iter(parts.get, None)
                finally:
                    stopped.set()
            generated.result()
        finally:
            self.history.add_answer(streamed.text)

    def _generate(self, prompt: list[int], streamed: StreamedText, stopped: threading.Event) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        generation = replace(self.generation, max_new_tokens=self.history.answer_room(prompt))
        cache, self._cache = self._reusable_cache(prompt), None
        self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=generation_config(generation, self.ends, int(self.tokenizer.pad_token_id)),
            logits_processor=LogitsProcessorList([ValidText(self.tokenizer)]),
            streamer=streamed,
            stopping_criteria=StoppingCriteriaList(
                [lambda rows, *_, **__: torch.full((len(rows),), stopped.is_set(), device=rows.device)]  # type: ignore[list-item]
            ),
            past_key_values=cache,
        )
        if cache is not None:
            self._cache, self._cached = cache, (prompt + streamed.tokens)[: cache.get_seq_length()]

    def _reusable_cache(self, prompt: list[int]) -> DynamicCache | None:
        """The cache of the last reply, cut to the tokens that start this prompt as well; else an empty one."""
        shared = len(os.path.commonprefix([self._cached, prompt[:-1]]))
        cache = self._cache
        if cache is None or not shared or not all(isinstance(layer, PreallocatedLayer) for layer in cache.layers):
            return preallocated_cache(self.model, self.context)
        if shared < len(self._cached):
            cache.crop(shared - len(self._cached))
        return cache


def continues_text(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has only seen raw text, as far as its folder shows, so that it cannot hold a conversation.

    This holds after continued pretraining, and for bases without a chat template of their own; not for anything that
    was fine-tuned on conversations.
    """
    pipeline = pipeline_of(folder)
    if pipeline:
        return pipeline == "pretrain"
    record = template_record(tokenizer)
    return record["name"] != "own" and "thinking" not in record  # which training on conversations records
