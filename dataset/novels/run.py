"""The whole run: every source file to its artefact, then duplicates and the split, then files that training reads.

OUT/cache/files/ holds the artefacts, OUT/cache/next/ what is being written; what lies in OUT itself is complete if
there is a manifest.json.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dataset.novels.collection import CollectionOptions, Written, read_shelves, write_collection
from dataset.novels.engines.cluster import run_on
from dataset.novels.engines.workers import map_files
from dataset.novels.manifest import (
    Hashed,
    describe_inputs,
    describe_outputs,
    hash_files,
    is_up_to_date,
    put_in_place,
    write_manifest,
)
from dataset.novels.prepare import FileOptions, artefact_of, code_digest, hash_series, prepare_file
from dataset.novels.sources.series import find_series
from dataset.novels.sources.sources import list_folder
from dataset.novels.terminal import Display
from novelgpt.settings.atomic_files import exclusive_folder
from novelgpt.settings.errors import UserError

VERSION = 1
ENGINES = ("local", "datatrove", "slurm", "ray")


@dataclass(frozen=True)
class Machines:
    """Where the files are prepared; decides nothing about the result.

    Attributes:
        engine: one of ENGINES.
        workers: how many files are prepared at a time.
        slurm: options of sbatch.
    """

    engine: str = "local"
    workers: int = 1
    slurm: Mapping[str, str] = field(default_factory=dict)


def prepare_novels(
    raw: Path, out: Path, files: FileOptions, collection: CollectionOptions, machines: Machines, display: Display
) -> Written | None:
    """Bring `out` up to date with what is in `raw`.

    Returns:
        What there is now; None where there was nothing to do.

    Raises:
        UserError: nothing usable in `raw`, a folder that cannot be used, another run in `out`, a full disk, a dead
            worker.
    """
    raw, out = raw.resolve(), out.resolve()
    _check_folders(raw, out)
    with exclusive_folder(out, out / "cache" / "files"):
        return _Run(raw, out, out / "cache", files, collection, machines, display).run()


def _check_folders(raw: Path, out: Path) -> None:
    if out == raw or raw in out.parents:
        raise UserError(f"{out} lies in the folder of novels", "name a folder outside of it for what is prepared")
    taken = out.is_dir() and any(out.iterdir()) and not (out / "cache" / "files").is_dir()
    if taken or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} holds something else", "name a new folder")


@dataclass
class _Run:
    raw: Path
    out: Path
    work: Path
    files: FileOptions
    collection: CollectionOptions
    machines: Machines
    display: Display

    def run(self) -> Written | None:
        """All steps, as far as they are not done."""
        listing = list_folder(self.raw)
        hashed = self._hash_sources(listing.files)
        skipped = [(source, reason) for source, reason in listing.left_out]
        skipped += [(self._source(file), file.problem) for file in hashed if file.problem]
        hashed = [file for file in hashed if not file.problem]
        options = {"to_simplified": self.files.to_simplified, **asdict(self.collection)}
        origin = {
            "version": VERSION,
            "code": code_digest(all_steps=True),
            "rules": self.files.rules_digest,
            "options": options,
            "inputs": describe_inputs(hashed, self.raw),
            "skipped": skipped,
        }
        series = find_series([file.path for file in hashed], self.raw, self.raw.name)
        self.files = replace(self.files, series=tuple(series))
        hashed = list(self._books(hashed))
        artefacts = list(map(self._artefact_of, hashed))
        finished = self.work / "next"
        if is_up_to_date(self.out, origin, self.machines.workers):
            self._remove_leftovers(artefacts)
            return None
        shutil.rmtree(finished, ignore_errors=True)
        self._prepare_files([file for file in hashed if not self._artefact_of(file).is_dir()])
        self.display.say("comparing books and chapters, and writing what is left 查重、划分、写出")
        shelves = read_shelves(artefacts)
        books = [book for shelf in shelves for book in shelf.books]
        if all(book.refused for book in books):
            self.display.show_refused(books)
            raise UserError(f"nothing usable in {self.raw}", "name a folder with novels in Chinese")
        finished.mkdir()
        shown = {**options, "rules": self.files.rules_digest[:12]}
        written = write_collection(shelves, skipped, self.collection, shown, finished)
        write_manifest(finished, origin, describe_outputs(finished, written.rows_of, self.machines.workers))
        self._remove_leftovers(artefacts)
        put_in_place(finished, self.out)
        return written

    def _hash_sources(self, paths: Sequence[Path]) -> list[Hashed]:
        hashed = []
        total = sum(path.stat().st_size for path in paths if path.exists())
        with self.display.files("reading 读取", len(paths), total) as advance:
            for file in hash_files(paths, self.machines.workers):
                hashed.append(file)
                advance(file.size)
        return hashed

    def _books(self, hashed: Sequence[Hashed]) -> Iterator[Hashed]:
        """The files, and for those that are one book the first one alone, which stands for all."""
        by_source = {self._source(file): file for file in hashed}
        series_of = {member: series for series in self.files.series for member in series.members}
        for source, file in by_source.items():
            series = series_of.get(source)
            if series is None:
                yield file
            elif series.members[0] == source:
                members = [by_source[member] for member in series.members]
                yield Hashed(file.path, hash_series([one.sha256 for one in members]), sum(one.size for one in members))

    def _source(self, file: Hashed) -> str:
        return file.path.relative_to(self.raw).as_posix()

    def _artefact_of(self, file: Hashed) -> Path:
        return artefact_of(file.sha256, self._source(file), self.work / "files", self.files)

    def _prepare_files(self, files: Sequence[Hashed]) -> None:
        """Largest first, so that no worker is left alone with a long one at the end."""
        ordered = sorted(files, key=lambda file: (-file.size, file.path))
        function = functools.partial(prepare_file, folder=self.raw, work=self.work / "files", options=self.files)
        sizes = {file.path: file.size for file in ordered}
        if self.machines.engine != "local":
            engine = "local" if self.machines.engine == "datatrove" else self.machines.engine
            run_on(engine, list(sizes), function, self.work / "logs", self.machines.workers, slurm=self.machines.slurm)
        else:
            with self.display.files("preparing 处理", len(sizes), sum(sizes.values())) as advance:
                for path, _ in map_files(function, list(sizes), self.machines.workers):
                    advance(sizes[path])
        for file in files:
            if not self._artefact_of(file).is_dir():
                raise UserError(f"{file.path} changed while it was read", "run the same command again")

    def _remove_leftovers(self, artefacts: Sequence[Path]) -> None:
        """Artefacts of files that are gone or have changed, and what a killed run left behind."""
        current = set(artefacts)
        for folder in (self.work / "files").iterdir():
            if folder not in current:
                shutil.rmtree(folder)
