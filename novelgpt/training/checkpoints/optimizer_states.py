"""What an optimizer remembers, by the names of the weights, in safetensors; for any number of processes.

A process writes what it holds: all of it without ZeRO, pieces of flattened tensors with it. Who reads puts together the
pieces that it needs, so that a run may go on with another number of processes or another ZeRO stage. Nothing is
gathered to write, and nothing is a pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from novelgpt.settings.atomic_files import follow_umask
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import counted
from novelgpt.training.checkpoints.weights import StoredWeights

FILES = "optimizer-*.safetensors"
# Beside an optimizer's own states: the fp32 weights that ZeRO trains, of which the model's are copies.
MASTER = "fp32"
# In a tensor's name before the place at which its piece of the flattened tensor starts.
PLACE = "@"
METADATA = "scalars"


@dataclass
class Piece:
    """A part of one weight's states that this process holds.

    Attributes:
        name: of the weight.
        start: place of the piece in the flattened weight.
        numel: its elements.
        flat: the tensor that the optimizer steps, with pieces of other weights, too.
        offset: place of the piece in `flat`.
    """

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int


def write_states(folder: Path, model: nn.Module, optimizer: Any, rank: int, processes: int) -> None:
    """Write optimizer-RANK-of-PROCESSES.safetensors of what this process holds.

    Args:
        folder: of the checkpoint.
        model: whose trained weights are named.
        optimizer: the Trainer's, with accelerate's and DeepSpeed's wrappers around it.
        rank: of this process.
        processes: of the run.

    Raises:
        UserError: DeepSpeed keeps the states where they cannot be read.
        OSError: the disk is full, for example.
    """
    inner = innermost(optimizer)
    zero = zero_optimizer(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    if zero is None:
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        for tensor, state in inner.state.items():
            _take(state, f"{names[id(tensor)]}/", scalars.setdefault(names[id(tensor)], {}), tensors)
    else:
        for piece in _pieces(model, zero):
            state = inner.state[piece.flat]
            of_flat = {key: value for key, value in state.items() if _is_flat(value, piece.flat)}
            for key, value in {MASTER: piece.flat, **of_flat}.items():
                part = value.detach().narrow(0, piece.offset, piece.numel)
                tensors[f"{piece.name}/{key}{PLACE}{piece.start}"] = part.cpu().clone()
            others = {key: value for key, value in state.items() if key not in of_flat}
            _take(others, "", scalars.setdefault("", {}), {})
    groups = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    plain = {"weights": scalars, "groups": [_plain(group) for group in groups]}
    path = folder / f"optimizer-{rank}-of-{processes}.safetensors"
    save_file(tensors, path, metadata={METADATA: json.dumps(plain)})
    follow_umask(path)


def read_states(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Give the optimizer, and with ZeRO's fp32 weights the model, what `write_states` has written.

    Every process calls this. The model holds the weights of the checkpoint already, rounded where ZeRO keeps them so.

    Raises:
        UserError: the states belong to other weights.
    """
    inner = innermost(optimizer)
    zero = zero_optimizer(optimizer)
    with ExitStack() as stack:
        states = StoredStates(folder, stack)
        _set_groups(inner, states.groups)
        if zero is None:
            _read_plain(states, model, inner)
        else:
            weights = StoredWeights(folder, stack)
            if any("ds_id" in vars(weight) for weight in model.parameters()):
                _gather_and_set(states, weights, model)
            _read_zero(states, weights, model, inner, zero)


class StoredStates:
    """The states of all weights in the files of a checkpoint, whoever wrote which piece."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.scalars: dict[str, dict[str, float]] = {}
        self.groups: list[dict[str, Any]] = []
        self._pieces: dict[str, dict[str, list[tuple[int | None, Any, str]]]] = {}
        for path in sorted(folder.glob(FILES)):
            file = stack.enter_context(safe_open(path, "pt"))
            plain = json.loads(file.metadata()[METADATA])
            self.scalars |= plain["weights"]
            self.groups = self.groups or plain["groups"]
            for stored in file.keys():  # noqa: SIM118 (it cannot be iterated over)
                name, _, key = stored.rpartition("/")
                key, _, start = key.partition(PLACE)
                place = int(start) if start else None
                self._pieces.setdefault(name, {}).setdefault(key, []).append((place, file, stored))

    def keys(self, name: str) -> list[str]:
        """Which states of a weight there are."""
        return list(self._pieces.get(name, {}))

    def numel(self, name: str, key: str) -> int:
        """Elements of a state."""
        return sum(math.prod(file.get_slice(stored).get_shape()) for _, file, stored in self._pieces[name][key])

    def whole(self, name: str, key: str) -> torch.Tensor:
        """A state as it is, flattened where it was written in pieces."""
        found = self._pieces[name][key]
        if found[0][0] is None:
            return found[0][1].get_tensor(found[0][2])  # type: ignore[no-any-return]
        ordered = sorted(found, key=lambda piece: piece[0] or 0)
        return torch.cat([file.get_tensor(stored) for _, file, stored in ordered])

    def span(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        """The elements [start, start + numel) of the flattened state; only what holds them is read."""
        found = self._pieces[name][key]
        if found[0][0] is None:
            return self.whole(name, key).flatten()[start : start + numel]
        parts = []
        for place, file, stored in sorted(found, key=lambda piece: piece[0] or 0):
            assert place is not None
            piece = file.get_slice(stored)
            begin, end = max(start - place, 0), min(start + numel - place, piece.get_shape()[0])
            if begin < end:
                parts.append(piece[begin:end])
        return torch.cat(parts)

    def of_weight(self, name: str) -> dict[str, float]:
        """Numbers that are no tensors, such as the count of steps; ZeRO has one for all weights."""
        return self.scalars.get(name, self.scalars.get("", {}))


def zero_optimizer(optimizer: Any) -> Any | None:
    """DeepSpeed's optimizer that holds the weights in pieces; None where there is none.

    Raises:
        UserError: DeepSpeed keeps the states where they cannot be read.
    """
    layers = list(_layers(optimizer))
    if not any(type(layer).__module__.startswith("deepspeed.") for layer in layers):
        return None
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    for layer in layers:
        if isinstance(layer, (ZeROOptimizer, BF16_Optimizer)):
            return layer
        if type(layer).__module__.startswith("deepspeed.runtime.fp16"):
            raise UserError(
                "DeepSpeed's fp16 without ZeRO keeps optimizer states that cannot be saved",
                'take "stage": 1 or higher in the DeepSpeed settings',
            )
    return None


def innermost(optimizer: Any) -> Any:
    """The optimizer that computes, within the wrappers of accelerate and DeepSpeed."""
    return list(_layers(optimizer))[-1]


def _layers(optimizer: Any) -> Iterator[Any]:
    layer = optimizer
    while layer is not None:
        yield layer
        layer = vars(layer).get("optimizer")


def _pieces(model: nn.Module, zero: Any) -> Iterator[Piece]:
    """What this process holds of each trained weight."""
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        tensor: Any = weight  # with what DeepSpeed hangs on it
        if "ds_id" in vars(weight):
            group, offset, numel = zero.grad_position[zero.get_param_id(weight)]
            flat = zero.fp32_partitioned_groups_flat[group]
            start = numel * zero._get_param_partition_rank(weight)
            # The last piece of a weight is filled up with zeros.
            numel = max(0, min(numel, tensor.ds_numel - start))
        else:
            mapping = tensor._hp_mapping
            if mapping is None:
                continue
            flat = innermost(zero).param_groups[mapping.param_group_index]["params"][0]
            offset, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        if numel:
            yield Piece(name, start, numel, flat, offset)


def _read_plain(states: StoredStates, model: nn.Module, inner: Any) -> None:
    """By the optimizer's own `load_state_dict`, which knows where each state belongs."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    is_torch = type(inner).__module__.startswith("torch.")
    restored: dict[int, dict[str, Any]] = {}
    ordered = [tensor for group in inner.param_groups for tensor in group["params"]]
    for index, weight in enumerate(ordered):
        name = names[id(weight)]
        _check_size(states, name, weight.numel())
        values = {key: states.whole(name, key) for key in states.keys(name)}
        if MASTER in values:
            weight.data.copy_(values.pop(MASTER).view(weight.shape))
        state = {
            key: value.view(weight.shape) if value.numel() == weight.numel() else value for key, value in values.items()
        }
        if state:
            restored[index] = state | _numbers(states.of_weight(name), is_torch)
    inner.load_state_dict({"state": restored, "param_groups": inner.state_dict()["param_groups"]})


def _read_zero(states: StoredStates, weights: StoredWeights, model: nn.Module, inner: Any, zero: Any) -> None:
    is_torch = type(inner).__module__.startswith("torch.")
    filled: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for piece in _pieces(model, zero):
        _check_size(states, piece.name, piece.start + piece.numel)
        keys = states.keys(piece.name)
        values = {key: states.span(piece.name, key, piece.start, piece.numel) for key in keys}
        if MASTER not in values:  # written without ZeRO, whose weights are the model's
            values[MASTER] = weights.tensor(piece.name).flatten()[piece.start : piece.start + piece.numel]
        piece.flat.data.narrow(0, piece.offset, piece.numel).copy_(values.pop(MASTER))
        flat, state = filled.setdefault(id(piece.flat), (piece.flat, {}))
        for key, value in values.items():
            if key not in state:
                # The optimizer may hold the states already, on a device of its choice.
                there = inner.state[flat].get(key) if flat in inner.state else None
                state[key] = torch.zeros_like(flat.data) if there is None else there.zero_()
            state[key].narrow(0, piece.offset, piece.numel).copy_(value)
    scalars = next(iter(states.scalars.values()), {})
    for flat, state in filled.values():
        if state:
            inner.state[flat] = state | _numbers(scalars, is_torch)
    if "_hp_optimizer_states_linked" in vars(zero):  # ZeRO-1 and 2 look states up through the weights
        zero._hp_optimizer_states_linked = False
        if filled and all(state for _, state in filled.values()):
            zero._lazy_init_hp_params_optimizer_state()


def _gather_and_set(states: StoredStates, weights: StoredWeights, model: nn.Module) -> None:
    """The weights of the model itself under ZeRO-3, which no file can be loaded into as they lie in parts."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, weight in model.named_parameters():
        if weight.requires_grad:
            with GatheredParameters([weight], modifier_rank=0):
                if is_first_process():
                    stored = states.whole(name, MASTER) if MASTER in states.keys(name) else weights.tensor(name)
                    weight.data.copy_(stored.view(weight.shape))


def _check_size(states: StoredStates, name: str, least: int) -> None:
    for key in {MASTER, "exp_avg"} & set(states.keys(name)):
        if states.numel(name, key) < least:
            raise UserError(
                f"the checkpoint's optimizer states of {name} have {states.numel(name, key)} elements, not {least}",
                "go on with the model and the settings that the run was started with",
            )


def _take(state: dict[str, Any], prefix: str, scalars: dict[str, float], tensors: dict[str, torch.Tensor]) -> None:
    """Sort a weight's states into tensors and numbers."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            tensors[prefix + key] = value.detach().cpu().contiguous()
        elif isinstance(value, (torch.Tensor, int, float)):
            scalars[key] = float(value)


def _numbers(scalars: dict[str, float], is_torch: bool) -> dict[str, Any]:
    """torch's optimizers count in tensors, others in numbers."""
    if is_torch:
        return {key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()}
    return {key: int(value) if value.is_integer() else value for key, value in scalars.items()}


def _is_flat(value: Any, flat: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == flat.shape


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """Settings of a group that JSON can hold."""
    values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
    return {key: value for key, value in values.items() if isinstance(value, (int, float, list, tuple, str, bool))}


def _set_groups(inner: Any, groups: list[dict[str, Any]]) -> None:
    if len(groups) != len(inner.param_groups):
        raise UserError(
            f"the checkpoint's optimizer has {counted(len(groups), 'group of weights')}, this one "
            f"{len(inner.param_groups)}",
            "go on with the settings that the run was started with",
        )
    for group, stored in zip(inner.param_groups, groups, strict=True):
        for key, value in stored.items():
            if key in group and isinstance(group[key], tuple):
                group[key] = tuple(value)
            elif key in group and isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
