"""Identifies what a run trains and evaluates on by role, order, number and content, wherever it lies.

Files are hashed completely. Tokens, of which there may be hundreds of gigabytes, are identified by the hashes in their
manifest as long as the file system says that nobody has written them since; otherwise they are hashed, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from novelgpt.settings.atomic_files import hash_file
from novelgpt.settings.errors import UserError
from novelgpt.settings.run_record import DataFile, DataSource
from novelgpt.settings.runs import TrainingRun
from novelgpt.text.token_files import MANIFEST, SHARDS, STARTS, TOKENS, read_token_manifest

ROLES = ("train_files", "valid_files", "instruction_templates")
PREPARED = ("train-*", "held_out-*")
PREPARED_SUFFIXES = (".parquet", ".jsonl")
HASHING_THREADS = 8
_SOURCES = TypeAdapter(list[DataSource])


def identify_data(run: TrainingRun) -> list[DataSource]:
    """Hash the files and folders that a run reads, in its order.

    Raises:
        UserError: a file cannot be read.
    """
    identify = functools.cache(_identify)  # each file is hashed once, however often it is named
    named = [(role, name) for role in ROLES for name in vars(run.data).get(role, [])]  # raw text has no templates
    return [identify(name).model_copy(update={"role": role}) for role, name in named]


def check_unwritten(sources: Iterable[DataSource]) -> None:
    """Make sure, once they are read, that files and folders are still as they were when they were hashed.

    Raises:
        UserError: names the first one that changed.
    """
    for source in sources:
        now = _state_of(Path(source.path))
        changed = sorted(path for path in now.keys() | source.seen.keys() if now.get(path) != source.seen.get(path))
        if changed:
            raise UserError(
                f"{changed[0]} was written while this run read it, so that it may have read some of both versions",
                "start again once nothing writes there",
            )


def data_changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """Describe what differs between the data of two runs.

    Args:
        before: the `data` of a run.json.
        now: that of this process, whose files can be read.
    """
    old, new = _SOURCES.validate_python(before), _SOURCES.validate_python(now)
    found = []
    for role in ROLES:
        olds = [source for source in old if source.role == role]
        news = [source for source in new if source.role == role]
        changed = [_difference(one, other) for one, other in zip(olds, news, strict=False)]
        if len(olds) == len(news) and not any(changed):
            continue
        # A file with unchanged content at another position is not a changed file.
        unknown = [source for source in news if all(_difference(one, source) for one in old)]
        if not unknown:
            found.append(f"the files of --{role}, their order or how often each is named")
        elif len(olds) == len(news):
            found += [f"the content of {change}" for change in changed if change]
        else:
            found.append(f"the content of --{role}: {', '.join(Path(source.name).name for source in unknown)}")
    return found


def _identify(name: str) -> DataSource:
    """Hash a file or folder, whose role is left open."""
    path = Path(name).absolute()
    source = DataSource(role="", path=str(path), name=name, files=[])
    try:
        if not path.exists():
            return source  # reported where it is read
        in_folder = path.is_dir()
        if not in_folder and not path.is_file():
            raise UserError(f"{name} is not a regular file", "write its rows to a file, and name that")
        source.seen = _state_of(path)
        if (path / MANIFEST).is_file():
            source.manifest_sha256 = hash_file(path / MANIFEST)[0]
        tokens = None
        with contextlib.suppress(UserError):  # reported where the tokens are opened
            tokens = read_token_manifest(path)
        if tokens is not None:
            source.files = _token_files(path, tokens)
        else:
            read = _prepared_files(path) if in_folder else [path]
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                names = [file.name if in_folder else file.suffix.lower() for file in read]
                source.files = list(pool.map(_hash, read, names))
    except OSError as error:
        raise UserError(
            f"{error.filename or name} cannot be read: {error.strerror}", "name files you can read"
        ) from error
    return source


def _prepared_files(folder: Path) -> list[Path]:
    found = sorted(path for pattern in PREPARED for path in folder.glob(pattern))
    return [path for path in found if path.suffix in PREPARED_SUFFIXES]


def _state_of(path: Path) -> dict[str, list[int]]:
    """Return [inode, size, mtime], which change with each write, of a file or of a folder's manifest and shards."""
    files = [path / MANIFEST, *_prepared_files(path), *path.glob(f"{SHARDS}/*/*")] if path.is_dir() else [path]
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found[str(file)] = [status.st_ino, status.st_size, status.st_mtime_ns]
    return found


def _hash(path: Path, name: str) -> DataFile:
    sha256, size = hash_file(path)
    return DataFile(name=name, bytes=size, sha256=sha256)


def _token_files(folder: Path, manifest: dict[str, Any]) -> list[DataFile]:
    files = []
    for split, content in manifest["splits"].items():
        for shard in content["shards"]:
            for name in (TOKENS, STARTS):
                path = folder / SHARDS / shard["name"] / name
                if not path.is_file():
                    continue  # reported where the tokens are opened
                status = path.stat()
                files.append(DataFile(
                    name=str(path.relative_to(folder)), bytes=status.st_size,
                    sha256=shard.get("sha256", {}).get(name) or hash_file(path)[0],
                    split=split, written=[status.st_ino, status.st_mtime_ns, status.st_ctime_ns],
                ))  # fmt: skip
    return files


def _difference(old: DataSource, new: DataSource) -> str:
    """Name the first file of a source whose content is not the old one's, or the source itself; "" where none is."""
    name = Path(new.name).name
    in_folder = new.manifest_sha256 or Path(new.path).is_dir()
    for one, other in zip(old.files, new.files, strict=False):
        same = (one.name, one.bytes, one.split, one.sha256) == (other.name, other.bytes, other.split, other.sha256)
        if same and one.written != other.written:  # the manifest's hash may be outdated
            same = _hash_again(Path(new.path) / other.name, tuple(other.written)) == one.sha256
        if not same:
            return f"{name}/{other.name}" if in_folder else name
    return "" if len(old.files) == len(new.files) else name


@functools.cache
def _hash_again(path: Path, _: tuple[int, ...]) -> str:
    """Hash a file once for as long as it is not written."""
    return hash_file(path)[0]
