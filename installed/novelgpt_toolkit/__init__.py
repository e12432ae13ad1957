"""The one name under which pip installs the toolkit: its rooms stand inside, none beside a stranger's packages.

The rooms import each other by the short names that they have in a checkout (`novelgpt`, `dataset`, …). `main` puts
their folder first on the search path of this process and of those that it starts, other hosts included; no other
program sees these names.
"""

from __future__ import annotations

import os
import sys

# This file and what it imports are all that stands between a typed command and its first line: no pathlib here.
HERE = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120


def rooms_folder() -> str:
    """The folder that holds the rooms: this one, or the checkout of an editable installation."""
    return HERE if os.path.isdir(f"{HERE}/novelgpt") else os.path.dirname(os.path.dirname(HERE))  # noqa: PTH112, PTH120


def main() -> None:
    """The `novelgpt` command, also as `python -m novelgpt_toolkit`."""
    rooms = rooms_folder()
    sys.path.insert(0, rooms)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = rooms if not before else f"{rooms}{os.pathsep}{before}"
    # Else `python -m` would look in the current folder first, where a user may have a dataset or a predict.py.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    from novelgpt.settings.signals import begin_command

    begin_command()
    from cli.__main__ import main as run

    run()
