"""A command of `novelgpt` as a user of a checkout starts it: by a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.launched import PATIENCE, ROOT
from tests.script_words import OF_SCRIPTS


def environment_of_a_user() -> dict[str, str]:
    """Variables in which nothing is settled but where the toolkit lies, and that there is no hub."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_SCRIPTS}
    return environment | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def typed(*words: str, folder: Path, read: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end.

    Args:
        words: behind `novelgpt`.
        folder: that the user is in.
        read: what it is typed while it runs.
        variables: beside those of any user.
    """
    return subprocess.run(
        [sys.executable, "-m", "cli", *words], env=environment_of_a_user() | variables, cwd=folder, input=read or "",
        capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False,
    )  # fmt: skip
