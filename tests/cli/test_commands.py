"""`novelgpt`: its table of commands, its help, and how commands are told as the user has typed them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.__main__ import run
from novelgpt.settings.commands import COMMANDS, novelgpt_args
from novelgpt.settings.remedies import SCRIPTS, TYPED, python_module, run_pipeline
from tests.launched import PATIENCE, ROOT
from tests.script_words import words_of
from tests.typed import environment_of_a_user, typed
from tests.warm_python import warm_python

PIPELINES = [name for name, command in COMMANDS.items() if command.module in SCRIPTS]
# What takes the time of an import, or of several.
HEAVY = {"torch", "transformers", "numpy", "rich", "pydantic", "yaml", "psutil", "datasets", "multiprocessing"}


@pytest.fixture
def as_novelgpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED, "novelgpt")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["data"]])
def test_help_is_there_without_a_library(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cli", *words]
    done = subprocess.run(
        command, env=environment_of_a_user(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, flags=re.MULTILINE))
    assert "cli.__main__" in imported or "novelgpt.settings.commands" in imported
    assert HEAVY & imported == set()
    assert done.stdout


def test_each_command_is_in_the_help_and_on_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    shown = re.findall(r"^  (\S+(?: \S+)?)  +\S", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown == list(COMMANDS)
    for page in ("cli.md", "zh/cli.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        rows = re.findall(r"^\| `novelgpt ([a-z0-9 -]+)` \| (.*?) \|", text, flags=re.MULTILINE)
        assert [name for name, _ in rows] == list(COMMANDS)
        for name, equivalent in rows:
            if COMMANDS[name].module in SCRIPTS:
                assert equivalent == f"`bash scripts/{SCRIPTS[COMMANDS[name].module]}`"
            elif name != "demo":
                assert equivalent == f"`.venv/bin/python -m {COMMANDS[name].module}`"


@pytest.mark.usefixtures("as_novelgpt")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_it_as_it_is_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, *before = COMMANDS[name].module.split()
    if name in PIPELINES:
        importlib.import_module(f"{module}.__main__")
    with pytest.raises(SystemExit) as end:
        if name in PIPELINES:  # which the starter would start in place of this process
            importlib.import_module(f"{module}.__main__").main(["--help"])
        else:
            run([*name.split(), "--help"])
    assert end.value.code == 0
    assert f"novelgpt {name} [" in " ".join(capsys.readouterr().out.split())


def test_the_help_of_a_pipeline_comes_through_the_starter(tmp_path: Path) -> None:
    for words, shown in ((["-m", "cli", "lora"], "-m cli lora"), (["-m", "finetune_lora"], "-m finetune_lora")):
        done = subprocess.run(
            [warm_python(), *words, "--help"], env=environment_of_a_user() | {"NPROC": "none"}, cwd=tmp_path,
            capture_output=True, text=True, check=True, timeout=PATIENCE,
        )  # fmt: skip
        assert f"{warm_python()} {shown} [--config" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_script_and_its_command_start_the_same(name: str, tmp_path: Path) -> None:
    """Both hand their words to one module, which decides."""
    module = COMMANDS[name].module
    assert words_of(tmp_path, SCRIPTS[module], "--seed", "1", MODEL="m") == [module, "--model", "m", "--seed", "1"]
    done = typed(name, "--seed", "1", folder=tmp_path, NPROC="none")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: NPROC=none is not a number of processes")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["fintune"], "finetune"),
        (["finetune_lora", "--model", "m"], "lora"),
        (["data", "novel", "in", "out"], "data novels"),
        (["export", "lama"], "export llama"),
        (["--hlep"], "merge"),
        ([""], "data tokens"),
    ],
)
@pytest.mark.usefixtures("as_novelgpt")
def test_the_nearest_of_a_command_that_is_none_is_named(
    words: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(words)
    cause, remedy = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert re.fullmatch(r"error: no command '.*'; the nearest is '(.*)'", cause)
    assert words[0] in ("--hlep", "") or cause.endswith(f"'{nearest}'")
    assert remedy == "  fix: see `novelgpt --help`"


def test_remedies_name_commands_as_the_user_called_the_program(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "novelgpt"
    program.write_text(f"#!{sys.executable}\nfrom cli.__main__ import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    environment = environment_of_a_user()
    on_path = environment | {"PATH": f"{program.parent}:{environment['PATH']}"}
    for called, variables, name in (
        ("novelgpt", on_path, "novelgpt"),
        (str(program), environment, "bin/novelgpt"),
        (str(program), on_path, "novelgpt"),
    ):
        words = [called, "score"]  # which imports little
        done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"  fix: see `{name} score --help`")


def test_remedies_in_a_checkout_name_scripts_and_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ways = {
        "dataset novels RAW OUT": "data novels RAW OUT",
        "dataset --help": "data --help",
        "predict.score A": "score A",
        "predict": "predict",
        "finetune_lora --help": "lora --help",
        "novelgpt.launch": None,
        "pip install x": None,
    }
    assert {words: novelgpt_args(words) for words in ways} == ways
    assert python_module("predict.score A").endswith("python -m predict.score A")
    assert run_pipeline("pretrain", "--seed 1", "m") == "MODEL=m bash scripts/run_pretrain.sh --seed 1"
    monkeypatch.setenv(TYPED, "novelgpt")
    assert python_module("predict.score A") == "novelgpt score A"
    assert python_module("pip install x").endswith("python -m pip install x")
    assert run_pipeline("pretrain", "--seed 1", "m") == "novelgpt pretrain --model m --seed 1"
