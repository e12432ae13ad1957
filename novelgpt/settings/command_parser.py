"""The argument parser of commands that have few options and load no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import python_module


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and whose paths may start with a `~` that the shell does not expand.

    A program `python -m MODULE` is shown with the full path of the interpreter.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.prog.startswith("python -m "):
            self.prog = python_module(self.prog.removeprefix("python -m "))
        self.register("type", Path, lambda text: Path(from_home(text)))

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print below its usage."""
        raise UserError(message, f"see `{self.prog} --help`")
