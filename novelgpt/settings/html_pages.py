"""Pages of HTML that need no other file: how their templates are read, and what lets their style and script through."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def page_templates(folder: Path) -> Environment:
    """Templates of a folder: what they insert is escaped, and a name that nobody has given them is an error."""
    return Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def content_hash(text: str) -> str:
    """What a Content-Security-Policy calls a style or a script that it lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
