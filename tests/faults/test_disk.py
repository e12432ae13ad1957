"""A disk that fills up during a save: the run stops plainly, loses nothing, and goes on once there is room."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from novelgpt.training.checkpoints.folders import damage
from tests.faults.conftest import Runs
from tests.faults.runs import Started, assert_refused, assert_same, complete

FIRST = {"pretrain": "checkpoint-2", "zero2": "checkpoint-1", "lora": "checkpoint-2"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def assert_stopped_plainly(started: Started, checkpoint: str, cause: str) -> None:
    """Exit status 2, a line of cause and one of remedy, the first checkpoint whole, nothing half-written."""
    assert_refused(started, cause)
    assert damage(started.folder / checkpoint) is None
    assert not list(started.folder.glob("*.unfinished"))


def halt_after(started: Started, checkpoint: str) -> None:
    """All ranks stand still until `signal.SIGCONT`."""
    assert started.wait((started.folder / checkpoint).is_dir)
    started.signal(signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", pytest.param("zero2", marks=pytest.mark.long)])
def test_a_full_disk_keeps_the_last_checkpoint(name: str, runs: Runs, small_disk: Path, tmp_path: Path) -> None:
    undisturbed = runs.undisturbed(name)
    folder = small_disk / "run"
    started = Started(undisturbed.command, folder, tmp_path / "logs")
    halt_after(started, FIRST[name])
    size = sum(path.stat().st_size for path in (folder / FIRST[name]).iterdir())
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - size // 2))
    started.signal(signal.SIGCONT)
    assert_stopped_plainly(started, FIRST[name], "is full")

    ballast.unlink()
    complete(undisturbed.command, folder, tmp_path / "logs")
    assert_same(folder, undisturbed.folder)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_does_the_same(runs: Runs, tmp_path: Path) -> None:
    undisturbed = runs.undisturbed("lora")
    folder = tmp_path / "run"
    started = Started(undisturbed.command, folder, tmp_path / "logs")
    halt_after(started, FIRST["lora"])
    largest = max(path.stat().st_size for path in (folder / FIRST["lora"]).iterdir())
    for process in started.ranks:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    started.signal(signal.SIGCONT)
    assert_stopped_plainly(started, FIRST["lora"], "cannot be written")
    complete(undisturbed.command, folder, tmp_path / "logs")
    assert_same(folder, undisturbed.folder)
