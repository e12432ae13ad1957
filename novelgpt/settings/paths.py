"""Where the checkout keeps its samples and its results. Paths that a user types are relative to where they type."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from novelgpt.settings.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "dataset" / "samples"
OUTPUT = ROOT / "output"
EMBEDDED_BASE = OUTPUT / "bases" / "tiny-qwen3"


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the block ends; after an error or an interrupt, nothing is there.

    Filled under another name beside `output`, on the same disk, so that the last step is a renaming.

    Raises:
        UserError: `output` is there and not an empty folder, or nothing can be written where it shall lie.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty", "name a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.unfinished-")
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}", "name a folder you can write to") from error
    with work:
        unfinished = Path(work.name) / output.name
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(output)
