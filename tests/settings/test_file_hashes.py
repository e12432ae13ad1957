"""A data file is read to be hashed only when it was written since."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from novelgpt.settings import file_hashes
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.paths import ROOT, cache_folder

SIZE = 2_000_000
OPENED: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _opened_files_are_noted() -> None:
    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            OPENED.append(arguments[0])

    sys.addaudithook(note)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own; files count as settled at once."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SETTLED_NANOSECONDS", 0)
    yield tmp_path / "cache" / "novelgpt" / "hashes"


def reads(path: Path) -> int:
    """How often the file is opened to be hashed; the hash is right."""
    content = path.read_bytes()
    before = OPENED.count(str(path))
    assert content_hash(path) == (hashlib.sha256(content).hexdigest(), len(content))
    return OPENED.count(str(path)) - before


def rows(path: Path, letter: bytes = b"a") -> Path:
    path.write_bytes(letter * SIZE)
    return path


def write_in_place(path: Path) -> None:
    """Another content of the same size and time, in the same inode."""
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file of the same size and time."""
    times = path.stat()
    rows(path.with_name("new"), b"b").replace(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"b")


def touch(path: Path) -> None:
    os.utime(path)


def test_an_unwritten_file_is_read_once(cache: Path, tmp_path: Path) -> None:
    path, other = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl", b"b")
    assert [reads(path), reads(path), reads(other), reads(path), reads(other)] == [1, 0, 1, 0, 0]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("change", [write_in_place, replace, append, touch])
def test_a_written_file_is_read_again(cache: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = rows(tmp_path / "a.jsonl")
    assert [reads(path), reads(path)] == [1, 0]
    change(path)
    assert [reads(path), reads(path)] == [1, 0]


def test_a_file_of_this_moment_is_not_remembered(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "SETTLED_NANOSECONDS", 3_600_000_000_000)
    path = rows(tmp_path / "a.jsonl")
    assert [reads(path), reads(path)] == [1, 1] and not cache.exists()


def test_small_files_leave_nothing(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a")
    assert [reads(path), reads(path)] == [1, 1] and not cache.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"sha256": 1}'])
def test_a_damaged_memory_is_mended(cache: Path, tmp_path: Path, content: bytes) -> None:
    path = rows(tmp_path / "a.jsonl")
    assert reads(path) == 1
    (memo,) = cache.iterdir()
    memo.write_bytes(content)
    assert [reads(path), reads(path)] == [1, 0]


def test_a_cache_that_cannot_be_written_changes_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    path = rows(tmp_path / "a.jsonl")
    assert [reads(path), reads(path)] == [1, 1]


def test_the_cache_lies_where_datasets_has_its_own() -> None:
    """Under each variable that the library reads."""
    settings = [
        {}, {"XDG_CACHE_HOME": "~/x"}, {"HF_HOME": "~/y", "XDG_CACHE_HOME": "/x"}, {"HF_DATASETS_CACHE": "/z"},
        {"HF_DATASETS_CACHE": "/z", "HF_HOME": "/y"},
    ]  # fmt: skip
    own = {
        name: value for name, value in os.environ.items()
        if name not in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE")
    }  # fmt: skip
    code = (
        "import importlib, json, os, sys, datasets.config\n"
        "for variables in json.loads(sys.argv[1]):\n"
        "    os.environ.update(variables)\n"
        "    print(importlib.reload(datasets.config).HF_DATASETS_CACHE)\n"
        "    [os.environ.pop(name) for name in variables]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)], env=own, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    wanted = [Path(line, "novelgpt") for line in done.stdout.splitlines()]
    assert [cache_folder(own | variables) for variables in settings] == wanted
