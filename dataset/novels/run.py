"""The whole run: every source file to its artefact, then duplicates and the split, then files that training reads.

OUT/cache/files/ holds the artefacts, OUT/cache/next/ the files being written; the files in OUT itself are complete if
there is a manifest.json.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dataset.novels.collection import CollectionOptions, CollectionResult, read_records, write_collection
from dataset.novels.engines.cluster import run_on
from dataset.novels.engines.workers import map_files
from dataset.novels.manifest import HashedFile, hash_files, is_up_to_date, publish, write_manifest
from dataset.novels.prepare import FileOptions, artefact_of, code_digest, prepare_file
from dataset.novels.sources.series import Series, find_series
from dataset.novels.sources.sources import list_folder
from dataset.novels.terminal import Display
from novelgpt.settings.atomic_files import exclusive_folder, hash_json
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import say

VERSION = 1
ENGINES = ("local", "datatrove", "slurm", "ray")


@dataclass(frozen=True)
class EngineOptions:
    """Where the files are prepared; does not affect the result.

    Attributes:
        engine: one of ENGINES.
        workers: how many files are prepared at a time.
        slurm: options of sbatch.
    """

    engine: str = "local"
    workers: int = 1
    slurm: Mapping[str, str] = field(default_factory=dict)


def prepare_novels(
    raw: Path, out: Path, files: FileOptions, collection: CollectionOptions, engine: EngineOptions, display: Display
) -> CollectionResult | None:
    """Bring `out` up to date with `raw`.

    Returns:
        The collection; None if there was nothing to do.

    Raises:
        UserError: nothing usable in `raw`, a folder that cannot be used, another run in `out`, a full disk, a dead
            worker.
    """
    raw, out = raw.resolve(), out.resolve()
    artefacts = out / "cache" / "files"
    if out == raw or raw in out.parents:
        raise UserError(f"{out} lies in the folder of novels", "name a folder outside of it for what is prepared")
    taken = out.is_dir() and any(out.iterdir()) and not artefacts.is_dir()
    if taken or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} holds something else", "name a new folder")
    with exclusive_folder(out, artefacts):
        return _run(raw, out, files, collection, engine, display)


def _run(
    raw: Path, out: Path, files: FileOptions, collection: CollectionOptions, engine: EngineOptions, display: Display
) -> CollectionResult | None:
    paths, skipped = list_folder(raw)
    hashed: dict[str, HashedFile] = {}
    total = sum(path.stat().st_size for path in paths if path.exists())
    with display.files("reading 读取", len(paths), total) as advance:
        for file in hash_files(paths, engine.workers):
            source = file.path.relative_to(raw).as_posix()
            if file.problem:
                skipped.append((source, file.problem))
            else:
                hashed[source] = file
            advance(file.size)
    options = {"to_simplified": files.to_simplified, **asdict(collection)}
    origin = {
        "version": VERSION,
        "code": code_digest(all_steps=True),
        "rules": files.rules_digest,
        "options": options,
        "inputs": [{"source": name, "sha256": file.sha256, "bytes": file.size} for name, file in hashed.items()],
        "skipped": skipped,
    }
    files = replace(files, series=tuple(find_series([file.path for file in hashed.values()], raw, raw.name)))
    artefacts = {
        file: artefact_of(file.sha256, source, out / "cache" / "files", files)
        for source, file in _join_series(hashed, files.series)
    }
    up_to_date = is_up_to_date(out, origin, engine.workers)
    if not up_to_date:
        finished = out / "cache" / "next"
        shutil.rmtree(finished, ignore_errors=True)
        _prepare_files(artefacts, raw, out / "cache", files, engine, display)
        say("comparing books and chapters, and writing what is left 查重、划分、写出", stderr=True)
        sources = read_records(artefacts.values())
        books = [book for records in sources.values() for book in records]
        if all(book.refused for book in books):
            display.show_refused(books)
            raise UserError(f"nothing usable in {raw}", "name a folder with novels in Chinese")
        finished.mkdir()
        shown = {**options, "rules": files.rules_digest[:12]}
        result = write_collection(sources, skipped, collection, shown, finished)
        write_manifest(finished, origin, result.rows_of, engine.workers)
    # Artefacts of files that are gone or have changed, and what a killed run left.
    for folder in set((out / "cache" / "files").iterdir()).difference(artefacts.values()):
        shutil.rmtree(folder)
    if up_to_date:
        return None
    publish(finished, out)
    return result


def _join_series(hashed: Mapping[str, HashedFile], series: Sequence[Series]) -> Iterator[tuple[str, HashedFile]]:
    """(source, file) of each book to prepare: of files that are one book the first one, which represents all."""
    series_of = {member: one for one in series for member in one.members}
    for source, file in hashed.items():
        members = [hashed[member] for member in series_of[source].members] if source in series_of else [file]
        if len(members) == 1:
            yield source, file
        elif members[0] is file:
            sha256 = hash_json([one.sha256 for one in members])
            yield source, HashedFile(file.path, sha256, sum(one.size for one in members))


def _prepare_files(
    artefacts: Mapping[HashedFile, Path],
    raw: Path,
    work: Path,
    options: FileOptions,
    engine: EngineOptions,
    display: Display,
) -> None:
    """Make the missing artefacts, largest first, so that no worker is left alone with a long one at the end."""
    missing = {file: artefact for file, artefact in artefacts.items() if not artefact.is_dir()}
    sizes = {file.path: file.size for file in sorted(missing, key=lambda file: (-file.size, file.path))}
    function = functools.partial(prepare_file, folder=raw, work=work / "files", options=options)
    if engine.engine != "local":
        name = "local" if engine.engine == "datatrove" else engine.engine
        run_on(name, list(sizes), function, work / "logs", engine.workers, slurm=engine.slurm)
    else:
        with display.files("preparing 处理", len(sizes), sum(sizes.values())) as advance:
            for path, _ in map_files(function, list(sizes), engine.workers):
                advance(sizes[path])
    for file, artefact in missing.items():
        if not artefact.is_dir():
            raise UserError(f"{file.path} changed while it was read", "run the same command again")
