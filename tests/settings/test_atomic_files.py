"""Folders that several processes make at once."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from novelgpt.settings.atomic_files import atomic_folder, exclusive_folder
from novelgpt.settings.errors import UserError

_armed: list[Callable[[], None]] = []


def _audit(event: str, _: tuple[object, ...]) -> None:
    if event == "fcntl.flock" and _armed:
        _armed.pop()()


sys.addaudithook(_audit)


def test_a_run_that_is_refused_does_not_remove_the_folder_of_the_other(tmp_path: Path) -> None:
    """The other one takes the lock just before this one would."""
    out = tmp_path / "out"
    handles: list[int] = []

    def other() -> None:
        handles.append(os.open(out, os.O_RDONLY))
        fcntl.flock(handles[0], fcntl.LOCK_EX)

    _armed.append(other)
    with pytest.raises(UserError, match="another run is writing"), exclusive_folder(out, out / "cache" / "files"):
        pass
    assert os.path.samestat(os.fstat(handles[0]), out.stat())
    os.close(handles[0])


def test_after_an_error_of_use_no_empty_folder_stays(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match="nothing usable"), exclusive_folder(out, out / "cache" / "files"):
        raise UserError("nothing usable", "name another")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing usable"), exclusive_folder(out, out / "cache" / "files"):
        (out / "cache" / "files" / "one").touch()
        raise UserError("nothing usable", "name another")
    assert (out / "cache" / "files" / "one").exists()


def test_two_that_fill_a_folder_do_not_meet(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "shard", keep_existing=True) as one:
        (one / "file").write_text("one")
        with atomic_folder(tmp_path / "shard", keep_existing=True) as two:
            (two / "file").write_text("two")
        (one / "file").write_text("one, later")
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]
    assert (tmp_path / "shard" / "file").read_text() == "two"
