"""What a script hands to Python, taken down by a program that stands in for it, and what that starts in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from novelgpt.launch.start import plan_start

ROOT = Path(__file__).resolve().parents[1]
# Variables of the scripts, which a test gives itself.
OF_SCRIPTS = ("MODEL", "NPROC", "ZERO", "OFFLOAD", "HOSTFILE", "HOSTS", "HOST", "MASTER_ADDR", "MASTER_PORT")
OF_SCRIPTS += ("MAX_RESTARTS", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def words_of(folder: Path, script: str, *words: str, **variables: str) -> list[str]:
    """The module that a script starts in the end, and the words behind it.

    Args:
        folder: to work in.
        script: its name in scripts/.
        words: of its command line.
        variables: of its environment.
    """
    python = folder / ".recorder" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    taken = folder / ".recorder" / "words"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> "{taken}"\n')
    python.chmod(0o755)
    for stamp in Path(sys.prefix).glob("installed-*"):
        (folder / ".recorder" / stamp.name).touch()
    taken.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in OF_SCRIPTS}
    environment |= {"VENV": str(folder / ".recorder"), **variables}
    command = ["bash", str(ROOT / "scripts" / script), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    handed = taken.read_text(encoding="utf-8").split("\0")[:-1]
    if "novelgpt.launch.start" in handed:
        pipeline, *further = handed[handed.index("novelgpt.launch.start") + 1 :]
        handed = plan_start(pipeline, further, environment, gpus=0).args
    return handed[len(handed) - handed[::-1].index("-m") :]
