"""Pickled weights of a model or an adapter as safetensors, with its other files but code, in a new folder.

    python -m novelgpt.export.to_safetensors FOLDER OUTPUT

Nothing but tensors is taken from the pickles, one file after the other; values, types and names stay as they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import WEIGHTS_NAME as ADAPTER_NAME
from safetensors.torch import save_file
from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from novelgpt.model.folder_checks import check_model_folder, read_index
from novelgpt.model.hub import DESCRIPTIONS
from novelgpt.model.weight_files import pickled_weights
from novelgpt.settings.atomic_files import follow_umask, new_output_folder
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.terminal import counted, say

STEMS = {Path(WEIGHTS_NAME).stem: "model"}  # other stems stay


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Convert the folder that the command line names."""
    parser = CommandParser(
        prog="python -m novelgpt.export.to_safetensors", description="Pickled weights -> safetensors"
    )
    parser.add_argument("folder", type=Path, help="of a model or an adapter whose weights are .bin files")
    parser.add_argument("output", type=Path, help="new folder")
    words = parser.parse_args(argv)
    if not words.folder.is_dir():
        raise UserError(f"{words.folder} is no folder", "name the folder of a model or an adapter")
    check_model_folder(words.folder)
    with new_output_folder(words.output) as unfinished:
        count = convert(words.folder, unfinished)
    say(f"{counted(count, 'tensor')} written to {words.output}")


def convert(folder: Path, output: Path) -> int:
    """Fill `output` with the files of `folder`, its pickled weights as safetensors.

    Returns:
        How many tensors there are.

    Raises:
        UserError: there are no pickles of weights, one is missing or damaged, or holds more than tensors.
    """
    places: dict[str, str] = {}
    size = 0
    files = _pickles(folder)
    for file in files:
        tensors = _read(file)
        name = _safe_name(file.name)
        save_file(tensors, output / name, metadata={"format": "pt"})
        follow_umask(output / name)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (output / _safe_name(WEIGHTS_INDEX_NAME)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in sorted({path for pattern in DESCRIPTIONS for path in folder.glob(pattern)}):
        if path.is_file() and path.name != WEIGHTS_INDEX_NAME:
            shutil.copyfile(path, output / path.name)
    return len(places)


def _pickles(folder: Path) -> list[Path]:
    names = pickled_weights(folder)
    if not names or names[0] not in (ADAPTER_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise UserError(f"{folder} holds no pickled weights", f"name a folder with {WEIGHTS_NAME} or {ADAPTER_NAME}")
    if names[0] != WEIGHTS_INDEX_NAME:
        return [folder / names[0]]
    found = [folder / name for name in read_index(folder / WEIGHTS_INDEX_NAME)]
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}", f"fetch the files that {WEIGHTS_INDEX_NAME} names")
    return found


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, each with a storage of its own, as safetensors wants them."""
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
        return {str(name): tensor.detach().clone().contiguous() for name, tensor in content.items()}
    except Exception as error:  # of any kind: a damaged pickle raises what it likes
        raise UserError(
            f"{file} is damaged or holds more than tensors, and nothing else is read from a pickle",
            "fetch it again, or get the weights as safetensors",
        ) from error


def _safe_name(name: str) -> str:
    for stem, other in STEMS.items():
        name = name.replace(stem, other, 1)
    return name.replace(".bin", ".safetensors")


if __name__ == "__main__":
    main()
