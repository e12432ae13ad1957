"""Optimizer states in safetensors, by the names of the weights, for any number of processes.

A process writes what it holds: everything without ZeRO, shards of flattened tensors with it. A reader assembles the
shards that it needs, so that a run may resume with another number of processes or another ZeRO stage. Nothing is
gathered for writing, and nothing is a pickle.
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
from novelgpt.settings.terminal import counted
from novelgpt.training.checkpoints.weights import StoredWeights, gather_and_set

FILES = "optimizer-*.safetensors"
# Beside an optimizer's own states: the fp32 weights that ZeRO trains; the model's are copies of them.
MASTER = "fp32"
# In a tensor's name, before the offset of the shard in the flattened tensor.
PLACE = "@"
METADATA = "scalars"
# Types of settings that JSON can hold.
PLAIN = (int, float, list, tuple, str, bool)


@dataclass
class Shard:
    """The part of one weight that this process holds.

    Attributes:
        name: of the weight.
        start: offset of the shard in the flattened weight.
        numel: its elements.
        flat: the tensor that the optimizer steps, with shards of other weights, too.
        offset: of the shard in `flat`.
    """

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int


def write_states(folder: Path, model: nn.Module, optimizer: Any, rank: int, processes: int) -> None:
    """Write what this process holds as optimizer-RANK-of-PROCESSES.safetensors.

    Args:
        folder: of the checkpoint.
        model: names the trained weights.
        optimizer: the Trainer's, with accelerate's and DeepSpeed's wrappers around it.
        rank: of this process.
        processes: of the run.

    Raises:
        UserError: DeepSpeed keeps the states where they cannot be read.
        OSError: the disk is full, for example.
    """
    inner, zero = innermost(optimizer), zero_optimizer(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    if zero is None:
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        for tensor, state in inner.state.items():
            name = names[id(tensor)]
            numbers = scalars.setdefault(name, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
                elif isinstance(value, (torch.Tensor, int, float)):
                    numbers[key] = float(value)
    else:
        for shard in _shards(model, zero):
            numbers = scalars.setdefault("", {})
            for key, value in {MASTER: shard.flat, **inner.state[shard.flat]}.items():
                if isinstance(value, torch.Tensor) and value.shape == shard.flat.shape:
                    part = value.detach().narrow(0, shard.offset, shard.numel)
                    tensors[f"{shard.name}/{key}{PLACE}{shard.start}"] = part.cpu().clone()
                elif isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and not value.dim()):
                    numbers[key] = float(value)
    groups = [
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in ({**group, "params": None} for group in inner.param_groups)
    ]
    groups = [{key: value for key, value in group.items() if isinstance(value, PLAIN)} for group in groups]
    path = folder / f"optimizer-{rank}-of-{processes}.safetensors"
    save_file(tensors, path, metadata={METADATA: json.dumps({"weights": scalars, "groups": groups})})
    follow_umask(path)


def read_states(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Load what `write_states` has written into the optimizer and, with ZeRO's fp32 weights, into the model.

    Every process calls this. The model holds the weights of the checkpoint already, rounded where ZeRO keeps them so.

    Raises:
        UserError: the states belong to other weights.
    """
    inner, zero = innermost(optimizer), zero_optimizer(optimizer)
    with ExitStack() as stack:
        states = StoredStates(folder, stack)
        _set_groups(inner, states.groups)
        if zero is None:
            _read_plain(states, model, inner)
            return
        weights = StoredWeights(folder, stack)
        if any("ds_id" in vars(weight) for weight in model.parameters()):
            gather_and_set(
                model,
                lambda name: states.full(name, MASTER) if MASTER in states.keys(name) else weights.tensor(name),
            )
        _read_zero(states, weights, model, inner, zero)


class StoredStates:
    """The states of all weights in the files of a checkpoint, whichever process wrote them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.scalars: dict[str, dict[str, float]] = {}
        self.groups: list[dict[str, Any]] = []
        # By weight and state: (offset, None for one that is not flattened; file; name there), in order of offsets.
        self._shards: dict[str, dict[str, list[tuple[int | None, Any, str]]]] = {}
        for path in sorted(folder.glob(FILES)):
            file = stack.enter_context(safe_open(path, "pt"))
            plain = json.loads(file.metadata()[METADATA])
            self.scalars |= plain["weights"]
            self.groups = self.groups or plain["groups"]
            for stored in file.keys():  # noqa: SIM118 (it cannot be iterated over)
                name, _, key = stored.rpartition("/")
                key, _, start = key.partition(PLACE)
                found = self._shards.setdefault(name, {}).setdefault(key, [])
                found.append((int(start) if start else None, file, stored))
                found.sort(key=lambda shard: shard[0] or 0)

    def keys(self, name: str) -> list[str]:
        """The states of a weight."""
        return list(self._shards.get(name, {}))

    def numel(self, name: str, key: str) -> int:
        """Elements of a state."""
        return sum(math.prod(file.get_slice(stored).get_shape()) for _, file, stored in self._shards[name][key])

    def full(self, name: str, key: str) -> torch.Tensor:
        """A complete state, flattened where it was written in shards."""
        tensors = [file.get_tensor(stored) for _, file, stored in self._shards[name][key]]
        return tensors[0] if self._shards[name][key][0][0] is None else torch.cat(tensors)

    def span(self, name: str, key: str, start: int, numel: int) -> torch.Tensor:
        """The elements [start, start + numel) of the flattened state; only the shards that hold them are read."""
        parts = []
        for offset, file, stored in self._shards[name][key]:
            if offset is None:
                return self.full(name, key).flatten()[start : start + numel]
            shard = file.get_slice(stored)
            first, end = max(start - offset, 0), min(start + numel - offset, shard.get_shape()[0])
            if first < end:
                parts.append(shard[first:end])
        return torch.cat(parts)


def zero_optimizer(optimizer: Any) -> Any | None:
    """DeepSpeed's optimizer that holds flattened weights; None where there is none.

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
    """The optimizer itself, without the wrappers of accelerate and DeepSpeed."""
    return list(_layers(optimizer))[-1]


def _layers(optimizer: Any) -> Iterator[Any]:
    layer = optimizer
    while layer is not None:
        yield layer
        layer = vars(layer).get("optimizer")


def _shards(model: nn.Module, zero: Any) -> Iterator[Shard]:
    """What this process holds of each trained weight."""
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        tensor: Any = weight  # with the attributes that DeepSpeed adds
        if "ds_id" in vars(weight):
            group, offset, numel = zero.grad_position[zero.get_param_id(weight)]
            flat = zero.fp32_partitioned_groups_flat[group]
            start = numel * zero._get_param_partition_rank(weight)
            # The last shard of a weight is padded with zeros.
            numel = max(0, min(numel, tensor.ds_numel - start))
        else:
            mapping = tensor._hp_mapping
            if mapping is None:
                continue
            flat = innermost(zero).param_groups[mapping.param_group_index]["params"][0]
            offset, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        if numel:
            yield Shard(name, start, numel, flat, offset)


def _read_plain(states: StoredStates, model: nn.Module, inner: Any) -> None:
    """Load the states with the optimizer's own `load_state_dict`, which knows where each one belongs."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    restored: dict[int, dict[str, Any]] = {}
    for index, weight in enumerate(tensor for group in inner.param_groups for tensor in group["params"]):
        name = names[id(weight)]
        _check_size(states, name, weight.numel())
        values = {key: states.full(name, key) for key in states.keys(name)}
        if MASTER in values:
            weight.data.copy_(values.pop(MASTER).view(weight.shape))
        if values:
            restored[index] = {
                key: value.view(weight.shape) if value.numel() == weight.numel() else value
                for key, value in values.items()
            }
            # ZeRO has one set of numbers, such as the count of steps, for all weights.
            restored[index] |= _numbers(states.scalars.get(name, states.scalars.get("", {})), inner)
    inner.load_state_dict({"state": restored, "param_groups": inner.state_dict()["param_groups"]})


def _read_zero(states: StoredStates, weights: StoredWeights, model: nn.Module, inner: Any, zero: Any) -> None:
    filled: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for shard in _shards(model, zero):
        _check_size(states, shard.name, shard.start + shard.numel)
        keys = states.keys(shard.name)
        values = {key: states.span(shard.name, key, shard.start, shard.numel) for key in keys}
        if MASTER not in values:  # written without ZeRO, where they are the model's
            values[MASTER] = weights.tensor(shard.name).flatten()[shard.start : shard.start + shard.numel]
        shard.flat.data.narrow(0, shard.offset, shard.numel).copy_(values.pop(MASTER))
        flat, state = filled.setdefault(id(shard.flat), (shard.flat, {}))
        for key, value in values.items():
            if key not in state:
                # The optimizer may hold the states already, on a device of its choice.
                there = inner.state[flat].get(key) if flat in inner.state else None
                state[key] = torch.zeros_like(flat.data) if there is None else there.zero_()
            state[key].narrow(0, shard.offset, shard.numel).copy_(value)
    for flat, state in filled.values():
        if state:
            inner.state[flat] = state | _numbers(next(iter(states.scalars.values()), {}), inner)
    if "_hp_optimizer_states_linked" in vars(zero):  # ZeRO-1 and 2 look states up through the weights
        zero._hp_optimizer_states_linked = False
        if filled and all(state for _, state in filled.values()):
            zero._lazy_init_hp_params_optimizer_state()


def _check_size(states: StoredStates, name: str, least: int) -> None:
    for key in {MASTER, "exp_avg"} & set(states.keys(name)):
        if states.numel(name, key) < least:
            raise UserError(
                f"the checkpoint's optimizer states of {name} have {states.numel(name, key)} elements, not {least}",
                "resume with the model and the settings that the run was started with",
            )


def _numbers(scalars: dict[str, float], optimizer: Any) -> dict[str, Any]:
    """The numbers of a state as tensors, in which torch's optimizers count; others count in numbers."""
    if type(optimizer).__module__.startswith("torch."):
        return {key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()}
    return {key: int(value) if value.is_integer() else value for key, value in scalars.items()}


def _set_groups(inner: Any, groups: list[dict[str, Any]]) -> None:
    if len(groups) != len(inner.param_groups):
        raise UserError(
            f"the checkpoint's optimizer has {counted(len(groups), 'group of weights')}, this one "
            f"{len(inner.param_groups)}",
            "resume with the settings that the run was started with",
        )
    for group, stored in zip(inner.param_groups, groups, strict=True):
        for key, value in stored.items():
            if key in group and isinstance(group[key], tuple):
                group[key] = tuple(value)
            elif key in group and isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
