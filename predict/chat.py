"""Talk to a checkpoint, an adapter or a base in the terminal, or let it go on with a text.

    python -m predict.chat [--model FOLDER] [--mode chat|text]

Prompts are those of training, and answers appear while they are made.
"""

from __future__ import annotations

import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from novelgpt.inference.generation import answer_end_ids
from novelgpt.inference.loading import load_for_inference, with_default_model
from novelgpt.model.loading import longest_row
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, InferenceModelArguments, ModelArguments, option
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.terminal import counted, say, say_text
from novelgpt.text.conversation import Message, encode_prompt
from novelgpt.text.encoding import answer_text, document_end_id
from novelgpt.text.statistics import BROKEN
from novelgpt.text.templates import template_record
from predict.raw_text import RawText, continues_text

COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
TEXT_COMMANDS = "a line begins a text to go on with, an empty line goes on; /exit or Ctrl-D ends, Ctrl-C stops a text"


@dataclass
class ChatArguments:
    """How to talk."""

    _argument_group_name: ClassVar[str] = "Chat"

    mode: Literal["auto", "chat", "text"] = option(
        "auto",
        "chat: a conversation, in the model's chat template. text: the model goes on with what you type, without any "
        "marks. auto: text for checkpoints of `pretrain` and for bases without a chat template of their own.",
    )
    system: str = option("", "System message that every conversation starts with; none by default.")


@dataclass
class ChatGenerationArguments(GenerationArguments):
    """Answers are drawn, as the likeliest tokens alone make dull talk that tends to go round in circles."""

    max_new_tokens: int = option(1024, "Longest answer, in tokens.")
    do_sample: bool = option(True, "Draw tokens at random instead of always taking the likeliest.")
    repetition_penalty: float = option(1.05, "Above 1 makes tokens that were seen before less likely.")


@dataclass
class ChatRun:
    """A conversation in the terminal."""

    pipeline: ClassVar[str] = "predict.chat"
    model: InferenceModelArguments
    chat: ChatArguments
    generation: ChatGenerationArguments


class Chat:
    """The history of a conversation, and the prompts it makes.

    Args:
        tokenizer: of the model.
        context: tokens that the model takes, prompt and answer together.
        max_new_tokens: longest answer; at most half of the context is kept free for it.
        system: message that the conversation starts with; "" for none.

    Attributes:
        messages: the conversation so far; after `ask`, its last message is the question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int, system: str = "") -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.max_new_tokens = max_new_tokens
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self.clear()

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self.opening)

    def ask(self, question: str) -> tuple[list[int], int]:
        """Add a question.

        Returns:
            Tokens of the prompt, and how many of the oldest turns were forgotten to make it fit.

        Raises:
            UserError: the question does not fit even alone; it is not added then.
        """
        room = self.context - min(self.max_new_tokens, self.context // 2)
        asked: Message = {"role": "user", "content": question}
        turns = self.messages[len(self.opening) :]
        questions = [index for index, message in enumerate(turns) if message["role"] == "user"]
        for forgotten, start in enumerate([*questions, len(turns)]):
            kept = [*self.opening, *turns[start:], asked]
            prompt = encode_prompt(kept, self.tokenizer)
            if len(prompt) <= room:
                self.messages = kept
                return prompt, forgotten
        raise UserError(
            f"the question takes {counted(len(prompt), 'token')} with the system message, and {room} fit",
            f"shorten it, or lower --max_new_tokens {self.max_new_tokens}",
        )

    def answer_room(self, prompt: list[int]) -> int:
        """Most tokens that the answer to a prompt may have."""
        return min(self.max_new_tokens, self.context - len(prompt))

    def answered(self, text: str) -> None:
        """Add the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})


class StreamedText(BaseStreamer):
    """Takes tokens one by one and prints the text they make, each character once it is whole.

    Args:
        tokenizer: of the model.
        ends: tokens that end an answer, which are not printed.

    Attributes:
        text: the answer so far, of which all but what steers a terminal is printed as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.text = ""
        self.printed = 0
        self.tokens: list[int] = []
        # Text is decoded from `start`, a few tokens before those not yet shown, which begin at `shown`: some
        # tokenizers decode a token by what comes before it, and decoding all each time would take ever longer.
        self.start = 0
        self.shown = 0
        self.in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt ([1, tokens], once, not shown), then each new token ([1])."""
        if self.in_prompt:
            self.in_prompt = False
            return
        self.tokens += [token for token in value.flatten().tolist() if token not in self.ends]
        if not self._decode(self.start, len(self.tokens)).endswith(BROKEN):
            self._show()

    def end(self) -> None:
        """Show what is left: bytes that never became a character."""
        self._show()
        say_text(self.text[self.printed :], end="")

    def _show(self) -> None:
        shown = self._decode(self.start, self.shown)
        new = self._decode(self.start, len(self.tokens))[len(shown) :]
        self.start, self.shown = self.shown, len(self.tokens)
        self.text += new
        ready = len(self.text.removesuffix("\r"))  # which ends a line together with what follows, or steers
        say_text(self.text[self.printed : ready], end="")
        self.printed = ready

    def _decode(self, begin: int, end: int) -> str:
        return answer_text(self.tokens[begin:end], self.tokenizer, self.ends)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Talk until the input ends."""
    run = parse_arguments(ChatRun, argv)
    if run.generation.num_beams > 1:
        raise UserError("beam search gives no token before the whole answer is done", "leave --num_beams at 1")
    chosen = with_default_model(run.model)
    tokenizer = load_tokenizer(chosen)
    is_text = _is_text(run.chat, chosen, tokenizer)
    model = load_for_inference(chosen, tokenizer, chosen.base)
    set_seed(run.generation.seed)
    context = longest_row(model.config) or int(tokenizer.model_max_length)
    longest = run.generation.max_new_tokens
    chat = RawText(tokenizer, context, longest) if is_text else Chat(tokenizer, context, longest, run.chat.system)
    commands = TEXT_COMMANDS if is_text else COMMANDS
    kind = "raw text (--mode chat asks questions)" if is_text else f"template {template_record(tokenizer)['name']}"
    say(f"{Path(chosen.model).name}, {kind}, {context:,} tokens: {commands}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # half a character is no reason to end
    while (question := _read_line()) is not None:
        command = question.strip()
        if command == "/exit":
            break
        if command == "/clear":
            chat.clear()
            say("(forgotten)")
        elif command.startswith("/"):
            say(f"({commands})")
        elif command or (isinstance(chat, RawText) and chat.text):
            try:
                _answer(chat, question if command else "", model, run.generation)
            except KeyboardInterrupt:
                say("", "(stopped)")


def _is_text(chosen: ChatArguments, model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model goes on with raw text."""
    if chosen.mode == "text" and chosen.system:
        raise UserError("--system is a message of a conversation, and --mode text has none", "leave one of them out")
    if chosen.mode == "auto":
        return not chosen.system and continues_text(Path(model.model), tokenizer)
    return chosen.mode == "text"


def _read_line() -> str | None:
    """What the user wrote; None at the end of the input. Ctrl-C drops the line and asks what can be typed."""
    try:
        return input("\n> ")
    except KeyboardInterrupt:
        say("")
        return "/"
    except EOFError:
        say("")
        return None


def _answer(chat: Chat | RawText, question: str, model: PreTrainedModel, generation: GenerationArguments) -> None:
    """Print the answer while it is made, and keep it, as far as it got."""
    try:
        prompt, forgotten = chat.ask(question)
    except UserError as error:
        say(f"({error.cause}; {error.remedy})")
        return
    if forgotten and isinstance(chat, RawText):
        say(f"(the text no longer fits: not read, from its beginning on, {counted(forgotten, 'token')})")
    elif forgotten:
        say(f"(the conversation no longer fits: forgotten, from the oldest on, {counted(forgotten, 'turn')})")
    ends = answer_end_ids(model, chat.tokenizer)
    if isinstance(chat, RawText):
        ends = sorted({*ends, document_end_id(chat.tokenizer)})
    streamed = StreamedText(chat.tokenizer, ends)
    config = _generation_config(generation, chat.answer_room(prompt), ends, int(chat.tokenizer.pad_token_id))
    ids = torch.tensor([prompt], device=model.device)
    try:
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamed
            )
    finally:
        chat.answered(streamed.text)
    say("")


def _generation_config(
    generation: GenerationArguments, max_new_tokens: int, ends: list[int], pad: int
) -> GenerationConfig:
    """Only what the user chose; the settings of draws only where answers are drawn."""
    options: dict[str, Any] = asdict(generation) | {"max_new_tokens": max_new_tokens}
    options.pop("seed")
    if not generation.do_sample:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    return GenerationConfig(**options, eos_token_id=ends, pad_token_id=pad, use_cache=True)


if __name__ == "__main__":
    main()
