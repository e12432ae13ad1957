"""Sources of rows to encoded tables on disk: made once by all cores of a host, and mapped by every process since.

An entry of the cache is a folder rows-KEY of Arrow files. The key is a hash of all that decides the tokens: the rows,
how they are read, the tokenizer with its chat template, and the code. So an entry never becomes wrong, and may be
deleted whenever no run uses it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets.table
import multiprocess
import numpy
import pyarrow
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

import novelgpt.text
from dataset.encoded_rows import BLOCK_FEATURES, BLOCK_ROWS, SCHEMA, encode_block, read_blocks
from dataset.instructions import Instructions
from dataset.sources import RowSource
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.atomic_files import atomic_folder, hash_file, hash_json
from novelgpt.settings.errors import UserError
from novelgpt.settings.external_ranks import stop_with_parent
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.locks import is_locked, lock, unlock
from novelgpt.settings.paths import cache_folder
from novelgpt.settings.process import all_processes_values, is_first_on_host, is_first_process, raise_on_all_ranks
from novelgpt.settings.signals import STOP_SIGNALS
from novelgpt.settings.terminal import counted, say
from novelgpt.text.templates import template_record
from novelgpt.text.token_files import tokenizer_digest

INDEX = "index.json"
# Of fewer blocks, one process encodes all before others would have started.
FEW_BLOCKS = 4
LIBRARIES = ("datasets", "tokenizers", "transformers", "jinja2", "sentencepiece")
# The arguments that decide how rows are read and cut; the others only choose among them.
DECISIVE = ("max_length", "overlong", "min_length", "mask_history")
# A process that waits for another looks at it so often, and takes it for ended when it has found it idle so many times.
SECONDS_BETWEEN_LOOKS, LOOKS = 0.05, 30

_encoding = False  # whether processes that are forked now are to encode


def encoded_table(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    data: ConversationArguments,
    instructions: Instructions,
    numbers: numpy.ndarray | None = None,
) -> datasets.table.Table:
    """The encoded rows of a source (see `SCHEMA`), from the cache or made now. All ranks call it.

    The first process of each host encodes; the others wait, for as long as that takes, and map the result.

    Args:
        source: of the rows.
        tokenizer: of the model.
        data: how rows are read and cut.
        instructions: wordings of rows that name a task.
        numbers: of the rows to encode, rising; all by default.

    Raises:
        UserError: a row cannot be read or encoded, the source is written meanwhile, hosts see different rows, or the
            cache cannot be written or is full; on all ranks.
    """
    key = ""
    held = None
    with ExitStack() as on_error:
        with raise_on_all_ranks(), _named_cache():
            if is_first_on_host():
                key = _key(source, tokenizer, data, instructions, numbers)
                cache_folder().mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(BlockingIOError):  # another run makes this entry: see below
                    # Before others know the key, so that they find it locked.
                    held = lock(_lock_of(cache_folder() / f"rows-{key}"))
                    on_error.callback(unlock, held)
        keys = {known for known in all_processes_values(key) if known}
        if len(keys) > 1:
            raise UserError(
                f"the hosts of this run see different rows in {source.given}, or have different versions installed",
                "give all of them the same files, and install the same versions everywhere",
            )
        on_error.pop_all()
    folder = cache_folder() / f"rows-{keys.pop()}"
    with raise_on_all_ranks(), _named_cache():
        if not is_first_on_host():
            _wait_for(folder)
        else:
            # Another run is waited for here, as by the other ranks, and not in the exchange above, which times out.
            held = lock(_lock_of(folder), wait=True) if held is None else held
            try:
                if not _is_whole(folder):
                    _make(folder, source, tokenizer, data, instructions, numbers)
            finally:
                _lock_of(folder).unlink(missing_ok=True)
                unlock(held)
    # Only now that none has failed: whoever waited for one that has would find nothing.
    with raise_on_all_ranks(), _named_cache():
        return _open(folder)


@contextmanager
def _named_cache() -> Iterator[None]:
    """Tell of a cache that cannot be written or read, or is full, with what can be done."""
    try:
        yield
    except OSError as error:
        folder = cache_folder()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{folder}: the disk is full", "make room there, or set HF_DATASETS_CACHE to a folder with more"
            ) from error
        failed = Path(os.fsdecode(error.filename or ""))
        if folder not in (failed, *failed.parents) and failed not in folder.parents:
            raise
        raise UserError(
            f"the cache of encoded rows cannot be used: {failed}: {error.strerror}",
            "set HF_DATASETS_CACHE to a folder that you can write to",
        ) from error


def _key(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    data: ConversationArguments,
    instructions: Instructions,
    numbers: numpy.ndarray | None,
) -> str:
    """Hash of all that decides the tokens of a source."""
    special = [(number, str(token), repr(token)) for number, token in tokenizer.added_tokens_decoder.items()]
    return hash_json({
        "rows": source.identity(),
        "numbers": None if numbers is None else numbers.tolist(),
        "reading": {name: vars(data)[name] for name in DECISIVE},
        "instructions": repr(instructions),
        "tokenizer": [tokenizer_digest(tokenizer), special, sorted(tokenizer.special_tokens_map.items(), key=str)],
        "template": [template_record(tokenizer)[name] for name in ("name", "sha256")],
        "code": _code_digest(),
    })[:40]  # fmt: skip


@functools.cache
def _code_digest() -> str:
    """Hash of the code that makes tokens of rows; unlike a version number, nobody can forget to raise it."""
    folders = (Path(__file__).parent, Path(novelgpt.text.__file__).parent)
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return hash_json([*([path.name, hash_file(path)[0]] for path in files), *map(version, LIBRARIES)])


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_whole(folder: Path) -> bool:
    """Whether an entry is finished, and its files have the sizes that they had then."""
    try:
        sizes: dict[str, int] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _wait_for(folder: Path) -> None:
    """Wait until another process of this host has made an entry, or has ended without."""
    looks = 0
    while not _is_whole(folder) and looks < LOOKS:
        looks = 0 if is_locked(_lock_of(folder)) else looks + 1
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _open(folder: Path) -> datasets.table.Table:
    """The table of an entry, mapped."""
    names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["bytes"]
    tables = [datasets.table.MemoryMappedTable.from_file(str(folder / name)) for name in names]
    return datasets.table.concat_tables(tables)


def _make(
    folder: Path,
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    data: ConversationArguments,
    instructions: Instructions,
    numbers: numpy.ndarray | None,
) -> None:
    """Make the entry of a source, whose lock this process holds.

    Raises:
        UserError: a row cannot be read or encoded, or the source is written meanwhile.
        OSError: the cache cannot be written, or its disk is full.
    """
    before = source.identity()
    for path in folder.parent.glob("rows-*.unfinished-*"):  # of killed processes
        owner = path.with_name(path.name.split(".unfinished-")[0])
        if owner == folder or not is_locked(_lock_of(owner)):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # there, but not whole
    with atomic_folder(folder) as unfinished, tempfile.TemporaryDirectory(dir=unfinished) as temporary:
        blocks = _materialise(source, numbers, Path(temporary))
        encode = partial(
            encode_block, source=source, tokenizer=tokenizer, data=data, instructions=instructions,
            stop=Path(temporary, "stop"),
        )  # fmt: skip
        _encode(blocks, encode, unfinished / "rows.arrow", source)
        if source.identity() != before:
            raise UserError(
                f"{source.given} was written while this run read it, which may have read some of both versions",
                "start again once nothing writes there",
            )
        sizes = {path.name: path.stat().st_size for path in sorted(unfinished.glob("*.arrow"))}
        (unfinished / INDEX).write_text(json.dumps({"source": source.given, "bytes": sizes}), encoding="utf-8")


def _materialise(source: RowSource, numbers: numpy.ndarray | None, folder: Path) -> datasets.Dataset:
    """Blocks of a source, in a folder, so that all cores may encode them and no text is in memory."""
    wanted = None if numbers is None else set(numbers.tolist())
    try:
        with _progress_bars(False):
            return datasets.Dataset.from_generator(
                partial(read_blocks, source, wanted), features=BLOCK_FEATURES, cache_dir=str(folder),
                fingerprint="blocks", writer_batch_size=1,
            )  # fmt: skip
    except datasets.exceptions.DatasetGenerationError as error:
        # What the readers raise is told as they tell it.
        raise error.__cause__ or error from None


def _encode(blocks: datasets.Dataset, encode: Callable[..., pyarrow.Table], file: Path, source: RowSource) -> None:
    """Encode blocks on all cores into `file`, or into several files of like names, in order."""
    processes = min(usable_cores(), len(blocks)) if len(blocks) >= FEW_BLOCKS else 1
    shows = processes > 1 and is_first_process()
    if shows:
        rows = pyarrow.compute.sum(pyarrow.compute.list_value_length(blocks.data.column("row"))).as_py()
        say(f"{source.name}: {counted(rows, 'row')} are tokenised once, on {counted(processes, 'core')}")
    with _workers(), _progress_bars(shows and sys.stderr.isatty()):
        blocks.map(
            encode, batched=True, batch_size=1, remove_columns=blocks.column_names,
            features=datasets.Features.from_arrow_schema(SCHEMA), num_proc=processes if processes > 1 else None,
            cache_file_name=str(file), new_fingerprint="rows", writer_batch_size=BLOCK_ROWS, desc=source.name,
        )  # fmt: skip


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show the library's progress bars within the block, or hide them."""
    were_hidden = datasets.utils.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if were_hidden else datasets.enable_progress_bars)()


@contextmanager
def _workers() -> Iterator[None]:
    """Settle the processes that are forked within the block, and what their pool raises."""
    global _encoding
    variables, parallel = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    variables["TOKENIZERS_PARALLELISM"] = "false"  # the processes are all that the cores can take
    _encoding = True
    try:
        yield
    except (multiprocess.TimeoutError, EOFError, ConnectionError, RuntimeError) as error:
        # The pool's haste hides what ended it, as a signal.
        ended_by = error.__context__ if isinstance(error, multiprocess.TimeoutError) else error
        # The library has no type for the loss of a process that encodes; that of their queue reaches its users.
        if isinstance(ended_by, (EOFError, ConnectionError)) or "abruptly died" in str(ended_by):
            raise UserError(
                "a process that tokenised rows was killed, as the system does where memory runs out",
                "free memory and start again; `taskset -c 0,1` before the command lets two processes do it",
            ) from error
        raise ended_by or error from None
    finally:
        _encoding = False
        os.environ = variables  # noqa: B003 - the library has put a copy in its place, and others hold this one
        del variables["TOKENIZERS_PARALLELISM"]
        if parallel is not None:
            variables["TOKENIZERS_PARALLELISM"] = parallel


def _settle_worker() -> None:
    """Leave signals to the process that has forked this one, and end with it, however it ends."""
    if _encoding:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        stop_with_parent(signal.SIGKILL)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_settle_worker)
