"""manifest.json: what a prepared folder was made from and what it holds; a folder that has one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
class HashedFile:
    """A file and the hash of its content; `problem` says why it could not be read, with size 0 and no sha256."""

    path: Path
    sha256: str
    size: int
    problem: str = ""


def hash_files(paths: Sequence[Path], threads: int) -> Iterator[HashedFile]:
    """Hash files, in order; hashlib releases Python's lock, so threads are enough."""

    def hash_one(path: Path) -> HashedFile:
        try:
            return HashedFile(path, *hash_file(path))
        except OSError as error:
            return HashedFile(path, "", 0, f"it cannot be read: {error.strerror}")

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(hash_one, paths)


def write_manifest(folder: Path, origin: dict[str, Any], rows_of: dict[str, int], threads: int) -> None:
    """Write the manifest.

    Args:
        folder: whose files are listed, with their hashes.
        origin: version, options, rules and inputs.
        rows_of: row count of each file that has rows.
        threads: that hash.
    """
    outputs = []
    for file in hash_files(sorted(folder.iterdir()), threads):
        if file.problem:
            raise OSError(f"{file.path}: {file.problem}")
        name = file.path.name
        rows = {"rows": rows_of[name]} if name in rows_of else {}
        outputs.append({"file": name, "sha256": file.sha256, "bytes": file.size, **rows})
    text = json.dumps(origin | {"outputs": outputs}, ensure_ascii=False, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_up_to_date(out: Path, origin: dict[str, Any], threads: int) -> bool:
    """Whether `out` was made from `origin`, and its files match the manifest byte for byte."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        outputs = {out / entry["file"]: entry["sha256"] for entry in manifest.pop("outputs")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return manifest == json.loads(json.dumps(origin)) and all(
        file.sha256 == outputs[file.path] for file in hash_files(list(outputs), threads)
    )


def publish(finished: Path, out: Path) -> None:
    """Move the files of `finished` into `out`, in place of earlier ones; the manifest is removed first, moved last."""
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
