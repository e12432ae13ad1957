"""Data before training: python -m dataset novels | tokens | conversations | preview … (`--help` for each)."""

from __future__ import annotations

import sys

from novelgpt.settings import commands
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.signals import importing
from novelgpt.settings.terminal import say

COMMANDS = {
    command.module.removeprefix("dataset "): command.text
    for command in commands.COMMANDS.values()
    if command.module.startswith("dataset ")
}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Hand the words behind the first to the command it names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["--help"], ["-h"]):
        width = max(map(len, COMMANDS))
        say(python_module("dataset COMMAND …"), "")
        say(*(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))
        return
    command, *rest = words
    # Imported when called for: a command that needs no model library starts without it.
    with importing():
        if command == "novels":
            from dataset.novels.command import main as run
        elif command == "tokens":
            from dataset.tokens_command import main as run
        elif command == "conversations":
            from dataset.conversation_rows.command import main as run
        elif command == "preview":
            from dataset.preview import main as run
        else:
            raise UserError(f"no command {command!r}", f"take one of {', '.join(COMMANDS)}")
    run(rest)


if __name__ == "__main__":
    main()
