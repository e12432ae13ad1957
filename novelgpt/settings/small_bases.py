"""The small base, which needs no download: it is built from the samples. Both of its names mean the same."""

from __future__ import annotations

from pathlib import Path

from novelgpt.settings.paths import OUTPUT, from_home

# Names in place of a model's. A folder of such a name is written ./tiny.
TINY, TINY_RANDOM = "tiny", "tiny-random"
SMALL_BASES = {TINY_RANDOM: OUTPUT / "bases" / TINY_RANDOM}


def model_place(name: str) -> str:
    """Resolve a model's name to a folder or hub name: those of the small base to its folder, `~` to the user's home."""
    return str(SMALL_BASES[TINY_RANDOM]) if name in (TINY, TINY_RANDOM) else from_home(name)


def small_base_name(model: str | Path) -> str | None:
    """The name of the small base in a folder; None where the model is another."""
    return next((name for name, folder in SMALL_BASES.items() if str(folder) == str(model)), None)
