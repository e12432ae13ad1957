"""Record the live bytes of tensors over a step, whether it runs or is only simulated."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
INNER = ("inner forward", "inner backward")


# Largest blocks that a heap holds beyond what is needed: smaller blocks fill the holes that large ones leave, which
# then go to its end. Measured with vocabularies of 151,936: one to three of them.
HOLES = 2


@dataclass
class Heap:
    """An allocator's heap, which holds blocks below `limit` bytes and never shrinks; larger ones are returned at once.

    Attributes:
        limit: bytes; 0 where all blocks are returned.
        used: bytes that others hold in it.
        high: its size so far, in bytes.
    """

    limit: int
    used: int = 0
    high: int = 0


class LiveBytes(TorchDispatchMode):
    """Records each storage that operations allocate, and when it is freed, while the mode is entered.

    Memory within kernels is not seen, except for operands that CPUs convert first where an elementwise operation mixes
    dtypes.

    Attributes:
        part: of new storages, unless they are claimed for another one later. Casts of "weights" are a part of their
            own, "copies".
        section: of the step, set by the caller. "inner forward" and "inner backward" are those of a layer that stands
            for several.
        inner: number of layers that this one stands for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.section = ""
        self.inner = 1
        self._events: list[tuple[str, int, int]] = []  # section, number of a storage, bytes; negative where it is freed
        self._parts: list[str] = []  # by number of a storage
        self._births: list[str] = []  # sections, likewise
        self._numbers: dict[int, int] = {}  # by address, of live storages

    def add(self, size: int, part: str) -> None:
        """Count `size` bytes that stay allocated."""
        self._events.append((self.section, self._new_number(part), size))

    def claim(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Assign these tensors' storages to `part`, from their allocation on."""
        for tensor in tensors:
            self._note(tensor, part)
            self._parts[self._numbers[tensor.untyped_storage()._cdata]] = part

    def peak(self, without: frozenset[str] = frozenset(), heap: Heap | None = None) -> Counter[str]:
        """Return the bytes of each part at the peak of their sum.

        Args:
            without: parts that do not count.
            heap: of small blocks; what it keeps is the part "kept". None: every block is returned at once.
        """
        heap = heap or Heap(limit=0)
        live: Counter[str] = Counter()
        highest: Counter[str] = Counter()
        small, large, peak, freed = heap.used, 0, 0, 0
        for part, size, count in self._history():
            if part in without:
                continue
            live[part] += size * count
            if abs(size) < heap.limit:
                freed = max(freed, -size)
                small += size * count
                heap.high = max(heap.high, small)
            else:
                large += size * count
            if heap.high + large > peak:
                peak, highest = heap.high + large, live.copy()
                highest["kept"] = heap.high - small
        highest["kept"] += HOLES * freed
        return highest

    def _history(self) -> Iterator[tuple[str, int, int]]:
        """Yield part, size and count of the blocks that are allocated or freed, in order, with all inner layers."""
        for section, events in itertools.groupby(self._events, key=lambda event: event[0]):
            once = [(self._parts[number], size, self._births[number]) for _, number, size in events]
            for _ in range(self.inner if section in INNER else 1):
                for part, size, birth in once:
                    # Casts that end with the autocast that made them end for all layers at once.
                    count = self.inner if section == "head" and birth == INNER[0] and part == "copies" else 1
                    yield part, size, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record the storages of its results."""
        converted = _converted_bytes(func, args)
        if converted:
            number = self._new_number(self.part)
            self._events.append((self.section, number, converted))
        outputs = func(*args, **(kwargs or {}))
        source = self._numbers.get(args[0].untyped_storage()._cdata) if func is aten._to_copy.default else None
        cast = source is not None and self._parts[source] == "weights"
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._note(output, "copies" if cast else self.part)
        if converted:
            self._events.append((self.section, number, -converted))
        return outputs

    def _note(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return
        number, size = self._new_number(part), storage.nbytes()
        self._numbers[address] = number
        self._events.append((self.section, number, size))
        weakref.finalize(storage, self._forget, address, number, size).atexit = False

    def _forget(self, address: int, number: int, size: int) -> None:
        del self._numbers[address]
        self._events.append((self.section, number, -size))

    def _new_number(self, part: str) -> int:
        self._parts.append(part)
        self._births.append(self.section)
        return len(self._parts) - 1


def _converted_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes of the copies that a CPU makes of operands of an elementwise operation on mixed dtypes."""
    if torch.Tag.pointwise not in func.tags:
        return 0
    operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() and arg.is_floating_point()]
    widest = max((operand.element_size() for operand in operands), default=0)
    return sum(
        operand.numel() * widest
        for operand in operands
        if operand.element_size() < widest and operand.device.type == "cpu"
    )


class Assumptions(TorchDispatchMode):
    """Answers data-dependent operations on fake tensors.

    A mask selects everything, a search finds nothing. A number that is read back is 1, and a boolean is False: not all
    of a batch is free of padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or return an assumption."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # two of three calls; answered here, they skip the other modes
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1
        if func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if func is aten._grouped_mm.default:  # whose fake kernel takes bf16 only
            return _grouped_product(*args[:3])
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
        return func(*args, **(kwargs or {}))


def _grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor | None = None) -> torch.Tensor:
    """Return the result of the products of a mixture's experts: [rows, columns] per row's group, or one per group."""
    if left.dim() == 2 and right.dim() == 2:
        assert ends is not None
        return left.new_empty((len(ends), left.shape[0], right.shape[1]))
    return left.new_empty((*left.shape[:-1], right.shape[-1]))
