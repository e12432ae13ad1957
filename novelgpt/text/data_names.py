"""What `--train_files` and its like name, and the files behind it.

    rows.jsonl   data/*.jsonl   data/**/*.jsonl   data/   hf://OWNER/NAME   rows.jsonl#1000   data/*.jsonl#30%

A file or folder of exactly that name always wins over what `#` and `*` mean elsewhere.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import environment_program
from novelgpt.text.hub_data import HubData, is_hub_name, read_hub_name, version_of
from novelgpt.text.token_files import MANIFEST, SHARDS

ROW_SUFFIXES, TEXT = (".jsonl", ".json", ".csv", ".parquet"), ".txt"
_PART = re.compile(r"([1-9][0-9]*)|([0-9]+(?:\.[0-9]+)?)%")
_DIGITS = re.compile("([0-9]+)")
# In the names of shards, and of folders, that `dataset novels` and `dataset tokens` leave beside a manifest.
_PREPARED = ("train-*", "held_out-*", SHARDS)
# Of names that are near one that does not exist, or that a folder has in place of what was asked for.
_SHOWN = 4


@dataclass(frozen=True)
class Part:
    """A part of the rows behind a name.

    Attributes:
        text: as written behind the name: `1000` or `30%`.
    """

    text: str

    def count(self, rows: int) -> int:
        """How many of `rows` rows it is: a share is rounded, and at least one row of any; never more than there are."""
        number, share = self._match.groups()
        if number:
            return min(rows, int(number))
        return min(rows, max(1, round(Fraction(share) / 100 * rows)))

    @property
    def exceeds(self) -> int:
        """The number of rows that it asks for; 0 where it is a share."""
        return int(self._match[1] or 0)

    @property
    def _match(self) -> re.Match[str]:
        found = _PART.fullmatch(self.text)
        assert found is not None, self.text
        return found


def split_part(name: str) -> tuple[str, Part | None]:
    """A name without its part, and the part; None where all rows are meant.

    Raises:
        UserError: what follows the last `#` of a name is no part, and the name before it exists.
    """
    place, mark, text = name.rpartition("#")
    if not mark or os.path.exists(name):  # noqa: PTH110 - Path.exists raises for names that are too long
        return name, None
    found = _PART.fullmatch(text)
    if found is None or (found[2] and not 0 < Fraction(found[2]) <= 100):
        if os.path.exists(place) or found is not None:  # noqa: PTH110
            raise UserError(
                f"{name}: {text!r} is no part of its rows", "write #1000 for 1,000 rows, or #30% for a share"
            )
        return name, None
    return place, Part(text)


def find_data(place: str, folder: str = "") -> HubData | list[str]:
    """What a name without its part stands for: a data set of a hub that can be read, or files.

    Args:
        place: path, pattern, or name on a hub.
        folder: of the files of a hub's data set; "" for all.

    Raises:
        UserError: what `read_hub_name`, `version_of` and `find_files` raise.
    """
    if not is_hub_name(place):
        return find_files(place)
    data = read_hub_name(place, folder)
    version_of(data)  # refuses what cannot be read
    return data


def find_files(name: str) -> list[str]:
    """The files that a path or a pattern names, in natural order: part2 comes before part10.

    Args:
        name: of a file, of a folder (all its files of ROW_SUFFIXES, at any depth), or a pattern, in which `**` stands
            for any number of folders. Without its part.

    Raises:
        UserError: there is nothing of that name; names what is near it.
    """
    if os.path.isdir(name):  # noqa: PTH112
        return _in_order(str(Path(folder, file)) for folder, file in _walk(name) if file.lower().endswith(ROW_SUFFIXES))
    if os.path.exists(name):  # noqa: PTH110
        return [name]
    if not glob.has_magic(name):
        raise _missing(name)
    matches = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]  # noqa: PTH113, PTH207
    if not matches:
        raise _missing(name, f"{name} matches no file")
    # Files without a reader, such as notes, are passed over where there are others.
    return _in_order(path for path in matches if path.lower().endswith((*ROW_SUFFIXES, TEXT))) or _in_order(matches)


def find_text_files(name: str) -> list[str]:
    """The files of text that a name stands for in pretraining.

    Raises:
        UserError: what `find_files` raises, or the name is that of a data set of a hub, or of a part of a file.
    """
    if is_hub_name(name):
        raise UserError(
            f"{name}: pretraining reads text from files of this host, not from a hub",
            f"download it, with `{environment_program('hf')} download --repo-type dataset`, and name its files",
        )
    if split_part(name)[1] is not None:
        raise UserError(f"{name}: pretraining reads whole files", "leave out # and what follows, or write it to a file")
    return find_files(name)


def is_prepared(folder: str) -> bool:
    """Whether `dataset novels` or `dataset tokens` made a folder."""
    found = itertools.chain.from_iterable(map(Path(folder).glob, _PREPARED))
    return os.path.isfile(os.path.join(folder, MANIFEST)) and any(found)  # noqa: PTH113, PTH118 - long names


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """(folder, file) of each file at any depth; those that are hidden are left out."""
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((inside, file) for file in files if not file.startswith("."))


def _in_order(paths: Iterator[str] | list[str]) -> list[str]:
    """Paths sorted by their parts, in which numbers count as such."""
    return sorted(paths, key=lambda path: ([_natural(part) for part in Path(path).parts], path))


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(_DIGITS.split(text))]


def _missing(name: str, cause: str = "") -> UserError:
    """The error of a name that is not there."""
    place = Path(name)
    above = next((path for path in place.parents if os.path.isdir(path)), None)  # noqa: PTH112
    near: list[str] = []
    if name and above is not None:
        wanted = place.relative_to(above).parts[0]
        inside = sorted(path.name for path in above.iterdir() if not path.name.startswith("."))
        near = difflib.get_close_matches(wanted, inside, _SHOWN) or (inside[:_SHOWN] if cause else [])
        near = [str(above / one) for one in near]
    remedy = "check the path; relative ones start at the current folder"
    if near:
        remedy = (
            f"{'there is' if cause else 'did you mean'} {', '.join(near)}; relative paths start at the current folder"
        )
    return UserError(cause or f"{name or repr(name)} does not exist", remedy)
