"""scripts/setup.sh: runs that start together install once, and what was interrupted is taken up again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from tests.launched import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
# A Python that notes what is asked of it, and makes environments with a copy of itself once it is told to go on.
PYTHON = """#!/bin/bash
case "$*" in
  "-m venv "*)
    echo venv >> "{place}/log"
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    read -r _ < "{place}/go"
    echo made >> "{place}/log"
    ;;
  "-m pip "*) echo pip >> "{place}/log" ;;
esac
"""


def waits_for_a_lock(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child of the process stands in the kernel's list of those that wait for a lock."""
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        words = line.split()
        if words[1] == "->":
            status = Path("/proc", words[5], "stat")
            if status.exists() and status.read_text().rpartition(")")[2].split()[1] == str(process.pid):
                return True
    return False


@pytest.mark.skipif(not Path("/proc/locks").exists() or not shutil.which("flock"), reason="no locks to be seen here")
def test_runs_that_start_together_install_once(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "python").write_text(PYTHON.format(place=tmp_path))
    (tmp_path / "python").chmod(0o755)
    os.mkfifo(tmp_path / "go")
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "VENV": str(tmp_path / "venv")}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", str(tmp_path / "scripts" / "setup.sh")], env=environment)

    first = start()
    with (tmp_path / "go").open("w") as go:  # opens once the first one has got there
        second = start()
        while second.poll() is None and not waits_for_a_lock(second):
            time.sleep(0.01)
        go.write("on\n")
    assert (first.wait(PATIENCE), second.wait(PATIENCE)) == (0, 0)
    assert (tmp_path / "log").read_text().split() == ["venv", "made", "pip"]


def test_an_environment_whose_making_was_interrupted_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("")
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)  # as far as it is when pip's turn comes
    for packages in (tmp_path / "venv" / "lib").glob("python*/site-packages"):
        (packages / "pip").mkdir()
        (packages / "pip" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHON": sys.executable, "VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "setup.sh")], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "venv").glob("installed-*"))
