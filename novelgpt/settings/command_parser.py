"""The parser of commands that take a few options of their own and load no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import python_module


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and whose paths may begin with `~` where the shell does not see it.

    Of a program that is named `python -m MODULE`, the interpreter is told in full.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        words = self.prog.removeprefix("python -m ")
        self.prog = self.prog if words == self.prog else python_module(words)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below a page of usage."""
        raise UserError(message, f"see `{self.prog} --help`")


def _path(text: str) -> Path:
    return Path(from_home(text))
