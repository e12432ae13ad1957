"""What is checked before it is done holds until it is done, whatever other processes do in between."""

from __future__ import annotations

import errno
import fcntl
import pwd
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from novelgpt.settings.atomic_files import atomic_write, new_output_folder
from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import host_lock, is_locked, lock, locked, make_and_lock, remove_empty, unlock


@pytest.mark.parametrize("file", ["lock", None])
def test_one_holds_a_folder_that_all_make_and_remove(file: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    inside = threading.Lock()

    def often(_: int) -> int:
        times = 0
        for _ in range(200):
            try:
                handle, made = make_and_lock(folder, file)
            except BlockingIOError:
                continue
            assert inside.acquire(blocking=False)
            times += 1
            (folder / "file").touch()
            (folder / "file").unlink()
            inside.release()
            if file:
                (folder / file).unlink()
            remove_empty(made)
            unlock(handle)
        return times

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(often, range(4))) >= 1


@pytest.mark.parametrize("place", ["/proc/none/run", "nowhere/run", "file/run"])
def test_where_no_folder_can_be_nothing_is_waited_for(place: str, tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "target")
    (tmp_path / "file").touch()
    for file in ("lock", None):
        with pytest.raises(OSError):
            make_and_lock(tmp_path / place, file)
    with pytest.raises(UserError, match="cannot be made"), new_output_folder(Path("/proc/none/output")):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def test_a_lock_ends_with_what_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("kept")
    handle = lock(path)
    assert is_locked(path)
    with pytest.raises(BlockingIOError):
        lock(path)
    unlock(handle)
    assert not is_locked(path) and path.read_text() == "kept"
    assert not is_locked(tmp_path / "none") and not (tmp_path / "none").exists()


def test_a_file_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        unlock(lock(tmp_path / "lock"))
        assert not is_locked(tmp_path / "lock")
    with new_output_folder(tmp_path / "output") as unfinished:
        (unfinished / "file").touch()
    assert (tmp_path / "output" / "file").exists()


def test_a_file_that_many_write_is_one_of_what_they_wrote(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [str(number) * (1000 + 200_000 * number) for number in range(4)]
    together = threading.Barrier(4)

    def write(content: str) -> None:
        together.wait()
        for _ in range(25):
            atomic_write(path, content)
            assert path.read_text() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_another_command_fills_is_refused_at_once(tmp_path: Path) -> None:
    with new_output_folder(tmp_path / "new" / "output") as unfinished:
        (unfinished / "file").write_text("first")
        with pytest.raises(UserError, match="another command fills"), new_output_folder(tmp_path / "new" / "output"):
            pass
    assert (tmp_path / "new" / "output" / "file").read_text() == "first"


def test_what_was_put_there_in_the_meantime_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="was filled by something else"),
        new_output_folder(tmp_path / "output") as unfinished,
    ):
        (unfinished / "file").write_text("ours")
        (tmp_path / "output" / "file").write_text("theirs")
    assert [(path.name, path.read_text()) for path in (tmp_path / "output").iterdir()] == [("file", "theirs")]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_link_to_an_output_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    with new_output_folder(tmp_path / "link") as unfinished:
        (unfinished / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "target" / "file").exists()


def test_users_without_a_name_take_turns_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)  # as in a container that runs as any number
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with locked(host_lock("test-of-locks")):
        assert is_locked(host_lock("test-of-locks")) and not is_locked(host_lock("test-of-others"))
    host_lock("test-of-locks").unlink()
