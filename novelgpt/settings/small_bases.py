"""The small bases, which need no download: `tiny`, whose weights come with the toolkit, and `tiny-random`."""

from __future__ import annotations

import shutil
from pathlib import Path

from novelgpt.settings.atomic_files import atomic_folder
from novelgpt.settings.paths import OUTPUT, ROOT, from_home

# Names in place of a model's. A folder of such a name is written ./tiny.
TINY, TINY_RANDOM = "tiny", "tiny-random"
# Of the weights, sha256. In the folder's name, so that runs and adapters keep their base when a new version brings
# other weights.
TINY_DIGEST = "eed11234"
SMALL_BASES = {TINY: OUTPUT / "bases" / f"{TINY}-{TINY_DIGEST}", TINY_RANDOM: OUTPUT / "bases" / TINY_RANDOM}

# With the toolkit, where nothing is written: predictions go beside a model, and their scores into its card.
SHIPPED_TINY = ROOT / "novelgpt" / "model" / TINY


def model_place(name: str) -> str:
    """Resolve a model's name to a folder or hub name: that of a small base to its folder, `~` to the user's home."""
    return str(SMALL_BASES[name]) if name in SMALL_BASES else from_home(name)


def small_base_name(model: str | Path) -> str | None:
    """The name of the small base in a folder; None where the model is another."""
    return next((name for name, folder in SMALL_BASES.items() if str(folder) == str(model)), None)


def copy_tiny(folder: Path) -> None:
    """Copy `tiny` into a new folder, all of it or nothing."""
    with atomic_folder(folder, keep_existing=True) as unfinished:
        for path in SHIPPED_TINY.iterdir():
            shutil.copyfile(path, unfinished / path.name)  # without its mode: the shipped file may be read-only
