"""The step of one source file: bytes -> chapters, what was taken out, and fingerprints, in a folder of their own.

    decode -> clean -> chapters -> quality -> fingerprints

`prepare_file` depends on nothing but the file and the options, and writes nowhere but under its own name: any engine
may run it, anywhere, in any order, and twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import dataset.decode
import dataset.mending
from dataset.novels.artefacts import ArtefactWriter
from dataset.novels.books import prepare_book
from dataset.novels.cleaning.cleaning import Rules, load_rules
from dataset.novels.sources.series import Series, read_series
from dataset.novels.sources.sources import LeftOut, read_books
from novelgpt.settings.atomic_files import atomic_folder, hash_file, hash_json
from novelgpt.settings.errors import UserError

# Modules and rooms whose code does not affect an artefact; a change of any other makes all artefacts anew.
LATER_STEPS = frozenset((
    "engines", "report", "near_duplicates", "overlaps", "split",
    "collection", "command", "decisions", "manifest", "run", "shards", "terminal",
))  # fmt: skip
LIBRARIES = ("numpy", "opencc", "rensa")


@dataclass(frozen=True)
class FileOptions:
    """What decides, beside its bytes and its place, how a file comes out.

    Attributes:
        rules: files of further rules.
        rules_digest: of all rules, as `load_rules` gives it.
        code: digest of the code of the steps.
        to_simplified: whether chapters are converted.
        series: files that are one book; the first one stands for all of them.
    """

    rules: tuple[Path, ...] = ()
    rules_digest: str = ""
    code: str = ""
    to_simplified: bool = False
    series: tuple[Series, ...] = ()

    def series_of(self, source: str) -> Series | None:
        """The series that a file stands for; None for a file by itself."""
        return next((one for one in self.series if one.members[0] == source), None)


def file_options(rules: tuple[Path, ...] = (), simplify: bool = False) -> FileOptions:
    """Options with the digest of the rules as they are now.

    Raises:
        UserError: a file of rules is missing or wrong.
    """
    return FileOptions(rules, load_rules(rules).digest, code_digest(), simplify)


@functools.lru_cache(maxsize=2)
def code_digest(all_steps: bool = False) -> str:
    """Of the code that makes artefacts (or of all steps), and of the libraries that decide what comes out.

    A digest forgets nothing, as a version that somebody has to raise would.
    """
    here = Path(__file__).resolve().parent
    paths = [Path(dataset.decode.__file__), Path(dataset.mending.__file__)]
    for path in sorted(here.rglob("*")):
        parts = path.relative_to(here).with_suffix("").parts
        if path.suffix in (".py", ".html", ".css", ".js") and (all_steps or LATER_STEPS.isdisjoint(parts)):
            paths.append(path)
    return hash_json([*([path.name, hash_file(path)[0]] for path in paths), *map(version, LIBRARIES)])


def artefact_of(sha256: str, source: str, work: Path, options: FileOptions) -> Path:
    """Where the artefact of a file goes: named for all that decides its content.

    Args:
        sha256: of the file's bytes; of a series as `hash_series` gives it.
        source: its path relative to the folder of raw files.
        work: the folder of artefacts.
        options: of the run.
    """
    series = options.series_of(source)
    source = source if series is None else series.source
    return work / hash_json([sha256, source, options.rules_digest, options.to_simplified, options.code])[:40]


def hash_series(sha256s: Sequence[str]) -> str:
    """What stands for the hash of a file, of files that are one book."""
    return hash_json(list(sha256s))


def _hash(path: Path, folder: Path, series: Series | None) -> str:
    if series is None:
        return hash_file(path)[0]
    return hash_series([hash_file(folder / member)[0] for member in series.members])


def prepare_file(path: Path, folder: Path, work: Path, options: FileOptions) -> Path:
    """Make the artefact of a source file, unless it is there.

    Args:
        path: the file, somewhere in `folder`.
        folder: of raw files.
        work: where artefacts go; it is made where it is missing.
        options: of the run.

    Returns:
        The folder of the artefact. A file that cannot be used gets one, too, whose only book says why.

    Raises:
        UserError: rules or code are not those of `options`, or the file changed meanwhile.
    """
    source = path.relative_to(folder).as_posix()
    series = options.series_of(source)
    sha256 = _hash(path, folder, series)
    artefact = artefact_of(sha256, source, work, options)
    if artefact.is_dir():
        return artefact
    rules = _rules(options.rules)
    if (rules.digest, code_digest()) != (options.rules_digest, options.code):
        raise UserError(
            "the rules or the code have changed since the run began, or differ between machines",
            "give all machines the same, and run the same command again",
        )
    try:
        with atomic_folder(artefact, keep_existing=True) as unfinished:
            _fill(unfinished, path, folder, rules, options)
            if _hash(path, folder, series) != sha256:
                raise UserError(f"{path} changed while it was read", "run the same command again when it is written")
    except OSError:
        if not artefact.is_dir():  # else another process made it meanwhile
            raise
    return artefact


def _fill(artefact: Path, path: Path, folder: Path, rules: Rules, options: FileOptions) -> None:
    source = path.relative_to(folder).as_posix()
    with ArtefactWriter(artefact) as writer:
        series = options.series_of(source)
        try:
            leave_out = functools.partial(_leave_out, writer)
            for raw in read_books(path, folder, leave_out) if series is None else [read_series(series, folder)]:
                writer.add(prepare_book(raw, rules, options.to_simplified), raw.bad_bytes)
        except UserError as error:
            # Errors name the file as the user's shell would; an artefact is the same wherever the folder lies.
            writer.refuse(source, error.cause.replace(str(path), source))


def _leave_out(writer: ArtefactWriter, member: LeftOut) -> None:
    place = PurePosixPath(member.source.partition("!")[2])
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in place.parts)
    if place.suffix.lower() == ".txt" and not hidden:
        writer.refuse(member.source, member.reason)
    else:
        writer.skip(member.source, member.reason)


@functools.lru_cache(maxsize=1)
def _rules(files: tuple[Path, ...]) -> Rules:
    return load_rules(files)
