"""Optimizer steps that read so many characters: python …/steps.py PARTS TOKENS CHARACTERS TOKENS_A_STEP."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from novelgpt.settings.errors import exit_on_user_error
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.terminal import say


def steps_for(parts: Path, tokens: Path, characters: int, tokens_a_step: int) -> int:
    """Steps after which training has read so many characters.

    Args:
        parts: folder of parts.py.
        tokens: folder with the tokens of each part, as `dataset tokens` makes them.
        characters: to read.
        tokens_a_step: of the tokenizer that made `tokens`.
    """
    sizes = read_object(parts / "books.json")["parts"]
    names = [name for name in sizes if name != "held_out" and sizes[name]]
    manifests = [read_object(tokens / name / "manifest.json") for name in names]
    made = sum(manifest["splits"]["train"]["tokens"] for manifest in manifests)
    return math.ceil(characters * made / sum(sizes[name] for name in names) / tokens_a_step)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Print the number."""
    parts, tokens, characters, tokens_a_step = sys.argv[1:] if argv is None else argv
    say(str(steps_for(Path(parts), Path(tokens), int(characters), int(tokens_a_step))))


if __name__ == "__main__":
    main()
