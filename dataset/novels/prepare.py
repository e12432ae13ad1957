"""The step of one source file: bytes -> chapters, removed text and fingerprints, in a folder of their own.

    decode -> clean -> chapters -> quality -> fingerprints

`prepare_file` depends only on the file and the options, and writes only under its own name: any engine may run it,
anywhere, in any order, and twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import dataset.decode
import dataset.mending
from dataset.novels.artefacts import ArtefactWriter
from dataset.novels.books import prepare_book
from dataset.novels.cleaning.cleaning import load_rules
from dataset.novels.sources.series import Series, read_series
from dataset.novels.sources.sources import read_books
from novelgpt.settings.atomic_files import atomic_folder, hash_file, hash_json
from novelgpt.settings.errors import UserError

# Modules and rooms whose code does not affect an artefact; a change of any other invalidates all artefacts.
LATER_STEPS = frozenset((
    "engines", "report", "near_duplicates", "overlaps", "split", "held_out", "collection", "command", "manifest",
    "shards", "terminal",
))  # fmt: skip
LIBRARIES = ("numpy", "opencc", "rensa")
_rules = functools.lru_cache(maxsize=1)(load_rules)


@dataclass(frozen=True)
class FileOptions:
    """What determines, beside its bytes and its path, the artefact of a file.

    Attributes:
        rules: files of further rules.
        rules_digest: of all rules, from `load_rules`.
        code: digest of the code of the steps.
        to_simplified: whether chapters are converted.
        series: files that are one book; the first one represents all of them.
    """

    rules: tuple[Path, ...] = ()
    rules_digest: str = ""
    code: str = ""
    to_simplified: bool = False
    series: tuple[Series, ...] = ()

    def series_of(self, source: str) -> Series | None:
        """The series that a file represents; None for a file by itself."""
        return next((one for one in self.series if one.members[0] == source), None)


def file_options(rules: tuple[Path, ...] = (), simplify: bool = False) -> FileOptions:
    """Options with the digest of the rules as they are now.

    Raises:
        UserError: a file of rules is missing or wrong.
    """
    return FileOptions(rules, load_rules(rules).digest, code_digest(), simplify)


@functools.lru_cache(maxsize=2)
def code_digest(all_steps: bool = False) -> str:
    """Digest of the code that makes artefacts (or of all steps), and of the libraries that affect them.

    Unlike a version number, nobody can forget to raise it.
    """
    here = Path(__file__).resolve().parent
    paths = [Path(dataset.decode.__file__), Path(dataset.mending.__file__)]
    for path in sorted(here.rglob("*")):
        parts = path.relative_to(here).with_suffix("").parts
        if path.suffix in (".py", ".html", ".css", ".js") and (all_steps or LATER_STEPS.isdisjoint(parts)):
            paths.append(path)
    return hash_json([*([path.name, hash_file(path)[0]] for path in paths), *map(version, LIBRARIES)])


def artefact_of(sha256: str, source: str, work: Path, options: FileOptions) -> Path:
    """The folder of a file's artefact, named for everything that determines its content.

    Args:
        sha256: of the file's bytes; of a series, `hash_json` of the list of those of its files.
        source: its path relative to the folder of raw files.
        work: the folder of artefacts.
        options: of the run.
    """
    series = options.series_of(source)
    source = source if series is None else series.source
    return work / hash_json([sha256, source, options.rules_digest, options.to_simplified, options.code])[:40]


def prepare_file(path: Path, folder: Path, work: Path, options: FileOptions) -> Path:
    """Make the artefact of a source file, unless it exists.

    Args:
        path: the file, somewhere in `folder`.
        folder: of raw files.
        work: folder of the artefacts; created if missing.
        options: of the run.

    Returns:
        The folder of the artefact. A file that cannot be used gets one, too, whose only book says why.

    Raises:
        UserError: rules or code are not those of `options`, or the file changed meanwhile.
    """
    source = path.relative_to(folder).as_posix()
    series = options.series_of(source)

    def hash_source() -> str:
        return hash_json([hash_file(folder / member)[0] for member in series.members]) if series else hash_file(path)[0]

    sha256 = hash_source()
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
            with ArtefactWriter(unfinished) as writer:
                try:
                    books = [read_series(series, folder)] if series else read_books(path, folder, writer.leave_out)
                    for raw in books:
                        writer.add(prepare_book(raw, rules, options.to_simplified), raw.bad_bytes)
                except UserError as error:
                    # Errors name the file as the user's shell would; an artefact is the same wherever the folder lies.
                    writer.refuse(source, error.cause.replace(str(path), source))
            if hash_source() != sha256:
                raise UserError(f"{path} changed while it was read", "run the same command again when it is written")
    except OSError:
        if not artefact.is_dir():  # else another process made it meanwhile
            raise
    return artefact
