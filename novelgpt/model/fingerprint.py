"""The fingerprint of a model's weights, and the record that an adapter keeps of its base.

An adapter is a difference from one base: on another base it produces wrong text without any error. So the fingerprint
of the base is written beside the adapter, and checked before the two are combined.

The fingerprint is the SHA-256 of every value of every tensor, with their names, types and shapes. Hashing samples would
be faster, but could miss the only difference between two bases: some rows of the embedding, trained for new tokens.
Hashing everything is cheap where it is done, since the model is loaded next and its files are in the page cache by
then; threads share the work, and the result is cached for as long as the files do not change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from huggingface_hub.constants import HF_HOME
from pydantic import BaseModel, TypeAdapter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from novelgpt.model.folder_checks import check_model_folder
from novelgpt.model.weight_files import DTYPE_NAMES, stored_tensors, weight_files
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.errors import UserError
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.parsed_files import check_fields, read_object
from novelgpt.settings.terminal import say

BASE_RECORD = "base.json"
CACHE = Path(HF_HOME) / "novelgpt" / "fingerprints.json"
# Smaller folders are hashed each time, in about a second.
CACHED_FROM_BYTES = 1 << 30
CHUNK_BYTES = 1 << 26
# Of config.json: what distinguishes models whose tensors have the same names and shapes.
ESSENTIALS = ("model_type", "num_attention_heads", "n_head")
_CACHED = TypeAdapter(dict[str, str])


def weights_fingerprint(folder: Path, cache: Path | None = None, threads: int | None = None) -> str:
    """Compute the SHA-256 of the weights in a local folder, as 64 hexadecimal digits.

    Two folders have the same one if and only if (as far as SHA-256 can tell) they hold tensors of the same names,
    types, shapes and values, for the same model type with the same number of attention heads. Paths, file times, shards
    and the file format (.safetensors or .bin) do not matter. Other settings of config.json (RoPE scaling, lengths, end
    tokens) and the tokenizer are not part of it.

    Results of large folders are cached by path, size, inode and ctime of the weight files.

    Args:
        folder: with config.json and weights, in one file or in shards.
        cache: file of cached results; None for the user's own, used from 1 GiB of weights on.
        threads: that read and hash; None for one per core, up to 8.

    Raises:
        UserError: no weights or no config.json there, or a damaged file.
    """
    files = weight_files(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json", "name the folder of a model")
    if cache is None and sum(file.stat().st_size for file in files) >= CACHED_FROM_BYTES:
        cache = CACHE
    key = _state_of_files([folder / "config.json", *files])
    kept = _read_cache(cache)
    if key in kept:
        return kept[key]
    fingerprint = _hash(folder, files, threads or min(8, usable_cores()))
    if cache is not None:
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            # Other processes may have written since.
            atomic_write(cache, json.dumps(_read_cache(cache) | {key: fingerprint}, indent=1))
    return fingerprint


def base_folder(source: str) -> Path:
    """The local folder of a base: itself, or its folder in the hub's cache, into which missing files are downloaded.

    Raises:
        UserError: there is no folder and no hub model of that name.
    """
    if Path(source).is_dir():
        check_model_folder(Path(source))
        return Path(source)
    try:
        cached_file(source, "config.json")
        problem = OSError(f"{source} has no weights")
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            try:
                file = str(cached_file(source, name))
            except OSError as error:
                problem = error
                continue
            if name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
                get_checkpoint_shard_files(source, file)
            return Path(file).parent
        raise problem
    except (OSError, ValueError) as error:
        raise UserError(
            f"the base {source} is not there: {str(error).strip().splitlines()[0]}", "name its folder with --base"
        ) from error


class BaseRecord(BaseModel):
    """base.json: path or hub name of the base, and its fingerprint."""

    base: str
    fingerprint: str


def write_base_record(folder: Path, base_source: str, fingerprint: str | None = None) -> None:
    """Write base.json beside an adapter: {"base": base_source, "fingerprint": …}.

    Args:
        folder: of the adapter.
        base_source: folder or hub name of the base.
        fingerprint: of the base; None to compute it here.
    """
    if fingerprint is None:
        fingerprint = weights_fingerprint(base_folder(base_source))
    record = json.dumps({"base": base_source, "fingerprint": fingerprint}, ensure_ascii=False, indent=2)
    atomic_write(folder / BASE_RECORD, record + "\n")


def check_base(adapter_folder: Path, base_source: str, remedy: str = "name the right folder with --base") -> None:
    """Verify that an adapter was trained on this base. For an adapter without a record, print a warning.

    Args:
        adapter_folder: with base.json.
        base_source: folder or hub name of the base.
        remedy: what to do about another base.

    Raises:
        UserError: the record names another fingerprint, or the base is not there.
    """
    path = adapter_folder / BASE_RECORD
    if not path.is_file():
        note = f"{adapter_folder} has no {BASE_RECORD}: whether {base_source} is the base it was trained on is unknown"
        say(note, style="yellow", stderr=True)
        return
    try:
        record = check_fields(BaseRecord, read_object(path), str(path))
    except UserError as error:
        raise UserError(
            f"{path} is damaged: {error.cause}", "copy it again from the training run, or delete it"
        ) from error
    wanted, trained_on = record.fingerprint, record.base
    found = weights_fingerprint(base_folder(base_source))
    if found != wanted:
        raise UserError(
            f"{base_source} is not the base that {adapter_folder} was trained on: its weights have the hash "
            f"{found[:12]}, those of the base ({trained_on}) had {wanted[:12]}",
            remedy,
        )


def _hash(folder: Path, files: list[Path], threads: int) -> str:
    tensors = [item for file in files for item in stored_tensors(file).items()]
    values = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for _, tensor in tensors]
    chunks = [part[start : start + CHUNK_BYTES] for part in values for start in range(0, len(part), CHUNK_BYTES)]
    if threads == 1:  # no pool, which the process would wait for when it exits
        digests = iter([_chunk_digest(chunk) for chunk in chunks])
    else:
        with ThreadPoolExecutor(threads) as pool:
            digests = iter(list(pool.map(_chunk_digest, chunks)))
    lines = []
    for (name, tensor), part in zip(tensors, values, strict=True):
        of_tensor = b"".join(next(digests) for _ in range(0, len(part), CHUNK_BYTES))
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        lines.append(json.dumps([name, dtype, list(tensor.shape), hashlib.sha256(of_tensor).hexdigest()]))
    config = read_object(folder / "config.json")
    essentials = json.dumps({name: config[name] for name in ESSENTIALS if name in config})
    return hashlib.sha256("\n".join([essentials, *sorted(lines)]).encode()).hexdigest()


def _chunk_digest(chunk: numpy.ndarray) -> bytes:
    return hashlib.sha256(chunk.data).digest()


def _state_of_files(files: list[Path]) -> str:
    """Changes whenever a file does: ctime cannot be set back."""
    states = [(str(file.absolute()), file.stat()) for file in files]
    parts = [(path, state.st_size, state.st_ino, state.st_ctime_ns) for path, state in states]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_cache(cache: Path | None) -> dict[str, str]:
    # An unreadable or damaged cache only costs time.
    with contextlib.suppress(OSError, ValueError):
        if cache is not None and cache.is_file():
            return _CACHED.validate_json(cache.read_bytes())
    return {}
