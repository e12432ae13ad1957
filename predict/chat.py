"""Talk to a checkpoint, an adapter or a base in the terminal, or let it continue a text.

    python -m predict.chat [--model FOLDER] [--mode chat|text]

Prompts are those of training, and answers are streamed.
"""

from __future__ import annotations

import io
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from transformers import set_seed

from novelgpt.inference.chat import Chat, TextHistory, continues_text
from novelgpt.inference.loading import load_for_inference, with_default_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, InferenceModelArguments, option
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.terminal import counted, say, say_text
from novelgpt.text.templates import template_record

COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
TEXT_COMMANDS = (
    "a line starts a text to continue, an empty line continues it; /exit or Ctrl-D ends, Ctrl-C stops a text"
)


@dataclass
class ChatArguments:
    """How to talk."""

    _argument_group_name: ClassVar[str] = "Chat"

    mode: Literal["auto", "chat", "text"] = option(
        "auto",
        "chat: a conversation, in the model's chat template. text: the model continues what you type, without a "
        "template. auto: text for checkpoints of `pretrain` and for bases without a chat template of their own.",
    )
    system: str = option("", "System message that every conversation starts with; none by default.")


@dataclass
class ChatGenerationArguments(GenerationArguments):
    """Answers are sampled, as greedy ones are dull and tend to loop."""

    max_new_tokens: int = option(1024, "Longest answer, in tokens.")
    do_sample: bool = option(True, "Sample tokens instead of always taking the most likely one.")
    repetition_penalty: float = option(1.05, "Above 1 makes tokens that occurred before less likely.")


@dataclass
class ChatRun:
    """A conversation in the terminal."""

    pipeline: ClassVar[str] = "predict.chat"
    model: InferenceModelArguments
    chat: ChatArguments
    generation: ChatGenerationArguments


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Talk until the input ends."""
    run = parse_arguments(ChatRun, argv)
    if run.generation.num_beams > 1:
        raise UserError("beam search gives no token before the whole answer is done", "leave --num_beams at 1")
    chosen = with_default_model(run.model)
    tokenizer = load_tokenizer(chosen)
    is_text = run.chat.mode == "text"
    if is_text and run.chat.system:
        raise UserError("--system is a message of a conversation, and --mode text has none", "leave one of them out")
    if run.chat.mode == "auto":
        is_text = not run.chat.system and continues_text(Path(chosen.model), tokenizer)
    model = load_for_inference(chosen, tokenizer, chosen.base)
    set_seed(run.generation.seed)
    chat = Chat(model, tokenizer, run.generation, run.chat.system, is_text)
    commands = TEXT_COMMANDS if is_text else COMMANDS
    kind = "raw text (--mode chat asks questions)" if is_text else f"template {template_record(tokenizer)['name']}"
    say(f"{Path(chosen.model).name}, {kind}, {chat.context:,} tokens: {commands}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a lone surrogate must not end the chat
    while (question := _read_line()) is not None:
        command = question.strip()
        if command == "/exit":
            break
        if command == "/clear":
            chat.history.clear()
            say("(forgotten)")
        elif command.startswith("/"):
            say(f"({commands})")
        elif command or (isinstance(chat.history, TextHistory) and chat.history.text):
            try:
                _print_reply(chat, question if command else "")
            except KeyboardInterrupt:
                say("", "(stopped)")


def _read_line() -> str | None:
    """The user's line; None at the end of the input. Ctrl-C drops the line and shows the commands."""
    try:
        return input("\n> ")
    except KeyboardInterrupt:
        say("")
        return "/"
    except EOFError:
        say("")
        return None


def _print_reply(chat: Chat, question: str) -> None:
    try:
        reply = chat.reply(question)
    except UserError as error:
        say(f"({error.cause}; {error.remedy})")
        return
    if chat.dropped and isinstance(chat.history, TextHistory):
        say(f"(the text no longer fits: dropped, from its start, {counted(chat.dropped, 'token')})")
    elif chat.dropped:
        say(f"(the conversation no longer fits: forgotten, oldest first, {counted(chat.dropped, 'turn')})")
    with closing(reply):
        for text in reply:
            say_text(text, end="")
    say("")


if __name__ == "__main__":
    main()
