"""`novelgpt COMMAND …`, in a checkout `python -m cli COMMAND …`: passes the arguments to the command's module.

The table of commands is `novelgpt.settings.commands`. A module is imported only when its command is called, so that
help appears at once.
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
    """Run the command that this process was started with."""
    note_program(Path(sys.argv[0]))
    run(sys.argv[1:])


@exit_on_user_error
def run(argv: list[str] | None = None) -> None:
    """Pass the arguments after a command's name to its module.

    Raises:
        UserError: there is no such command.
    """
    args = list(argv or [])
    if args[:1] == ["--version"]:
        say(f"novelgpt {__version__}")
        return
    if not args or args[0] in HELP:
        _show_help()
        return
    for count in (2, 1):
        if command := COMMANDS.get(" ".join(args[:count])):
            _call(command, args[count:])
            return
    if args[0] in GROUPS and (len(args) == 1 or args[1] in HELP):
        _show_help(args[0])
        return
    known = {name: name for name in COMMANDS} | {command.module: command.name for command in COMMANDS.values()}
    typed = " ".join(args[: 2 if args[0] in GROUPS else 1])
    nearest = known[difflib.get_close_matches(typed, known, n=1, cutoff=0.0)[0]]
    raise UserError(f"no command {typed!r}; the nearest is {nearest!r}", f"see `{program_name()} --help`")


def _call(command: Command, args: list[str]) -> None:
    if command.module in SCRIPTS:
        from novelgpt.launch.start import start  # imported late: help does not need it

        start(command.module, args)  # replaces this process
    name, *before = command.module.split()
    with importing():
        module = importlib.import_module(name)
        if "__path__" in vars(module):
            module = importlib.import_module(f"{name}.__main__")
    module.main([*before, *args])


def _show_help(group: str | None = None) -> None:
    """Print the commands with their descriptions, or only those of a group."""
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
