"""Command line and YAML into the groups of a run. The command line wins; an unknown key is an error."""

from __future__ import annotations

import argparse
import difflib
import sys
import typing
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError

Run = TypeVar("Run")


class _Parser(CommandParser, HfArgumentParser):
    """HfArgumentParser whose errors are UserErrors."""


def parse_arguments(run_type: type[Run], argv: list[str] | None = None) -> Run:
    """Read the groups of `run_type` from `argv`, and from the YAML files it names with --config.

    Args:
        run_type: a dataclass whose fields are dataclasses of arguments, with a class attribute `pipeline`.
        argv: words of the command line, without the program's name; sys.argv when None.

    Raises:
        UserError: unknown key (naming the nearest one), wrong type, unreadable YAML.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    groups = {name: hint for name, hint in typing.get_type_hints(run_type).items() if isinstance(hint, type)}
    pipeline: str = vars(run_type)["pipeline"]
    parser = _Parser(
        typing.cast(Any, list(groups.values())), prog=f"python -m {pipeline}", allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated.")
    actions = {action.dest: action for action in parser._actions}
    if {"--help", "-h", "--help_all"} & set(words):
        _print_help(parser, run_type, everything="--help_all" in words)
        raise SystemExit(0)
    defaults: dict[str, Any] = {}
    for name in parser.parse_known_args(words)[0].config:
        defaults |= _read_yaml(Path(name), actions)
    parser.set_defaults(**defaults)
    try:
        *objects, namespace, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(str(error), f"see `python -m {pipeline} --help`") from error
    if unknown:
        raise _unknown_key(unknown[0].split("=")[0], "the command line", actions)
    return run_type(**dict(zip(groups, objects, strict=True)))


def _read_yaml(path: Path, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    """The settings of one YAML file, each checked against the argument of that name."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "name an existing file with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}", "write one `key: value` a line") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not hold `key: value` lines", "write one `key: value` a line")
    for key, value in settings.items():
        if key not in actions or key == "config":
            raise _unknown_key(str(key), str(path), actions)
        action = actions[key]
        if isinstance(value, bool) and action.type is not string_to_bool:
            value = settings[key] = "yes" if value else "no"  # YAML 1.1 reads a bare `no` as false
        if action.nargs in ("+", "*"):
            settings[key] = value if isinstance(value, list) else [value]
        elif isinstance(value, (list, dict)):
            raise UserError(f"{path}: {key} takes one value, not a {type(value).__name__}", "write `key: value`")
        elif value is not None and not isinstance(value, bool) and action.type is not None:
            try:
                settings[key] = typing.cast(Any, action.type)(str(value))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise UserError(f"{path}: {key}: {value!r} does not fit: {error}", "correct the value") from error
        if action.choices is not None and settings[key] not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise UserError(f"{path}: {key}: {value!r} is none of {choices}", "take one of them")
    return settings


def _unknown_key(key: str, where: str, actions: dict[str, argparse.Action]) -> UserError:
    """The error for a key that no group has, naming the nearest one."""
    if not key.startswith("-") and where == "the command line":
        return UserError(f"{where} holds the word {key!r}, which belongs to no option", "write `--option value`")
    known = [name for name in actions if not name.startswith("_")]
    nearest = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), known, n=1, cutoff=0.0)[0]
    return UserError(f"unknown option {key!r} in {where}", f"did you mean {nearest!r}? `--help` lists all of them")


def _print_help(parser: _Parser, run_type: type, everything: bool) -> None:
    """Our own arguments first, then the training arguments of everyday use (all of them with --help_all)."""
    console = Console()
    console.print(f"[bold]{parser.prog}[/bold] [--config FILE.yaml] [--option value …]\n{run_type.__doc__}")
    for group in parser._action_groups:
        if not group._group_actions or group.title in ("positional arguments", "options"):
            continue
        named = {action.dest: action for action in reversed(group._group_actions)}
        trainer_fields = group.title == TrainArguments._argument_group_name and not everything
        shown = TrainArguments.everyday_fields if trainer_fields else tuple(reversed(named))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column(ratio=1)
        for name in shown:
            action = named[name]
            default = action.default
            if isinstance(default, list):
                default = " ".join(map(str, default)) or "none"
            elif isinstance(default, Enum):
                default = default.value
            text = " ".join((action.help or "").replace("%%", "%").split())
            if action.choices:
                text += f" One of: {', '.join(map(str, action.choices))}."
            table.add_row(f"--{name}", f"{text} [default: {default}]".replace("[", r"\["))
        console.print(f"\n[bold]{group.title}[/bold]")
        console.print(table)
    if TrainArguments._argument_group_name in {group.title for group in parser._action_groups} and not everything:
        console.print("\nEvery other field of transformers.TrainingArguments is accepted too: --help_all lists them.")
