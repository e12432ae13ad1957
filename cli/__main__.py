"""`novelgpt COMMAND …`, in a checkout `python -m cli COMMAND …`: hands the words to the module behind the command.

The table of commands is `novelgpt.settings.commands`. A module is imported when its command is called for, so that the
page of help is there at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

from novelgpt import __version__
from novelgpt.settings.commands import COMMANDS, SECTIONS, Command
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import SCRIPTS, note_program, program_name
from novelgpt.settings.signals import importing
from novelgpt.settings.terminal import say

HELP = ("--help", "-h", "help")
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))


def main() -> None:
    """Run the command that the words of this process name."""
    note_program(Path(sys.argv[0]))
    run(sys.argv[1:])


@exit_on_user_error
def run(argv: list[str] | None = None) -> None:
    """Hand the words behind a command's name to its module.

    Raises:
        UserError: there is no such command.
    """
    words = list(argv or [])
    if words[:1] == ["--version"]:
        say(f"novelgpt {__version__}")
        return
    if not words or words[0] in HELP:
        _show_help()
        return
    for count in (2, 1):
        command = COMMANDS.get(" ".join(words[:count]))
        if command is not None:
            _call(command, words[count:])
            return
    if words[0] in GROUPS and (len(words) == 1 or words[1] in HELP):
        _show_help(words[0])
        return
    raise _unknown(words)


def _call(command: Command, words: list[str]) -> None:
    if command.module in SCRIPTS:
        from novelgpt.launch.start import start  # not before: pages of help need none of it

        start(command.module, words)  # in place of this process
    name, *before = command.module.split()
    with importing():
        module = importlib.import_module(name)
        if "__path__" in vars(module):
            module = importlib.import_module(f"{name}.__main__")
    module.main([*before, *words])


def _unknown(words: list[str]) -> UserError:
    """The error for words that are no command, naming the nearest one."""
    known = {name: name for name in COMMANDS} | {command.module: command.name for command in COMMANDS.values()}
    typed = " ".join(words[: 2 if words[0] in GROUPS else 1])
    nearest = known[difflib.get_close_matches(typed, known, n=1, cutoff=0.0)[0]]
    return UserError(f"no command {typed!r}; the nearest is {nearest!r}", f"see `{program_name()} --help`")


def _show_help(group: str | None = None) -> None:
    """The commands with what they do; of a group, its own alone."""
    say(f"{program_name()} {f'{group} ' if group else ''}COMMAND [--option value …]")
    width = max(map(len, COMMANDS))
    for heading, section in SECTIONS.items():
        shown = [command for command in section if group in (None, command.name.split()[0])]
        if shown:
            say("", f"{heading}:", *(f"  {command.name:<{width}}  {command.text}" for command in shown))
    name = program_name()
    say("", f"`{name} COMMAND --help` lists the options of a command, `{name} --version` shows the version.")


if __name__ == "__main__":
    main()
