"""What a folder of the recipe is made from, recorded before its first step and compared by every later run.

    python …/origin.py OUT CORPUS PAPERS HELD_OUT NAME=VALUE…

Until OUT has its parts, nothing has been made that would not follow a change, and the record is written anew. From then
on another corpus, other papers, another list of held-out works or other settings are refused, and until the weights are
there, another version of the recipe. A folder that has parts and no record is from an earlier version, and gets one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.novels.held_out.works import load_held_out_works
from dataset.novels.sources.sources import list_folder
from novelgpt.settings.atomic_files import atomic_write, hash_file, hash_json
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parsed_files import read_object

RECORD = "made_from.json"
# What decides the weights; the card, the export and the comparison of tokenizers can be made again.
RECIPE_FILES = ("tiny_base.sh", "tiny_base/model.json", "tiny_base/stable.yaml", "tiny_base/decay.yaml",
                "tiny_base/parts.py")  # fmt: skip


def recipe_hash() -> str:
    """sha256 of the names and contents of the files that decide the weights."""
    recipes = Path(__file__).resolve().parents[1]
    lines = (f"{name} {hash_file(recipes / name)[0]}\n" for name in RECIPE_FILES)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def recorded(out: Path) -> tuple[str, dict[str, str]]:
    """`recipe_hash` at the first step of what is in `out`, "" where it was not recorded; and what it is made from."""
    found = read_object(out / RECORD)
    return str(found["recipe"]), found["made_from"]


def describe(corpus: Path, papers: Path, held_out: str, settings: Sequence[str]) -> dict[str, Any]:
    """All that decides what the recipe makes, by the name that a user knows it by.

    Args:
        corpus: folder of novels.
        papers: title/abstract rows.
        held_out: list of held-out works.
        settings: NAME=VALUE.

    Raises:
        UserError: one of them cannot be read.
    """
    try:
        novels = [(path.relative_to(corpus).as_posix(), hash_file(path)[0]) for path in list_folder(corpus)[0]]
        paper_rows = hash_file(papers)[0]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "name a folder of novels, and a file of rows") from None
    found = {"CORPUS": hash_json(novels), "PAPERS": paper_rows, "HELD_OUT": load_held_out_works(held_out).digest}
    return found | {name: value for name, _, value in (setting.partition("=") for setting in settings)}


def settle(out: Path, made_from: dict[str, Any]) -> None:
    """Record what `out` is made from, or compare it.

    Raises:
        UserError: it is made from something else.
    """
    path, has_parts = out / RECORD, (out / "parts" / "books.json").is_file()
    if has_parts and path.is_file():
        recipe, stored = recorded(out)
        changed = [name for name, value in made_from.items() if stored.get(name) != value]
        if changed:
            raise UserError(f"{out} was made with another {', another '.join(changed)}", "name a new OUT")
        if recipe not in ("", recipe_hash()) and not _is_trained(out):
            raise UserError(f"{out} was begun by another version of the recipe", "name a new OUT")
        return
    out.mkdir(parents=True, exist_ok=True)
    recipe = "" if has_parts else recipe_hash()
    atomic_write(path, json.dumps({"made_from": made_from, "recipe": recipe}, ensure_ascii=False, indent=1) + "\n")


def _is_trained(out: Path) -> bool:
    """Whether the weights are there: what remains can be made again."""
    run = out / "decay" / "run.json"
    return run.is_file() and read_object(run).get("status") == "finished"


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Record or compare what the command line names."""
    out, corpus, papers, held_out, *settings = sys.argv[1:] if argv is None else argv
    settle(Path(out), describe(Path(corpus), Path(papers), held_out, settings))


if __name__ == "__main__":
    main()
