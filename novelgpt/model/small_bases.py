"""Puts a small base where commands use it, the first time that it is named."""

from __future__ import annotations

from pathlib import Path

from novelgpt.model.tiny_random import ensure_tiny_random
from novelgpt.settings.small_bases import TINY, TINY_RANDOM, copy_tiny, small_base_name


def ensure_small_base(model: str) -> None:
    """Copy or build the small base in the folder `model` unless it is there; other models are left alone."""
    name, folder = small_base_name(model), Path(model)
    if name == TINY_RANDOM:
        ensure_tiny_random(folder)
    elif name == TINY and not (folder / "config.json").is_file():
        copy_tiny(folder)
