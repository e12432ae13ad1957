"""The list of works that are held out: who wrote them, hashes of their files, sketches of their chapters; no text.

A list is a JSON file:

    {"format": 1, "name": "public_domain", "works": [
     {"author": "…", "title": "…", "role": "test", "of": "", "era": "modern", "characters": 60943,
      "sha256": "…", "chapters": [12, 47, …], "sketch": "…"}, …]}

`chapters` counts the shingles of each chapter, `sketch` holds them: base64 of little-endian 32-bit numbers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.novels.duplicates.shingles import fold
from dataset.novels.held_out.sketches import LIMIT, Sketch
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import python_module

SHIPPED = ("public_domain",)
"""Names of lists that lie beside this file."""
FORMAT = 1
ROLES = ("test", "same_author", "near_duplicate")
MAX_WORDS = 100  # characters of an author, a title, an era: longer ones would be text
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ANONYMOUS = frozenset(("", "佚名", "无名氏", "不详", "未知", "unknown", "anonymous"))
_COLLECTED = r"(?:经典|短篇|中篇|长篇)*(?:全集|文集|选集|精选集?|作品集?|小说集?|散文集?|集|著|作|撰|编)?"


@dataclass(frozen=True)
class HeldOutWork:
    """A work that is kept out of training.

    Attributes:
        author: "" or 佚名 if not known.
        title: of the work, or the name of its file.
        role: "test": it is evaluated on. "same_author": by the author of such a work. "near_duplicate": another edition
            of one, or much of one is in it. Only works to test on go to the held-out split, the others to none.
        of: "author_title" of the work to test on; "" for that one itself.
        era: when it was written, in any words.
        characters: letters, digits and Chinese characters of its chapters.
        sha256: of the file that it was chosen from.
        sketch: of its chapters, without what works before it in the list have.
    """

    author: str
    title: str
    role: str
    of: str
    era: str
    characters: int
    sha256: str
    sketch: Sketch

    @property
    def name(self) -> str:
        """Author and title, as left_out.jsonl shows them."""
        return f"{self.author}_{self.title}" if self.author else self.title

    def is_named(self, words: Sequence[str]) -> bool:
        """Whether the words of a file name its author and its title."""
        return self.is_by(words) and set(words_of(self.title)) <= set(words)

    def is_by(self, words: Sequence[str]) -> bool:
        """Whether one of the words of a file names its author: 萧红, 萧红全集, 作者萧红, not 萧红霞."""
        author = "".join(words_of(self.author))
        if author in _ANONYMOUS:
            return False
        pattern = re.compile(f"(?:作者)?{re.escape(author)}{_COLLECTED}")
        return any(pattern.fullmatch(word) for word in words)


@dataclass(frozen=True)
class HeldOutWorks:
    """A list.

    Attributes:
        name: of the list.
        digest: sha256 of its file.
        works: those to test on first.
    """

    name: str
    digest: str
    works: tuple[HeldOutWork, ...]


def words_of(text: str) -> list[str]:
    """The words of a name or a path, in simplified characters: "蕭紅_《生死場》.txt" -> 萧红, 生死场, txt."""
    return ["".join(map(chr, fold(word).tolist())) for word in re.split(r"[\W_]+", text) if word]


def author_and_title(name: str) -> tuple[str, str]:
    """Author and title of a book by its name; no author unless it is named AUTHOR_TITLE, with an author in Chinese.

    >>> author_and_title("李伯元_官场现形记_上"), author_and_title("shan_zhong")
    (('李伯元', '官场现形记_上'), ('', 'shan_zhong'))
    """
    author, _, title = name.partition("_")
    return ("", name) if author.isascii() or not title else (author, title)


def load_held_out_works(name: str) -> HeldOutWorks:
    """Read a list.

    Args:
        name: one of `SHIPPED`, or a file.

    Raises:
        UserError: no such list, or it is not one.
    """
    path = Path(__file__).with_name(f"{name}.json") if name in SHIPPED else Path(from_home(name))
    remedy = f"name {', '.join(SHIPPED)} or a file that `{python_module('dataset held_out')}` made"
    try:
        data = path.read_bytes()
        stored = json.loads(data)
    except OSError as error:
        raise UserError(f"no list of held-out works {name}: {error.strerror}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a list of held-out works: {error}", remedy) from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not isinstance(stored.get("works"), list):
        raise UserError(f"{path}: not a list of held-out works of format {FORMAT}", remedy)
    try:
        works = tuple(_read_work(number, work) for number, work in enumerate(stored["works"], start=1))
        if not any(work.role == "test" for work in works):
            raise ValueError("no work to test on")
        return HeldOutWorks(_short(stored, "name"), hashlib.sha256(data).hexdigest(), works)
    except ValueError as error:
        raise UserError(f"{path}: {error}", remedy) from None


def save_held_out_works(name: str, works: Sequence[HeldOutWork], path: Path) -> None:
    """Write a list, one work a line, atomically; the same works give the same bytes."""
    lines = [json.dumps(_work_row(work), ensure_ascii=False, separators=(",", ":")) for work in works]
    head = json.dumps({"format": FORMAT, "name": name}, ensure_ascii=False)[:-1]
    atomic_write(path, head + ', "works": [\n' + ",\n".join(lines) + "\n]}\n")


def _work_row(work: HeldOutWork) -> dict[str, Any]:
    return {
        "author": work.author,
        "title": work.title,
        "role": work.role,
        "of": work.of,
        "era": work.era,
        "characters": work.characters,
        "sha256": work.sha256,
        "chapters": work.sketch.sizes.tolist(),
        "sketch": base64.b64encode(work.sketch.values.astype("<u4").tobytes()).decode(),
    }


def _read_work(number: int, work: Any) -> HeldOutWork:
    """A work of a list.

    Raises:
        ValueError: says which work and which field is wrong.
    """
    try:
        if not isinstance(work, dict):
            raise ValueError("not an object")
        author, title, of, era = (_short(work, name) for name in ("author", "title", "of", "era"))
        if work.get("role") not in ROLES:
            raise ValueError(f"role is none of {', '.join(ROLES)}")
        if not title:
            raise ValueError("no title")
        sha256, characters = work.get("sha256"), work.get("characters")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError("sha256 is not a hash")
        if type(characters) is not int or characters < 0:
            raise ValueError("characters is not a number")
        return HeldOutWork(author, title, work["role"], of, era, characters, sha256, _read_sketch(work))
    except ValueError as error:
        raise ValueError(f"work {number}: {error}") from None


def _short(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > MAX_WORDS:
        raise ValueError(f"{name} is not a text of at most {MAX_WORDS} characters")
    return value


def _read_sketch(work: Mapping[str, Any]) -> Sketch:
    sizes = work.get("chapters")
    if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError("chapters is not a list of numbers")
    try:
        data = base64.b64decode(work.get("sketch"), validate=True)  # type: ignore[arg-type]
        values = np.frombuffer(data, "<u4").astype(np.uint32)
    except (TypeError, binascii.Error, ValueError):
        raise ValueError("sketch is not base64 of 32-bit numbers") from None
    if sum(sizes) != len(values):
        raise ValueError(f"chapters add up to {sum(sizes)} shingles, sketch holds {len(values)}")
    if np.any(values >= LIMIT):
        raise ValueError("sketch holds numbers that are no shingles of a sketch")
    return Sketch(values, np.cumsum([0, *sizes]))
