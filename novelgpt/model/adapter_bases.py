"""The base of an adapter: where it lies, without a network unless the user names it, and the rows it has to have."""

from __future__ import annotations

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
    """The base to put an adapter on, as a folder; as a hub name only where the user names one.

    What lies in a folder never makes this toolkit ask a network: it may come from anyone.

    Args:
        adapter: its folder.
        recorded: the base that the folder names.
        named: the base that the user names.

    Raises:
        UserError: a hub name of which this host has no copy, and the user names none.
    """
    if named is not None:
        return locate(named)
    if Path(recorded).is_dir() or looks_like_path(recorded):  # which is told where it is read, if it is not there
        return recorded
    cached = cached_folder(recorded)
    if cached is None or not _has_weights(Path(cached)):
        raise UserError(
            f"adapter {adapter} names its base {recorded}, of which this host has no copy, and nothing is fetched on "
            "the word of a folder",
            f"--base {recorded} fetches it, if you trust that name; --base FOLDER takes a copy of yours",
        )
    return cached


def extend_vocabulary(model: PreTrainedModel, adapter: Path) -> None:
    """Give a base the rows of the vocabulary that its adapter was trained with; the adapter brings what is in them.

    Adapters of other tools may have added tokens, or cut unused rows off, and hold the embedding (and the head) whole,
    or each added row (peft's `trainable_token_indices`).

    Args:
        model: the base; nothing is done where its embedding has as many rows as the adapter's.
        adapter: folder.

    Raises:
        UserError: some of the rows that the base lacks are nowhere.
    """
    shapes = {tensor.name: tensor.shape for file in _files(adapter) for tensor in stored_tensors(file)}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {part: name for name, part in model.named_modules()}
    rows = int(embedding.weight.shape[0])
    wanted = _whole_rows(shapes, names[embedding], embedding)
    added = _added_rows(adapter, names[embedding])
    if wanted is None and added and max(added) >= rows:
        wanted = max(added) + 1
        if not _holds_rows(added, rows, wanted):
            raise _lacks_rows(adapter, rows, wanted, "embedding")
    if wanted is None or wanted == rows:
        return
    if isinstance(head, nn.Module) and head in names and head.weight is not embedding.weight:
        given = _whole_rows(shapes, names[head], head) == wanted
        if wanted > rows and not given and not _holds_rows(_added_rows(adapter, names[head]), rows, wanted):
            raise _lacks_rows(adapter, rows, wanted, "head")
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _files(adapter: Path) -> list[Path]:
    return [adapter / name for name in (ADAPTER_SAFE_NAME, ADAPTER_NAME) if (adapter / name).is_file()][:1]


def _whole_rows(shapes: dict[str, tuple[int, ...]], name: str, part: Any) -> int | None:
    """Rows of a matrix of the base that the adapter holds whole; None where it does not."""
    prefix = f"base_model.model.{name}."
    found = {
        shape[0]
        for key, shape in shapes.items()
        if key.startswith(prefix) and key.endswith("weight") and "lora_" not in key
        and len(shape) == 2 and shape[1] == part.weight.shape[1]
    }  # fmt: skip
    return max(found, default=None)


def _added_rows(adapter: Path, name: str) -> set[int]:
    """Rows of a matrix that the adapter holds one by one."""
    indices = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for part, rows in indices.items() if f".{name}".endswith(f".{part}")), None)
    return {row for row in indices if isinstance(row, int)} if isinstance(indices, list) else set()


def _holds_rows(added: set[int], begin: int, end: int) -> bool:
    return sum(begin <= row < end for row in added) == end - begin


def _lacks_rows(adapter: Path, rows: int, wanted: int, what: str) -> UserError:
    return UserError(
        f"adapter {adapter} was trained with a vocabulary of {wanted} tokens, its base has {rows}, and the adapter "
        f"holds no rows of the {what} for the others",
        "take the adapter with its embedding and head (peft: save_embedding_layers=True), or name the extended base "
        "that it was trained on with --base",
    )


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except UserError:
        return False
