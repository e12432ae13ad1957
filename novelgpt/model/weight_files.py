"""The weight files of a local model folder, and the tensors in them, without loading a model."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from novelgpt.model.folder_checks import read_index
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, parse_object

_BYTES_READ_AT_ONCE = 1 << 22
# The format's own limit.
MOST_HEADER_BYTES = 100_000_000
# The names that safetensors gives to the types which weights are stored in.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    name: as in the file; dtype: as safetensors names it ("BF16"); shape: its axes; size: bytes of its values;
    read: (first byte, end) of its values -> those bytes, in pieces. Safe to call from several threads at once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[int, int], Iterator[memoryview]]

    @property
    def is_floating(self) -> bool:
        """Whether its values are, as those of weights are that are not packed."""
        return self.dtype not in _DTYPES or _DTYPES[self.dtype].is_floating_point


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads the weights of `folder` from, in order of their names.

    Raises:
        UserError: there are none, or the index names one that is missing.
    """
    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index_name).is_file():
            files = [folder / file for file in read_index(folder / index_name)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder} lacks {', '.join(missing)}", f"fetch the files that {index_name} names")
            return files
    raise UserError(
        f"{folder} holds no weights", f"name a folder with {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or their shards"
    )


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a .safetensors or a .bin file, in the file's order. Their values are not read yet.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return _in_safetensors(file) if file.suffix == ".safetensors" else _in_bin(file)
    except (ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read: {reason}", "fetch the file again") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating type in which most weights of `folder` are stored."""
    values: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        for tensor in stored_tensors(file):
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is not None and dtype.is_floating_point:
                values[dtype] += tensor.size // dtype.itemsize
    return values.most_common(1)[0][0] if values else torch.float32


def _in_safetensors(file: Path) -> list[StoredTensor]:
    """From the header: its length in 8 bytes, then JSON with the type, shape and place of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        data = file.stat().st_size - 8 - length
        if data < 0 or length > MOST_HEADER_BYTES:
            raise ValueError("it is no safetensors file")
        header = parse_object(opened.read(length), f"{file}: its header")
    tensors, places = [], []
    for name, given in header.items():
        if name == "__metadata__":
            continue
        entry = check_fields(_Entry, given, f"{file}: {name}")
        begin, end = entry.data_offsets
        if end > data:
            raise ValueError("it ends too early")
        dtype = _DTYPES.get(entry.dtype)
        if begin > end or (dtype is not None and end - begin != math.prod(entry.shape) * dtype.itemsize):
            raise ValueError(f"{name} of shape {list(entry.shape)} in {entry.dtype} does not have {end - begin} bytes")
        read = partial(_read_file, file, 8 + length + begin)
        tensors.append(StoredTensor(name, entry.dtype, tuple(entry.shape), end - begin, read))
        places.append((begin, end))
    ends = [0, *(end for _, end in sorted(places))]
    if [begin for begin, _ in sorted(places)] != ends[:-1] or ends[-1] != data:
        raise ValueError("its tensors do not lie end to end from its header to its end")
    return tensors


class _Entry(BaseModel):
    """What the header of a safetensors file says of a tensor."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=1 << 48)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def _read_file(file: Path, start: int, begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BYTES_READ_AT_ONCE, end - begin)))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start + begin)
        left = end - begin
        while left:
            got = opened.readinto(buffer[: min(left, len(buffer))])
            if not got:
                raise OSError(f"{file} ended while it was read")
            yield buffer[:got]
            left -= got


def _in_bin(file: Path) -> list[StoredTensor]:
    """Through torch, which maps the file into memory; files of before torch 1.6 are read whole."""
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    stored = []
    for name, tensor in tensors.items():
        values = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
        stored.append(StoredTensor(name, dtype, tuple(tensor.shape), len(values), partial(_read_memory, values)))
    return stored


def _read_memory(values: memoryview, begin: int, end: int) -> Iterator[memoryview]:
    yield values[begin:end]
