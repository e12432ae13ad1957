"""Puts a small base where commands use it, the first time that it is named."""

from __future__ import annotations

from pathlib import Path

from novelgpt.model.tiny_random import ensure_tiny_random
from novelgpt.settings.small_bases import small_base_name


def ensure_small_base(model: str) -> None:
    """Build the base in the folder `model` unless it is there; other models are left alone."""
    if small_base_name(model) is not None:
        ensure_tiny_random(Path(model))
