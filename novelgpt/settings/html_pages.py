"""Self-contained HTML pages: their templates, and the hashes that their Content-Security-Policy allows."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def page_templates(folder: Path) -> Environment:
    """Templates of a folder and page_macros.html: what they insert is escaped, and an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent], encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def content_hash(text: str) -> str:
    """The source of a style or script that a Content-Security-Policy allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def visible(text: str) -> str:
    """A text as a page can hold it: control characters, lone surrogates and bidirectional marks as their codes."""
    return "".join(
        f"\\u{{{ord(character):x}}}"
        if character in _BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        else character
        for character in text
    )
