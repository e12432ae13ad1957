"""Ctrl-C in the first seconds of a command, in which libraries are imported: one line, status 130, nothing left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "dataset", "predict", "novelgpt", "finetune", "finetune_lora", "pretrain")
# Raised by the process itself when it begins to import a module, as if the user had hit Ctrl-C then.
HOOK = """
import os, signal, sys
def interrupt(event, arguments, left=[1]):
    if event == "import" and arguments[0] in os.environ["INTERRUPTED_AT"].split() and left:
        left.clear()
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
"""


def commands() -> list[str]:
    """Each module of the rooms that `python -m` runs."""
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found = [path for path in files if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in found)


def interrupted(folder: Path, words: list[str], at: str) -> subprocess.CompletedProcess[str]:
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    (folder / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{folder / 'hook'}:{ROOT}", "INTERRUPTED_AT": at}
    environment |= {"HOME": str(folder), "TMPDIR": str(folder), "DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", LISTEN, sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True, check=False)


# SIGINT as a terminal leaves it, whatever those who started the tests have done.
LISTEN = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
# The first of these that is imported: where libraries come first, they take seconds.
FIRST = "torch novelgpt.settings.errors"
LATE = [
    (["finetune_lora"], "novelgpt.settings.errors"),
    (["predict"], "novelgpt.settings.errors"),
    (["pretrain"], "torch"),
    (["predict", "--max_rows", "1"], "numpy"),
    (["dataset", "novels", "in", "out"], "dataset.novels.collection"),
    (["dataset", "tokens", "in.txt", "out", "--model", "tiny"], "torch"),
    (["novelgpt.doctor"], "novelgpt.checks.devices"),
    (["predict.score", "a.jsonl"], "jieba"),
]


@pytest.mark.parametrize(("words", "at"), [([name], FIRST) for name in commands()] + LATE)
def test_an_interrupt_among_imports_ends_a_command(words: list[str], at: str, tmp_path: Path) -> None:
    check_interrupted(tmp_path, words, at)


@pytest.mark.long
@pytest.mark.parametrize("name", commands())
def test_an_interrupt_after_libraries_are_imported_ends_a_command(name: str, tmp_path: Path) -> None:
    check_interrupted(tmp_path, [name], "novelgpt.settings.errors")


def check_interrupted(tmp_path: Path, words: list[str], at: str) -> None:
    done = interrupted(tmp_path, words, at)
    assert done.stderr == "stopped by Ctrl-C\n", done.stderr[-2000:]
    assert done.returncode == 130
    assert list((tmp_path / "work").iterdir()) == []
