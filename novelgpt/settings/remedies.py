"""Commands that remedies name: by the interpreter that runs, whatever `python` and `pip` are in the user's shell."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from novelgpt.settings.paths import IS_CHECKOUT, ROOT

EXAMPLE_MODEL = "Qwen/Qwen3-0.6B"


def this_python() -> str:
    """The interpreter that runs, as a word for a shell."""
    return environment_program(Path(sys.executable or "python").name)


def python_module(words: str) -> str:
    """The command line of a module of this toolkit.

    Args:
        words: the module and what follows it, quoted where they have to be.
    """
    return f"{this_python()} -m {words}"


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


def run_script(name: str, words: str, model: str = EXAMPLE_MODEL) -> str:
    """The command line of a pipeline's script.

    Args:
        name: of the file in scripts/.
        words: for the pipeline, quoted where they have to be.
        model: to train or to ask; an example where none is known.
    """
    return f"MODEL={shlex.quote(model)} bash {_word(ROOT / 'scripts' / name)} {words}"


def _word(path: Path) -> str:
    """A path for a shell; relative where it lies below the folder that the user is in."""
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except (ValueError, OSError):  # it lies elsewhere, or the folder is gone
        return shlex.quote(str(path))
