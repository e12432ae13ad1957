"""Commands in remedies and help texts, as the user would type them.

That is `novelgpt …`, or else a script or the running interpreter, whatever `python` is in the user's shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from novelgpt.settings.commands import novelgpt_args
from novelgpt.settings.paths import IS_CHECKOUT, ROOT

EXAMPLE_MODEL = "Qwen/Qwen3-0.6B"
# How the user has called `novelgpt`, for the processes that it starts.
TYPED = "NOVELGPT_TYPED_AS"
SCRIPTS = {
    "pretrain": "run_pretrain.sh", "finetune": "run_finetune.sh", "finetune_lora": "run_lora.sh",
    "predict": "run_predict.sh",
}  # fmt: skip


def this_python() -> str:
    """Return the running interpreter, quoted for a shell."""
    return environment_program(Path(sys.executable or "python").name)


def python_module(args: str) -> str:
    """Return the command line of a module of this toolkit, or of the environment.

    Args:
        args: the module and its arguments, quoted where needed.
    """
    typed = os.environ.get(TYPED)
    own = novelgpt_args(args) if typed else None
    return f"{this_python()} -m {args}" if own is None else f"{typed} {own}"


def as_typed(text: str) -> str:
    """Return a text with its commands as the user types them.

    Args:
        text: with commands in backquotes, by module and arguments; other text in backquotes stays.
    """
    return re.sub(
        "`([^`]+)`", lambda found: f"`{python_module(found[1])}`" if novelgpt_args(found[1]) else found[0], text
    )


def note_program(program: Path) -> None:
    """Show commands as `novelgpt` is called here from now on, in this process and in those that it starts.

    Args:
        program: what was called, as in sys.argv[0].
    """
    if program.name == "__main__.py":
        os.environ[TYPED] = f"{this_python()} -m {program.parent.name}"
    else:
        found = shutil.which(program.name)
        on_path = found is not None and Path(found).absolute() == program.absolute()
        os.environ[TYPED] = shlex.quote(program.name) if on_path else _quoted(program.absolute())


def program_name() -> str:
    """Return how `novelgpt` is called here."""
    return os.environ.get(TYPED, "novelgpt")


def pip_install(*requirements: str) -> str:
    """Return the command line that installs packages where this toolkit finds them."""
    return python_module(f"pip install {shlex.join(requirements)}")


def install_requirements() -> str:
    """Return the command line that installs all packages in the versions that this toolkit is tested with."""
    return python_module(f"pip install -r {_quoted(ROOT / 'requirements.txt')}")


def install_for(version: str) -> str:
    """Return how to install the toolkit under another Python.

    Args:
        version: of Python, as "3.13".
    """
    if IS_CHECKOUT:
        return f"PYTHON=python{version} bash {_quoted(ROOT / 'scripts' / 'setup.sh')}"
    return f"make an environment with `python{version} -m venv`, and install the toolkit there"


def environment_program(name: str) -> str:
    """Return a program beside the interpreter, quoted for a shell; relative where it lies below the current folder."""
    return _quoted(Path(sys.executable or "python").with_name(name))


def run_pipeline(pipeline: str, args: str = "", model: str | None = EXAMPLE_MODEL) -> str:
    """Return the command line that starts a pipeline.

    Args:
        pipeline: its module.
        args: of the pipeline, quoted where needed.
        model: an example where none is known; None where `args` name it.
    """
    if TYPED in os.environ:
        named = "" if model is None else f" --model {shlex.quote(model)}"
        return f"{python_module(pipeline)}{named} {args}".rstrip()
    named = "" if model is None else f"MODEL={shlex.quote(model)} "
    return f"{named}bash {_quoted(ROOT / 'scripts' / SCRIPTS[pipeline])} {args}".rstrip()


def pipeline_name(pipeline: str) -> str:
    """Return a pipeline's name for texts: its script or its command."""
    return python_module(pipeline) if TYPED in os.environ else f"scripts/{SCRIPTS[pipeline]}"


def _quoted(path: Path) -> str:
    """Quote a path for a shell; relative where it lies below the current folder."""
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except (ValueError, OSError):  # it lies elsewhere, or the folder is gone
        return shlex.quote(str(path))
