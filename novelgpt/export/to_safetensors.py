"""Pickled weights of a model or an adapter as safetensors, with its other files but code, in a new folder.

    python -m novelgpt.export.to_safetensors FOLDER OUTPUT

Only tensors are read from the pickles, one file at a time; values, types and names stay the same.
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


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Convert the folder that the command line names."""
    parser = CommandParser(
        prog="python -m novelgpt.export.to_safetensors", description="Pickled weights -> safetensors"
    )
    parser.add_argument("folder", type=Path, help="of a model or an adapter whose weights are .bin files")
    parser.add_argument("output", type=Path, help="new folder")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder", "name the folder of a model or an adapter")
    check_model_folder(args.folder)
    with new_output_folder(args.output) as unfinished:
        count = convert(args.folder, unfinished)
    say(f"{counted(count, 'tensor')} written to {args.output}")


def convert(folder: Path, output: Path) -> int:
    """Copy the files of `folder` to `output`, with its pickled weights as safetensors.

    Returns:
        Number of tensors.

    Raises:
        UserError: there are no pickled weights, one file is missing or damaged, or holds more than tensors.
    """
    names = pickled_weights(folder)
    if not names or names[0] not in (ADAPTER_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise UserError(f"{folder} holds no pickled weights", f"name a folder with {WEIGHTS_NAME} or {ADAPTER_NAME}")
    if names[0] == WEIGHTS_INDEX_NAME:
        names = read_index(folder / WEIGHTS_INDEX_NAME)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}", f"fetch the files that {WEIGHTS_INDEX_NAME} names")
    weight_map: dict[str, str] = {}
    size = 0
    for name in names:
        tensors = _read(folder / name)
        save_file(tensors, output / _safe_name(name), metadata={"format": "pt"})
        follow_umask(output / _safe_name(name))
        weight_map |= dict.fromkeys(tensors, _safe_name(name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(names) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (output / _safe_name(WEIGHTS_INDEX_NAME)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in sorted({path for pattern in DESCRIPTIONS for path in folder.glob(pattern)}):
        if path.is_file() and path.name != WEIGHTS_INDEX_NAME:
            shutil.copyfile(path, output / path.name)
    return len(weight_map)


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, each with its own storage, as safetensors requires."""
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
        return {str(name): tensor.detach().clone().contiguous() for name, tensor in content.items()}
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(
            f"{file} is damaged or holds more than tensors, and nothing else is read from a pickle",
            "fetch it again, or get the weights as safetensors",
        ) from error


def _safe_name(name: str) -> str:
    """pytorch_model becomes model; other stems stay."""
    return name.replace(Path(WEIGHTS_NAME).stem, "model", 1).replace(".bin", ".safetensors")


if __name__ == "__main__":
    main()
