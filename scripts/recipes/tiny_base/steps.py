"""Optimizer steps that read so many characters: python …/steps.py PARTS CHARACTERS TOKENS_PER_STEP TOKENS…"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from novelgpt.settings.errors import exit_on_user_error
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.terminal import say


def steps_for(parts: Path, characters: int, tokens_per_step: int, tokens: Sequence[Path]) -> int:
    """Steps after which training has read so many characters, on average over the order of the blocks.

    Args:
        parts: folder of parts.py.
        characters: to read.
        tokens_per_step: of the tokenizer that made `tokens`.
        tokens: what training reads: folders of `dataset tokens`, named like their parts, as often as it reads them.
    """
    sizes = read_object(parts / "books.json")["parts"]
    made = sum(read_object(folder / "manifest.json")["splits"]["train"]["tokens"] for folder in tokens)
    return math.ceil(characters * made / sum(sizes[folder.name] for folder in tokens) / tokens_per_step)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Print the number."""
    parts, characters, tokens_per_step, *tokens = sys.argv[1:] if argv is None else argv
    say(str(steps_for(Path(parts), int(characters), int(tokens_per_step), [Path(folder) for folder in tokens])))


if __name__ == "__main__":
    main()
