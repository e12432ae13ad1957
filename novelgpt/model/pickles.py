"""Weights that are pickles. Reading a pickle can run code, so none is read unless the user allows it.

Where it is allowed, nothing but tensors is taken from it (`weights_only`), which torch has had to mend more than once.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_SAFE_NAME
from peft.utils import WEIGHTS_NAME as ADAPTER_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from novelgpt.model.weight_files import stored_tensors
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import python_module

SAFE_SUFFIX = ".safetensors"


def check_no_pickles(folder: Path, allowed: bool) -> None:
    """Refuse a folder of a model or an adapter whose weights would be read from pickles.

    Args:
        folder: of the files; a hub's name passes, as `from_pretrained` chooses its files.
        allowed: --allow_pickles was given.

    Raises:
        UserError: they would, and it is not allowed.
    """
    if allowed:
        return
    pickles = pickled_weights(folder)
    if pickles:
        raise UserError(
            f"the weights of {folder} are pickles ({', '.join(pickles)}), and reading a pickle can run code",
            "take its safetensors where there are any; if you trust the source: --allow_pickles, or once and for all "
            f"`{python_module(f'novelgpt.export.to_safetensors {shlex.quote(str(folder))} OUTPUT')}`",
        )


def check_adapter_files(folder: Path, allowed: bool) -> None:
    """Refuse an adapter without weights, or with pickled ones that are not allowed. peft would ask the hub for them.

    Raises:
        UserError: so it is, or its weights are damaged.
    """
    check_no_pickles(folder, allowed)
    if (folder / ADAPTER_SAFE_NAME).is_file():
        whole = [tensor.name for tensor in stored_tensors(folder / ADAPTER_SAFE_NAME) if not tensor.is_floating]
        if whole:
            raise UserError(f"{folder / ADAPTER_SAFE_NAME}: {whole[0]} is of whole numbers", "fetch the file again")
    elif not (folder / ADAPTER_NAME).is_file():
        raise UserError(f"adapter {folder} holds no {ADAPTER_SAFE_NAME}", "copy the adapter's folder again")


def pickled_weights(folder: Path) -> list[str]:
    """Names of the pickles that transformers or peft would read the weights of a folder from; the first few."""
    if (folder / "adapter_config.json").is_file():
        is_safe = (folder / ADAPTER_SAFE_NAME).is_file()
        return [ADAPTER_NAME] if not is_safe and (folder / ADAPTER_NAME).is_file() else []
    named = _named_in_config(folder)
    if named is not None:
        return [] if named.endswith((SAFE_SUFFIX, f"{SAFE_SUFFIX}.index.json")) else [named]
    if (folder / SAFE_WEIGHTS_NAME).is_file() or (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return []
    return [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (folder / name).is_file()][:1]


def _named_in_config(folder: Path) -> str | None:
    """The weight file that config.json names, which transformers prefers to the usual names."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):  # loading tells of a configuration that is missing or damaged
        return None
    return None if named is None else str(named)
