"""What original-style checkpoints of all models have in common: weights of known values, in files of every kind."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Shards = Literal["safetensors", "safetensors_sharded", "bin", "bin_sharded"]

# Importing a file of this content ends the process: nobody asked for it.
CODE = 'raise SystemExit("code of the checkpoint ran")\n'


def fill(shapes: dict[str, tuple[int, ...]], seed: int, golden: bool, norms: str) -> dict[str, torch.Tensor]:
    """Tensors of these shapes: of a sine, for which the original code's outputs are known, or random by `seed`.

    Those with `norms` in their names are near 1.
    """
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, name in enumerate(sorted(shapes)):
        size = torch.Size(shapes[name])
        if golden:
            values = torch.sin(0.37 * torch.arange(size.numel(), dtype=torch.float64) + index).reshape(size)
        else:
            values = torch.randn(size, generator=draw, dtype=torch.float64)
        tensors[name] = ((1 + 0.1 * values) if norms in name else 0.3 * values).float()
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: Shards) -> None:
    """Tensors in one file, or in three with an index, as safetensors or as pickles."""
    safe = shards.startswith("safetensors")
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    parts = 3 if shards.endswith("_sharded") else 1
    numbers = [f"-{part + 1:05}-of-{parts:05}" for part in range(parts)] if parts > 1 else [""]
    names = [f"{stem}{number}.{suffix}" for number in numbers]
    places = {name: names[index % parts] for index, name in enumerate(tensors)}
    for file in names:
        held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        if safe:
            save_file(held, folder / file, metadata={"format": "pt"})
        else:
            torch.save(held, folder / file)
    if parts > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As published: indented, Chinese as it is."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
