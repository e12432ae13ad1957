"""Commands that remedies and pages of help name: as the user has typed theirs.

That is `novelgpt …`, or otherwise a script or the interpreter that runs, whatever `python` is in the user's shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from novelgpt.settings.commands import typed_words
from novelgpt.settings.paths import IS_CHECKOUT, ROOT

EXAMPLE_MODEL = "Qwen/Qwen3-0.6B"
# How the user has called `novelgpt`, told to the processes that it starts.
TYPED = "NOVELGPT_TYPED_AS"
SCRIPTS = {
    "pretrain": "run_pretrain.sh", "finetune": "run_finetune.sh", "finetune_lora": "run_lora.sh",
    "predict": "run_predict.sh",
}  # fmt: skip


def this_python() -> str:
    """The interpreter that runs, as a word for a shell."""
    return environment_program(Path(sys.executable or "python").name)


def python_module(words: str) -> str:
    """The command line of a module of this toolkit, or of the environment.

    Args:
        words: the module and what follows it, quoted where they have to be.
    """
    typed = os.environ.get(TYPED)
    behind = typed_words(words) if typed else None
    return f"{this_python()} -m {words}" if behind is None else f"{typed} {behind}"


def as_typed(text: str) -> str:
    """A sentence with the commands in it as the user types them.

    Args:
        text: with commands in backquotes, by module and words; other words in backquotes stay.
    """
    return re.sub(
        "`([^`]+)`", lambda found: f"`{python_module(found[1])}`" if typed_words(found[1]) else found[0], text
    )


def note_program(program: Path) -> None:
    """From here on, in this process and in those that it starts, commands are told as `novelgpt` is called here.

    Args:
        program: what was called, as in sys.argv[0].
    """
    if program.name == "__main__.py":
        os.environ[TYPED] = f"{this_python()} -m {program.parent.name}"
    else:
        found = shutil.which(program.name)
        on_path = found is not None and Path(found).absolute() == program.absolute()
        os.environ[TYPED] = shlex.quote(program.name) if on_path else _word(program.absolute())


def program_name() -> str:
    """How `novelgpt` is called here."""
    return os.environ.get(TYPED, "novelgpt")


def pip_install(*requirements: str) -> str:
    """The command line that installs packages where this toolkit finds them."""
    return python_module(f"pip install {shlex.join(requirements)}")


def install_requirements() -> str:
    """The command line that brings all packages to the versions that this toolkit is tested with."""
    return python_module(f"pip install -r {_word(ROOT / 'requirements.txt')}")


def install_for(version: str) -> str:
    """How to get the toolkit under another Python.

    Args:
        version: of Python, as "3.13".
    """
    if IS_CHECKOUT:
        return f"PYTHON=python{version} bash {_word(ROOT / 'scripts' / 'setup.sh')}"
    return f"make an environment with `python{version} -m venv`, and install the toolkit there"


def environment_program(name: str) -> str:
    """A program beside the interpreter, as a word for a shell; relative where the user is in a folder above it."""
    return _word(Path(sys.executable or "python").with_name(name))


def run_pipeline(pipeline: str, words: str = "", model: str | None = EXAMPLE_MODEL) -> str:
    """The command line that starts a pipeline.

    Args:
        pipeline: its module.
        words: for the pipeline, quoted where they have to be.
        model: to train or to ask; an example where none is known; None where the words tell.
    """
    if TYPED in os.environ:
        named = "" if model is None else f" --model {shlex.quote(model)}"
        return f"{python_module(pipeline)}{named} {words}".rstrip()
    named = "" if model is None else f"MODEL={shlex.quote(model)} "
    return f"{named}bash {_word(ROOT / 'scripts' / SCRIPTS[pipeline])} {words}".rstrip()


def pipeline_name(pipeline: str) -> str:
    """What a sentence calls a pipeline: its script or its command."""
    return python_module(pipeline) if TYPED in os.environ else f"scripts/{SCRIPTS[pipeline]}"


def _word(path: Path) -> str:
    """A path for a shell; relative where it lies below the folder that the user is in."""
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except (ValueError, OSError):  # it lies elsewhere, or the folder is gone
        return shlex.quote(str(path))
