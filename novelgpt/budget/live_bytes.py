"""Live bytes of tensors, moment by moment, of steps that really run and of steps that are only simulated."""

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


# Largest blocks that a heap of kept blocks comes to hold beyond what is needed: smaller blocks settle in the holes that
# large ones leave, which then go to its end. Seen with vocabularies of 151,936: one to three of them.
HOLES = 2


@dataclass
class Heap:
    """Where an allocator puts blocks of less than `limit` bytes, and which never shrinks; larger ones go back at once.

    Attributes:
        limit: bytes; 0 where all blocks go back.
        used: bytes that others hold in it.
        high: the most bytes that were held in it.
    """

    limit: int
    used: int = 0
    high: int = 0


class LiveBytes(TorchDispatchMode):
    """Notes each storage that operations make, and when it goes, while the mode is entered.

    Memory that kernels take for themselves is not seen, but for the operands that CPUs first convert where an
    elementwise operation mixes number formats.

    Attributes:
        part: to which what is made now belongs, unless it is claimed for another one later. Casts of "weights" are a
            part of their own, "copies".
        section: of the step, to be named by the caller as time goes on. "inner forward" and "inner backward" are those
            of a layer that stands for several.
        inner: how many layers that one stands for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.section = ""
        self.inner = 1
        self._events: list[tuple[str, int, int]] = []  # section, number of a storage, bytes; negative where it goes
        self._parts: list[str] = []  # by number of a storage
        self._births: list[str] = []  # sections, likewise
        self._numbers: dict[int, int] = {}  # by address, of storages that live

    def add(self, size: int, part: str) -> None:
        """Count `size` bytes that stay."""
        self._events.append((self.section, self._new_number(part), size))

    def claim(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Let these tensors' storages belong to `part`, from their beginning on."""
        for tensor in tensors:
            self._note(tensor, part)
            self._parts[self._numbers[tensor.untyped_storage()._cdata]] = part

    def peak(self, without: frozenset[str] = frozenset(), heap: Heap | None = None) -> Counter[str]:
        """Bytes of each part at the moment when all of them together, `without` some, are most.

        Args:
            without: parts that do not count.
            heap: where small blocks lie; what it keeps is the part "kept". None: every block goes back at once.
        """
        heap = heap or Heap(limit=0)
        live: Counter[str] = Counter()
        highest: Counter[str] = Counter()
        small, large, most, freed = heap.used, 0, 0, 0
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
            if heap.high + large > most:
                most, highest = heap.high + large, live.copy()
                highest["kept"] = heap.high - small
        highest["kept"] += HOLES * freed
        return highest

    def _history(self) -> Iterator[tuple[str, int, int]]:
        """Part, size and number of the blocks that came or went, one after the other, with all inner layers."""
        for section, events in itertools.groupby(self._events, key=lambda event: event[0]):
            once = [(self._parts[number], size, self._births[number]) for _, number, size in events]
            for _ in range(self.inner if section in INNER else 1):
                for part, size, birth in once:
                    # Casts that go with the autocast that made them go for all layers at once.
                    count = self.inner if section == "head" and birth == INNER[0] and part == "copies" else 1
                    yield part, size, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the storages of its results."""
        converted = _converted_bytes(func, args)
        if converted:
            number = self._new_number(self.part)
            self._events.append((self.section, number, converted))
        outputs = func(*args, **(kwargs or {}))
        cast = func is aten._to_copy.default and self._part_of(args[0]) == "weights"
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._note(output, "copies" if cast else self.part)
        if converted:
            self._events.append((self.section, number, -converted))
        return outputs

    def _part_of(self, tensor: torch.Tensor) -> str | None:
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        return None if number is None else self._parts[number]

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
    """Bytes of the copies that a CPU makes of operands of an elementwise operation on mixed floating-point types."""
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
    """Answers what simulated tensors cannot, as they hold no numbers.

    A mask chooses everything, a search finds nothing. A number that is read back is 1, and a truth value is False: not
    all of a batch is free of padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or put an assumption in its place."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # two of three calls: answered here, they take no way through the other modes
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1
        if func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if func is aten._grouped_mm.default:  # whose stand-in knows bf16 alone
            return _grouped_product(*args[:3])
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
        return func(*args, **(kwargs or {}))


def _grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor | None = None) -> torch.Tensor:
    """What the products of a mixture's experts take: [rows, columns] of each group's own, or one for each group."""
    if left.dim() == 2 and right.dim() == 2:
        assert ends is not None
        return left.new_empty((len(ends), left.shape[0], right.shape[1]))
    return left.new_empty((*left.shape[:-1], right.shape[-1]))
