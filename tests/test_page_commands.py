"""Each command on a page is taken by the real parser of what it starts, as it is typed."""

import importlib
import re
import typing
from pathlib import Path
from typing import Any, NoReturn

import pytest

import novelgpt.doctor
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.deepspeed_settings import NAMED
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from tests.script_words import words_of
from tests.test_readme import PAGES, PIPELINES, ROOMS, ROOT, commands, text_of

# Scripts that start one module of a room with the words they are given.
SCRIPT = re.compile(r"(?:.*/)?scripts/((?:run_(?:pretrain|finetune|lora|predict|lm_eval)|prepare_novels)\.sh)")
# Files that commands name, for which those of the same ending stand that are made here.
CONFIG = "learning_rate: 1e-4\n"


class TakenError(Exception):
    """Raised in place of running a command, once its parser has taken the words."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user types, and parsers that go no further."""
    (tmp_path / "books").mkdir()
    for name in ("my.yaml", "ours.yaml", "x.yaml", "books/a.txt"):
        (tmp_path / name).write_text(CONFIG, encoding="utf-8")
    (tmp_path / "my_tokenizer").mkdir()
    (tmp_path / "my_tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    parse_args = CommandParser.parse_args

    def take(self: CommandParser, *arguments: Any, **options: Any) -> NoReturn:
        parse_args(self, *arguments, **options)
        raise TakenError

    monkeypatch.setattr(CommandParser, "parse_args", take)
    return tmp_path


def parse(module: str, words: list[str]) -> None:
    """Let the parser of a module take the words.

    Raises:
        UserError: it does not.
    """
    if module == "novelgpt.launch":
        options = importlib.import_module("novelgpt.launch.__main__")._parser()
        module, *words = CommandParser.parse_known_args(options, words)[0].args
    if module in PIPELINES:
        parse_arguments(typing.cast(Any, PIPELINES[module]), without_deepspeed(words))
    elif module == "novelgpt.doctor":
        options, further = novelgpt.doctor._parser().parse_known_args(words)
        parse_arguments(typing.cast(Any, PIPELINES[options.pipeline]), ["--model", "tiny", *further])
    elif module == "predict.lm_eval_run":
        # What it does not know is lm_eval's; without a model or two results there is nothing to run.
        assert {"--model", "--compare", "--help"} & set(words)
    else:
        package = (ROOT / module.replace(".", "/")).is_dir()
        with pytest.raises(TakenError):
            importlib.import_module(f"{module}.__main__" if package else module).main.__wrapped__(words)


def without_deepspeed(words: list[str]) -> list[str]:
    """DeepSpeed would begin to work when its settings are read."""
    if "--deepspeed" not in words:
        return words
    place = words.index("--deepspeed")
    named = words[place + 1]
    assert (ROOT / "scripts" / "deepspeed" / Path(named).name).is_file() or named in ("my.json", *NAMED)
    return without_deepspeed(words[:place] + words[place + 2 :])


def started(command: list[str], folder: Path) -> tuple[str, list[str]] | None:
    """Module and words of a command; None where it is none of ours, or no more than its name."""
    variables = {}
    while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
        name, _, value = command.pop(0).partition("=")
        variables[name] = value
    if len(command) < 2:
        return None
    script = SCRIPT.fullmatch(command[1]) if command[0] == "bash" else None
    if script is not None:
        module, *words = words_of(folder, script[1], *expanded(command[2:]), **variables)
        return module, words
    if command[1] != "-m" or command[2].split(".")[0] not in ROOMS:
        return None
    assert command[0] == ".venv/bin/python", f"{' '.join(command)}: there may be no python of that name"
    module, *words = command[2:]
    return (module, expanded(words)) if words[module == "dataset" :] else None


def expanded(words: list[str]) -> list[str]:
    """As the shell does it."""
    return [name for word in words for name in (map(str, sorted(Path().glob(word))) if "*" in word else [word])]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_taken_as_typed(page: str, folder: Path) -> None:
    assert re.findall(r"(?<![\w/])python3? -m (?:dataset|predict|novelgpt|finetune|pretrain)", text_of(page)) == []
    for command in commands(page):
        typed = " ".join(command)
        if "…" in typed or "--help" in typed:  # a form of many commands
            continue
        try:
            found = started(list(command), folder)
            if found is not None:
                parse(*found)
        except UserError as error:
            if "needs the package" not in error.cause:
                raise AssertionError(f"{typed}: {error.cause}; {error.remedy}") from error


def test_a_wrong_command_is_noticed(folder: Path) -> None:
    wrong = [
        "bash scripts/run_lora.sh --train_files my.jsonl",
        "MODEL=tiny bash scripts/run_lora.sh --learning_rats 1",
        ".venv/bin/python -m dataset preview",
        ".venv/bin/python -m dataset tokens a b --model tiny --nothing",
        ".venv/bin/python -m novelgpt.doctor --pipelines pretrain",
        "bash scripts/run_lm_eval.sh --tasks ceval-valid",
    ]
    for line in wrong:
        with pytest.raises((UserError, AssertionError, SystemExit)):
            found = started(line.split(), folder)
            assert found is not None
            parse(*found)
