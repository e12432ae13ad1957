"""The base of an adapter: where it is, offline unless the user names it, and the vocabulary it needs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_SAFE_NAME
from peft.utils import WEIGHTS_NAME as ADAPTER_NAME
from torch import nn
from transformers import PreTrainedModel

from novelgpt.model.hub import cached_folder, locate, looks_like_path
from novelgpt.model.weight_files import stored_tensors, weight_files
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError

BASE_HELP = "of an adapter: folder or hub name of its base [default: where it lay, or its copy in the hub's cache]"


def find_base(adapter: str, recorded: str, named: ModelArguments | None = None) -> str:
    """Find the base of an adapter: a folder, or a hub name if the user gives one.

    The content of a folder, which may come from anyone, never triggers a download.

    Args:
        adapter: its folder.
        recorded: the base that its folder names.
        named: the base that the user names.

    Raises:
        UserError: the folder gives a hub name of which this host has no copy, and the user gives none.
    """
    if named is not None:
        return locate(named)
    if Path(recorded).is_dir() or looks_like_path(recorded):  # loading reports it if it is missing
        return recorded
    cached = cached_folder(recorded)
    with contextlib.suppress(UserError):
        if cached is not None and weight_files(Path(cached)):
            return cached
    raise UserError(
        f"adapter {adapter} names its base {recorded}, of which this host has no copy, and nothing is fetched on the "
        "word of a folder",
        f"--base {recorded} fetches it, if you trust that name; --base FOLDER takes a copy of yours",
    )


def extend_vocabulary(model: PreTrainedModel, adapter: Path) -> None:
    """Resize a base to the vocabulary that its adapter was trained with; the adapter holds the values.

    Adapters of other tools may have added tokens or removed unused rows. They hold the complete embedding (and head),
    or each added row (peft's `trainable_token_indices`).

    Args:
        model: the base; unchanged if its embedding has as many rows as the adapter's.
        adapter: folder.

    Raises:
        UserError: the adapter lacks some of the rows that are missing in the base.
    """
    files = [adapter / name for name in (ADAPTER_SAFE_NAME, ADAPTER_NAME) if (adapter / name).is_file()][:1]
    shapes = {name: tensor.shape for file in files for name, tensor in stored_tensors(file).items()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {part: name for name, part in model.named_modules()}
    rows = int(embedding.weight.shape[0])
    wanted = _whole_rows(shapes, names[embedding], embedding)
    if wanted is None:
        wanted = max({rows - 1, *_added_rows(adapter, names[embedding])}) + 1
    if wanted == rows:
        return
    untied = isinstance(head, nn.Module) and head in names and head.weight is not embedding.weight
    for kind, part in [("embedding", embedding)] + [("head", head)] * untied:
        whole = _whole_rows(shapes, names[part], part) == wanted
        if not whole and not set(range(rows, wanted)) <= _added_rows(adapter, names[part]):
            raise UserError(
                f"adapter {adapter} was trained with a vocabulary of {wanted} tokens, its base has {rows}, and the "
                f"adapter holds no rows of the {kind} for the others",
                "take the adapter with its embedding and head (peft: save_embedding_layers=True), or name the extended "
                "base that it was trained on with --base",
            )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _whole_rows(shapes: dict[str, tuple[int, ...]], name: str, part: Any) -> int | None:
    """Rows of a matrix of which the adapter holds a complete copy; None without one."""
    prefix = f"base_model.model.{name}."
    found = {
        shape[0]
        for key, shape in shapes.items()
        if key.startswith(prefix) and key.endswith("weight") and "lora_" not in key
        and len(shape) == 2 and shape[1] == part.weight.shape[1]
    }  # fmt: skip
    return max(found, default=None)


def _added_rows(adapter: Path, name: str) -> set[int]:
    """Rows of a matrix that the adapter holds individually."""
    indices = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for part, rows in indices.items() if f".{name}".endswith(f".{part}")), None)
    return {row for row in indices if isinstance(row, int)} if isinstance(indices, list) else set()
