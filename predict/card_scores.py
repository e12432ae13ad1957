"""Scores of a prediction in the model card of what it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from novelgpt.model.card import SCORES, code, read_card, table, write_card
from novelgpt.settings.atomic_files import hash_file
from novelgpt.settings.terminal import say

HEADER = ["rows of", "rows", "rouge-1", "rouge-2", "rouge-l", "bleu4_char", "rep4_char", "perplexity", "stopped"]
NOTE = "By `predict`, whose scores.json has all scores with their definitions, intervals and settings."


def add_scores(folder: Path, data_files: Sequence[str], scores: Mapping[str, Any]) -> None:
    """Add a line to the scores of a model's card, in place of an earlier one of the same rows.

    Nothing happens where the folder has no card, or one that somebody has edited, or where rows came through a pipe,
    which cannot be read again to name them.

    Args:
        folder: of the model.
        data_files: whose rows were answered.
        scores: what scores.json holds.
    """
    card = read_card(folder)
    if card is None or not all(Path(file).is_file() for file in data_files):
        return
    hashed = [(Path(file).name, hash_file(Path(file))[0]) for file in data_files]
    names = ", ".join(f"{code(name)} sha256 {code(digest[:16])}" for name, digest in hashed)
    figures = [f"{scores[name]:.4f}" if name in scores else "" for name in HEADER[2:]]
    (line,) = table(HEADER, [[names, str(scores["rows"]), *figures]]).splitlines()[2:]
    before = [row for row in card.sections.get(SCORES, "").splitlines()[4:] if not _same_rows(row, line)]
    head = table(HEADER, [])
    card.sections[SCORES] = "\n".join([NOTE, "", head, *before, line])
    if "rouge-l" in scores:
        card.metadata["metrics"] = sorted({*card.metadata.get("metrics", []), "rouge"})
    try:
        write_card(folder, card)
    except OSError as error:
        say(f"the card of {folder} does not get the scores: {error.strerror or error}", style="yellow")


def _same_rows(one: str, other: str) -> bool:
    """Whether two lines of the table are of the same rows of the same files."""
    return one.split(" | ")[:2] == other.split(" | ")[:2]
