"""The weights in a checkpoint's safetensors: read by the names that the model has for them, and verified."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.warning import PeftWarning
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from novelgpt.model.folder_checks import read_index
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process

# Names listed in a message.
MAX_NAMES = 3
# Values checked at once.
SLICE_ELEMENTS = 1 << 26


class StoredWeights:
    """The tensors in the weight files of a folder, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}  # by the names in them
        for path in weight_paths(folder):
            file = stack.enter_context(safe_open(path, "pt"))
            self.files |= dict.fromkeys(file.keys(), file)

    def shape(self, stored: str) -> list[int]:
        """Shape of a tensor, by its name in the files."""
        return self.files[stored].get_slice(stored).get_shape()  # type: ignore[no-any-return]

    def finite(self, stored: str) -> bool:
        """Whether all values of a tensor are finite, by its name in the files."""
        shape = self.shape(stored)
        if not shape:
            return bool(torch.isfinite(self.files[stored].get_tensor(stored)).all())
        values = self.files[stored].get_slice(stored)
        rows = max(1, SLICE_ELEMENTS // max(1, math.prod(shape[1:])))
        return all(bool(torch.isfinite(values[row : row + rows]).all()) for row in range(0, shape[0], rows))

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor by the model's name for it; adapters are stored without the name that peft gives them.

        Raises:
            UserError: there is none.
        """
        for stored in (name, name.replace(".default.", "."), name.removesuffix(".default")):
            if stored in self.files:
                return self.files[stored].get_tensor(stored)  # type: ignore[no-any-return]
        raise UserError(
            f"{self.folder} holds no weights named {name}",
            "resume with as many processes and the ZeRO stage that the checkpoint was written with",
        )


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a model or an adapter in a folder; none where none are complete."""
    for name in (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    return [folder / name for name in read_index(index)]


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Load the weights of a folder written by `save_pretrained` into a model in memory; all of them, or none.

    Args:
        folder: of a checkpoint.
        model: of the same architecture; its weights are not sharded (ZeRO-3).

    Raises:
        UserError: the folder lacks some of them.
    """
    tensors = model.state_dict()
    with ExitStack() as stack:
        stored = StoredWeights(folder, stack)
        found = [name for name in tensors if name in stored.files]
        filled = {tensors[name].data_ptr() for name in found}  # tied weights are stored once, under any of their names
        if all(tensor.data_ptr() in filled for tensor in tensors.values()):
            for name in found:
                tensors[name].copy_(stored.tensor(name))
            return
    # Some architectures are stored under other names than in memory, as the experts of a mixture, one by one.
    outcome: Any = type(model).from_pretrained(
        folder, config=copy.deepcopy(model.config), dtype=model.dtype, use_safetensors=True, output_loading_info=True
    )
    loaded, report = outcome
    if report["missing_keys"]:
        raise UserError(
            f"{folder} lacks {len(report['missing_keys'])} weights: {_listed(list(report['missing_keys']))}",
            "resume from another checkpoint",
        )
    model.load_state_dict(loaded.state_dict())


def gather_and_set(model: nn.Module, stored: Callable[[str], torch.Tensor]) -> None:
    """Set the trained weights of a model that ZeRO-3 shards, which `stored` reads by name. All processes call this."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, weight in model.named_parameters():
        if weight.requires_grad:
            with GatheredParameters([weight], modifier_rank=0), torch.no_grad():
                if is_first_process():
                    weight.copy_(stored(name).view(weight.shape))


def expected_weights(model: nn.Module) -> dict[str, int]:
    """Names of the tensors that a saved model must hold, and how many elements; 0 where that is not known here.

    Tensors that share their values are stored once, under any of their names. Called by all processes.
    """
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():
            # Only the names are used, so that sharded weights (ZeRO-3) will do.
            warnings.filterwarnings("ignore", message=r"Adapter .* have invalid shape", category=PeftWarning)
            return dict.fromkeys(get_peft_model_state_dict(model), 0)
    # Under ZeRO-3, which shards weights, ds_numel is the number of elements.
    return {name: int(vars(weight).get("ds_numel", weight.numel())) for name, weight in model.named_parameters()}


def check_weights(folder: Path, expected: dict[str, int], moved: bool) -> None:
    """Read back what was just written and check every value.

    Args:
        folder: of the checkpoint, or of final weights.
        expected: as `expected_weights` gives it.
        moved: adapters have been trained, so that some of their B matrices, zero at first, are not zero any more.

    Raises:
        UserError: nothing there, tensors missing or empty, values that are not finite, an adapter that does nothing.
    """
    remedy = "nothing older was deleted: see the messages above, and resume from the checkpoint before"
    with ExitStack() as stack:
        try:
            stored = StoredWeights(folder, stack)
            problem = _problem(stored, expected, moved)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            problem = f"cannot be read back: {error}"
    if problem is not None:
        raise UserError(f"the weights saved at {folder.name.removesuffix('.unfinished')} {problem}", remedy)


def _problem(stored: StoredWeights, expected: dict[str, int], moved: bool) -> str | None:
    names = stored.files
    if not names:
        return (
            "are empty: no tensor was written. Under ZeRO-3 the DeepSpeed settings need "
            '"stage3_gather_16bit_weights_on_model_save": true'
        )
    empty = [name for name in names if not math.prod(stored.shape(name))]
    if empty:
        return f"are empty: {_listed(empty)}"
    # Some architectures are stored under other names than they have in memory: then the elements must add up.
    missing = [name for name in expected if name not in names]
    total = sum(math.prod(stored.shape(name)) for name in names)
    if missing and (not sum(expected.values()) or total < sum(expected.values())):
        return f"lack {len(missing)} of {len(expected)} tensors: {_listed(missing)}"
    not_finite = [name for name in names if not stored.finite(name)]
    if not_finite:
        return f"hold values that are not finite: {_listed(not_finite)}"
    matrices = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
    if moved and matrices and not any(bool(stored.tensor(name).any()) for name in matrices):
        return "are those of an adapter that does nothing: every lora_B is zero after steps that should have moved it"
    return None


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
