"""manifest.json: what a prepared folder was made from, and what is in it; a folder that has one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from novelgpt.settings.atomic_files import hash_file, sync

MANIFEST = "manifest.json"
_OUTPUT = re.compile(
    r"(train|held_out)-\d{5}\.(parquet|jsonl)|(rejected|left_out|duplicates|books)\.jsonl|report\.html|manifest\.json"
)


@dataclass(frozen=True)
class Hashed:
    """A file with what is in it; `problem` says why it could not be read, with size 0 and no sha256."""

    path: Path
    sha256: str
    size: int
    problem: str = ""


def hash_files(paths: Sequence[Path], threads: int) -> Iterator[Hashed]:
    """In order; the hashes are made outside of Python's lock, so that threads are enough."""

    def hash_one(path: Path) -> Hashed:
        try:
            return Hashed(path, *hash_file(path))
        except OSError as error:
            return Hashed(path, "", 0, f"it cannot be read: {error.strerror}")

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(hash_one, paths)


def describe_inputs(hashed: Iterable[Hashed], folder: Path) -> list[dict[str, Any]]:
    """Entries of the manifest, one a source file."""
    return [
        {"source": file.path.relative_to(folder).as_posix(), "sha256": file.sha256, "bytes": file.size}
        for file in hashed
    ]


def describe_outputs(folder: Path, rows_of: dict[str, int], threads: int) -> list[dict[str, Any]]:
    """Entries of the manifest, one a file of `folder`; rows where `rows_of` knows them."""
    entries = []
    for file in hash_files(sorted(folder.iterdir()), threads):
        if file.problem:
            raise OSError(f"{file.path}: {file.problem}")
        rows = {"rows": rows_of[file.path.name]} if file.path.name in rows_of else {}
        entries.append({"file": file.path.name, "sha256": file.sha256, "bytes": file.size, **rows})
    return entries


def write_manifest(folder: Path, origin: dict[str, Any], outputs: list[dict[str, Any]]) -> None:
    """Args: folder; `origin`: version, options, rules and inputs; `outputs`: what `describe_outputs` gave."""
    text = json.dumps(origin | {"outputs": outputs}, ensure_ascii=False, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_up_to_date(out: Path, origin: dict[str, Any], threads: int) -> bool:
    """Whether `out` was made from `origin`, and holds what its manifest says, byte for byte."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        outputs = {out / entry["file"]: entry["sha256"] for entry in manifest.pop("outputs")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if manifest != json.loads(json.dumps(origin)):
        return False
    return all(file.sha256 == outputs[file.path] for file in hash_files(list(outputs), threads))


def put_in_place(finished: Path, out: Path) -> None:
    """Move the files of `finished` into `out`, instead of an earlier run's; the manifest goes first and comes last."""
    names = sorted(path.name for path in finished.iterdir())
    for name in names:
        sync(finished / name)
    (out / MANIFEST).unlink(missing_ok=True)
    sync(out)
    for old in out.iterdir():
        if _OUTPUT.fullmatch(old.name) and old.name not in names:
            old.unlink()
    for name in names:
        if name != MANIFEST:
            (finished / name).replace(out / name)
    sync(out)
    (finished / MANIFEST).replace(out / MANIFEST)
    sync(out)
    finished.rmdir()
