"""The parser of commands that take a few options of their own and load no model."""

from __future__ import annotations

import argparse
from typing import NoReturn

from novelgpt.settings.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below a page of usage."""
        raise UserError(message, f"see `{self.prog} --help`")
