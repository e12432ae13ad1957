"""What a run trains and evaluates on, told apart by role, order, number and content, wherever it lies.

Files are hashed whole. Tokens, of which there may be hundreds of gigabytes, are known by the hashes in their manifest
as long as the file system says that nobody has written them since; else they are hashed, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.atomic_files import hash_file
from novelgpt.settings.errors import UserError
from novelgpt.settings.run_record import DataFile, DataSource
from novelgpt.settings.runs import TrainingRun
from novelgpt.text.token_files import MANIFEST, SHARDS, STARTS, TOKENS, read_token_manifest

PREPARED = ("train-*", "held_out-*")
PREPARED_KINDS = (".parquet", ".jsonl")
HASHING_THREADS = 8
_SOURCES = TypeAdapter(list[DataSource])


def identify_data(run: TrainingRun) -> list[DataSource]:
    """What the files and folders hold that a run names, in its order.

    Raises:
        UserError: a file cannot be read.
    """
    named = [("train_files", name) for name in run.data.train_files]
    named += [("valid_files", name) for name in run.data.valid_files]
    if isinstance(run.data, ConversationArguments):
        named += [("instruction_templates", name) for name in run.data.instruction_templates]
    known: dict[str, DataSource] = {}
    sources = []
    for role, name in named:
        if name not in known:
            known[name] = _identify(role, name)
        sources.append(known[name].model_copy(update={"role": role}))
    return sources


def check_unwritten(sources: Iterable[DataSource]) -> None:
    """Make sure, once they are read, that files and folders are still what they were when they were hashed.

    Raises:
        UserError: names the first one that is not.
    """
    for source in sources:
        now = _state_of(Path(source.path))
        changed = sorted(path for path in now.keys() | source.seen.keys() if now.get(path) != source.seen.get(path))
        if changed:
            raise UserError(
                f"{changed[0]} was written while this run read it, so that it may hold some of both",
                "start again once nothing writes there",
            )


def data_sha256(sources: Iterable[DataSource]) -> dict[str, str]:
    """By name, the hashes of the files and manifests that a run trains and evaluates on, for people to compare."""
    return {source.name: source.digest for source in sources if source.role != "instruction_templates"}


def data_changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """What differs between the data of two runs, in words; [] where nothing does.

    Args:
        before: the `data` of a run.json.
        now: that of this process, whose files are there to be looked at.
    """
    old, new = _SOURCES.validate_python(before), _SOURCES.validate_python(now)
    found = []
    for role in ("train_files", "valid_files", "instruction_templates"):
        olds = [source for source in old if source.role == role]
        news = [source for source in new if source.role == role]
        changed = [_difference(one, other) for one, other in zip(olds, news, strict=False)]
        if len(olds) == len(news) and not any(changed):
            continue
        # A file that is as before, but elsewhere in the row, is no changed one.
        unknown = [source for source in news if all(_difference(one, source) for one in old)]
        if not unknown:
            found.append(f"the files of --{role}, their order or how often each is named")
        elif len(olds) == len(news):
            found += [f"the content of {change}" for change in changed if change]
        else:
            found.append(f"the content of --{role}: {', '.join(Path(source.name).name for source in unknown)}")
    return found


def _identify(role: str, name: str) -> DataSource:
    path = Path(name).absolute()
    source = DataSource(role=role, path=str(path), name=name, files=[])
    try:
        if not path.exists():
            return source  # told where it would be read
        source.seen = _state_of(path)
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"{name} is no regular file", "write its rows to a file, and name that")
            source.files = [_hashed(path, path.suffix.lower())]
            return source
        if (path / MANIFEST).is_file():
            source.manifest_sha256 = hash_file(path / MANIFEST)[0]
        manifest = _token_manifest(path)
        if manifest is not None:
            source.files = _token_files(path, manifest)
        else:
            read = _prepared_files(path)
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                source.files = list(pool.map(_hashed, read, [file.name for file in read]))
    except OSError as error:
        raise UserError(
            f"{error.filename or name} cannot be read: {error.strerror}", "name files you can read"
        ) from error
    return source


def _prepared_files(folder: Path) -> list[Path]:
    found = sorted(path for pattern in PREPARED for path in folder.glob(pattern))
    return [path for path in found if path.suffix in PREPARED_KINDS]


def _state_of(path: Path) -> dict[str, list[int]]:
    """What changes when a file is written, by path: of a file, or of a folder's manifest and shards."""
    files = [path / MANIFEST, *_prepared_files(path), *path.glob(f"{SHARDS}/*/*")] if path.is_dir() else [path]
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found[str(file)] = [status.st_ino, status.st_size, status.st_mtime_ns]
    return found


def _hashed(path: Path, name: str) -> DataFile:
    sha256, size = hash_file(path)
    return DataFile(name=name, bytes=size, sha256=sha256)


def _token_manifest(folder: Path) -> dict[str, Any] | None:
    """None where it is none; what is wrong with it is told where the tokens are opened."""
    try:
        return read_token_manifest(folder)
    except UserError:
        return None


def _token_files(folder: Path, manifest: dict[str, Any]) -> list[DataFile]:
    files = []
    for split, content in manifest["splits"].items():
        for shard in content["shards"]:
            for name in (TOKENS, STARTS):
                path = folder / SHARDS / shard["name"] / name
                if not path.is_file():
                    continue  # told where the tokens are opened
                status = path.stat()
                files.append(DataFile(
                    name=str(path.relative_to(folder)), bytes=status.st_size,
                    sha256=shard.get("sha256", {}).get(name) or hash_file(path)[0],
                    split=split, written=[status.st_ino, status.st_mtime_ns, status.st_ctime_ns],
                ))  # fmt: skip
    return files


def _difference(old: DataSource, new: DataSource) -> str:
    """What of a source is another one's: its name, that of a file in it, or ""."""
    inside = f"{Path(new.name).name}/" if new.manifest_sha256 or Path(new.path).is_dir() else ""
    for one, other in zip(old.files, new.files, strict=False):
        same = (one.name, one.bytes, one.split) == (other.name, other.bytes, other.split)
        if not same or not _same_content(one, other, Path(new.path)):
            return f"{inside}{other.name}" if inside else Path(new.name).name
    return "" if len(old.files) == len(new.files) else Path(new.name).name


def _same_content(old: DataFile, new: DataFile, folder: Path) -> bool:
    if old.sha256 != new.sha256:
        return False
    return old.written == new.written or _hash_of(folder / new.name, tuple(new.written)) == old.sha256


@functools.cache
def _hash_of(path: Path, _: tuple[int, ...]) -> str:
    """Hashed once for as long as it is not written."""
    return hash_file(path)[0]
