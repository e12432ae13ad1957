"""Parse command line and YAML into the arguments of a run. The command line wins; an unknown key is an error."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
import typing
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError
from novelgpt.settings.external_ranks import problem_of_rank
from novelgpt.settings.parsed_files import read_yaml
from novelgpt.settings.paths import ROOT, check_not_replaced, check_utf8, from_home
from novelgpt.settings.peer_names import MODEL_NAMES, OTHER_NAMES, explain, settle_model
from novelgpt.settings.random_weights import FROM_SCRATCH
from novelgpt.settings.refused_settings import refuse_settings_of_accelerate
from novelgpt.settings.small_bases import TINY, model_place, small_base_name

Run = TypeVar("Run")
# Options that hold paths, in which `~` is the user's home.
PATHS = (
    "config", "model", "config_name", "tokenizer_name", "train_files", "valid_files", "data_files", "dataset_dir",
    "instruction_templates", "mix", "output_dir",
    "resume_from_checkpoint", "deepspeed", "fsdp_config", "accelerator_config",
)  # fmt: skip
# What --save_steps alone turns on, as --save_strategy steps would.
INTERVALS = ("save", "eval")
# The launcher's DeepSpeed settings, and the options that override them.
BY_DEFAULT = "_deepspeed_by_default"
SHARING = ("deepspeed", "fsdp")
# Numbers of YAML 1.2 and JSON that YAML 1.1 reads as text, such as 1e-6.
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
# Options that name training data.
OWN_DATA = ("train_files", "valid_files", "dataset", "eval_dataset", "mix")
# Mappings that are written name=value,name=value as well.
PAIRS = ("columns", "config_overrides")


class _Parser(CommandParser, HfArgumentParser):
    """HfArgumentParser whose errors are UserErrors."""


def parse_arguments(run_type: type[Run], argv: list[str] | None = None) -> Run:
    """Parse `argv`, and the YAML files that it names with --config, into the groups of `run_type`.

    The command line takes precedence over files, a later file over an earlier one. Training the small base has settings
    of its own, which all of these override.

    Args:
        run_type: a dataclass whose fields are dataclasses of arguments, with a class attribute `pipeline`.
        argv: arguments of the command line, without the program's name; sys.argv when None.

    Raises:
        UserError: unknown key (naming the nearest one), wrong type, unreadable YAML, training files without a model, or
            inconsistent variables of a launcher.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for arg in args:
        check_utf8(arg)
    problem = problem_of_rank(os.environ)
    if problem is not None:
        raise UserError(problem, "torchrun, accelerate and deepspeed set all of them; for one process, unset RANK")
    refuse_settings_of_accelerate(os.environ)
    groups = {name: hint for name, hint in typing.get_type_hints(run_type).items() if isinstance(hint, type)}
    pipeline: str = vars(run_type)["pipeline"]
    parser = _Parser(
        typing.cast(Any, list(groups.values())), prog=f"python -m {pipeline}", allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated.")
    parser.add_argument("--deepspeed_by_default", dest=BY_DEFAULT, metavar="FILE")
    if "--local_rank" not in parser._option_string_actions:  # which deepspeed passes to every program
        parser.add_argument("--local_rank", dest="_local_rank", help=argparse.SUPPRESS)
    for name in OTHER_NAMES:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=f"_{name}", type=from_home)
    actions = {action.dest: action for action in reversed(parser._actions)}  # of a pair, --x and not --no_x
    if {"--help", "-h", "--help_all"} & set(args):
        _print_help(parser, run_type, everything="--help_all" in args)
        raise SystemExit(0)
    kinds = {name: hint for group in groups.values() for name, hint in typing.get_type_hints(group).items()}
    for name, action in actions.items():
        if _takes(kinds.get(name), dict):
            action.type = mapping_of(name, text_too=_takes(kinds[name], str))
        elif name in PATHS:
            action.type = from_home
    # A namespace's own values are not set to defaults: what is None is not on the command line.
    given = vars(parser.parse_known_args(args, argparse.Namespace(**dict.fromkeys(actions)))[0])
    settings: dict[str, Any] = {}
    layers: list[tuple[str, dict[str, Any]]] = []
    for name in given["config"] or []:
        layers.append((name, _read_yaml(Path(name), actions, kinds, pipeline)))
        settings |= {key: value for key, value in layers[-1][1].items() if key not in OTHER_NAMES}
    on_line = {key: given.get(f"_{key}" if key in OTHER_NAMES else key) for key in MODEL_NAMES}
    names = settle_model([*layers, ("the command line", on_line)], takes_base="base" in actions)
    args += [arg for key in names if names[key] != given[key] for arg in (f"--{key}", names[key])]
    given |= names
    named = {name for name in actions if given[name] is not None or settings.get(name) is not None}
    if given[BY_DEFAULT] is not None and not named.intersection(SHARING):
        settings["deepspeed"] = given[BY_DEFAULT]
    for interval in INTERVALS:  # which would have no effect otherwise
        if f"{interval}_steps" in named and f"{interval}_strategy" not in named:
            settings[f"{interval}_strategy"] = "steps"
    parser.set_defaults(**(_settings_of_model(pipeline, given.get("model"), named, actions, kinds) | settings))
    try:
        *objects, namespace, unknown = parser.parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(str(error), f"see `{parser.prog} --help`") from error
    if unknown:
        raise _unknown_key(unknown[0].split("=")[0], "the command line", actions, pipeline)
    for group in objects:
        if isinstance(group, TrainArguments) and group.overwrite_output_dir and group.output_dir:
            for name in given["config"] or []:
                check_not_replaced(name, "config", Path(group.output_dir))
    return run_type(**dict(zip(groups, objects, strict=True)))


def _settings_of_model(
    pipeline: str,
    model: str | None,
    named: Collection[str],
    actions: dict[str, argparse.Action],
    kinds: dict[str, Any],
) -> dict[str, Any]:
    """Return the settings for training the small base, or random weights; none for every other model.

    Args:
        pipeline: that runs.
        model: as given; None without one.
        named: options that are set on the command line or in a file.
        actions: of the parser, by option.
        kinds: types of the options.

    Raises:
        UserError: training data is given, and no model; or a model beside random weights.
    """
    if "config_name" in named:
        if model is not None:
            raise UserError(
                f"--config_name starts from random weights, and --model {model} from weights that are there",
                "leave one of them out (the variable MODEL is --model, too)",
            )
        return _read_yaml(ROOT / pipeline / "configs" / f"{FROM_SCRATCH}.yaml", actions, kinds, pipeline)
    if not (ROOT / pipeline / "configs" / f"{TINY}.yaml").is_file():
        return {}
    own = [name for name in OWN_DATA if name in named]
    if model is None and own:
        raise UserError(
            f"--{own[0]} names files of your own, and no model is named to train on them",
            f"name it: MODEL=NAME before the command, or --model NAME; the small base is --model {TINY}",
        )
    name = small_base_name(model_place(TINY if model is None else model))
    if name is None:
        return {}
    return _read_yaml(ROOT / pipeline / "configs" / f"{name}.yaml", actions, kinds, pipeline)


def mapping_of(name: str, text_too: bool) -> typing.Callable[[str], Any]:
    """Return the type function of an option that takes a mapping in JSON; some take a file's path, or pairs."""

    def read(text: str) -> Any:
        if name in PAIRS and not text.startswith("{"):
            return _read_pairs(text)
        if name in PATHS and not text.startswith("{"):
            return from_home(text)
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a mapping in JSON: {error}") from error
        if not isinstance(value, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is not a mapping in JSON, as in '{{\"name\": 1}}'")
        return text if text_too else value  # transformers parses the text itself

    return read


def _read_pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and mark and value for name, mark, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not written name=value,name=value")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} sets a name twice")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _refuse_constant(constant: str) -> typing.NoReturn:
    raise ValueError(f"{constant} is not a number")


def _with_numbers(where: str, value: Any) -> Any:
    """Convert numbers such as 1e-6, which YAML 1.1 reads as text, within mappings and lists.

    Raises:
        UserError: a number is not finite.
    """
    if isinstance(value, dict):
        return {name: _with_numbers(f"{where}.{name}", part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_numbers(where, part) for part in value]
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a number", "correct the value")
    return value


def _takes(kind: Any, wanted: type) -> bool:
    """Whether a type is `wanted`, or a union that holds it."""
    return wanted in (kind, typing.get_origin(kind)) or any(
        _takes(part, wanted) for part in typing.get_args(kind) if typing.get_origin(kind) not in (list, dict)
    )


def _read_yaml(path: Path, actions: dict[str, argparse.Action], kinds: dict[str, Any], pipeline: str) -> dict[str, Any]:
    """Read the settings of one YAML file, each checked against the argument of that name."""
    read = read_yaml(path, "name an existing file with --config", "write one `key: value` per line") or {}
    if not isinstance(read, dict):
        raise UserError(f"{path} does not hold `key: value` lines", "write one `key: value` per line")
    former = {option: name for name, action in actions.items() for option in action.option_strings if name in kinds}
    settings: dict[str, Any] = {}
    for written, value in read.items():
        key = former.get(f"--{written}", written) if written not in kinds and "-" not in str(written) else written
        if key in settings:
            raise UserError(f"{path}: {key} is set by two names", "leave one of them out")
        if key not in kinds and key not in OTHER_NAMES:
            raise _unknown_key(str(key), str(path), actions, pipeline)
        action = actions[f"_{key}" if key in OTHER_NAMES else key]
        settings[key] = _read_value(f"{path}: {key}", value, action, kinds.get(key, str))
    return settings


def _read_value(where: str, value: Any, action: argparse.Action, kind: Any) -> Any:
    """Convert a value of YAML to that of its argument.

    Args:
        where: file and key, for errors.
        value: as YAML reads it.
        action: of the argument.
        kind: its type.

    Raises:
        UserError: it is not one.
    """
    if value is None:
        if _takes(kind, type(None)):
            return None
        raise UserError(f"{where} has no value", "write one, or leave the line out")
    several = action.nargs in ("+", "*")
    if isinstance(value, dict) and _takes(kind, dict):
        return _with_numbers(where, value)
    if isinstance(value, dict) and action.dest == "optim_args":
        return ",".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, dict) and action.dest == "mix":
        return [f"{name}={part}" for name, part in value.items()]
    if isinstance(value, list) and (several or _takes(kind, list)):
        return [_read_single(where, part, action) for part in value]
    if isinstance(value, (list, dict)):
        raise UserError(f"{where} takes one value, not a {type(value).__name__}", "write `key: value`")
    single = _read_single(where, value, action)
    return [single] if several else single


def _read_single(where: str, value: Any, action: argparse.Action) -> Any:
    """Convert a single value, also one of a list."""
    if isinstance(value, (list, dict)):
        raise UserError(f"{where} holds {value!r} in place of a single value", "write `key: [value, value]`")
    if action.type is string_to_bool and isinstance(value, bool):
        return value
    if isinstance(value, bool):
        # YAML 1.1 reads a bare `no` as false.
        value = "true" if value else "no"
    try:
        read = value if action.type is None else typing.cast(Any, action.type)(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{where}: {value!r} does not fit: {error}", "correct the value") from error
    if action.choices is not None and read not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise UserError(f"{where}: {value!r} is not one of {choices}", "take one of them")
    return read


def _unknown_key(key: str, where: str, actions: dict[str, argparse.Action], pipeline: str) -> UserError:
    """Build the error for an unknown key, naming our counterpart of another tool's option, or else the nearest one."""
    if not key.startswith("-") and where == "the command line":
        return UserError(f"{where} holds {key!r}, which belongs to no option", "write `--option value`")
    known = [name for name in actions if not name.startswith("_")]
    peers = explain(key, known, pipeline)
    if peers is not None:
        return UserError(f"unknown option {key!r} in {where}, {peers[0]}", peers[1])
    nearest = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), known, n=1, cutoff=0.0)[0]
    return UserError(f"unknown option {key!r} in {where}", f"did you mean {nearest!r}? `--help` lists all of them")


def _print_help(parser: _Parser, run_type: type, everything: bool) -> None:
    """Print our own arguments first, then the common training arguments (all of them with --help_all)."""
    console = make_console()
    console.print(Text.assemble((parser.prog, "bold"), " [--config FILE.yaml] [--option value …]"))
    console.print(run_type.__doc__ or "")
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
                default = " ".join(str(value).removeprefix(f"{ROOT}{os.sep}") for value in default) or "none"
            elif isinstance(default, Enum):
                default = default.value
            text = " ".join((action.help or "").replace("%%", "%").split())
            if action.choices:
                text += f" One of: {', '.join(map(str, action.choices))}."
            table.add_row(f"--{name}", text if default in (None, "") else f"{text} [default: {default}]")
        console.print(f"\n{group.title}", style="bold")
        console.print(table)
    if TrainArguments._argument_group_name in {group.title for group in parser._action_groups} and not everything:
        console.print("\nEvery other field of transformers.TrainingArguments is accepted too: --help_all lists them.")
