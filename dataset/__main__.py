"""Prepare data for training: python -m dataset COMMAND …

COMMAND: novels, held_out, tokenizer, tokens, conversations, preferences or preview (`--help` for each).
"""

from __future__ import annotations

import importlib
import sys

from novelgpt.settings.commands import COMMANDS
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.signals import importing
from novelgpt.settings.terminal import say

MODULES = {
    "novels": "dataset.novels.command",
    "held_out": "dataset.novels.held_out.command",
    "tokenizer": "dataset.tokenizers.command",
    "tokens": "dataset.tokens_command",
    "conversations": "dataset.conversation_rows.command",
    "preferences": "dataset.preferences",
    "preview": "dataset.preview",
}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names, with the other arguments."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in ([], ["--help"], ["-h"]):
        width = max(map(len, MODULES))
        texts = {command.module: command.text for command in COMMANDS.values()}
        say(python_module("dataset COMMAND …"), "")
        say(*(f"  {name:<{width}}  {texts[f'dataset {name}']}" for name in MODULES))
        return
    if args[0] not in MODULES:
        raise UserError(f"no command {args[0]!r}", f"choose one of {', '.join(MODULES)}")
    with importing():  # only when needed: `novels` starts without the model libraries
        module = importlib.import_module(MODULES[args[0]])
    module.main(args[1:])


if __name__ == "__main__":
    main()
