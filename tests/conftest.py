"""What the tests share: the tiny-random base, built once, and its tokenizer."""

import gc
import os
import random
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from novelgpt.model.tiny_random import build_tiny_random
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.signals import STOP_SIGNALS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which tests run, and the seed of the moments at which processes are killed: a new one each time by default."""
    parser.addoption("--all", action="store_true", help="also the tests that are marked `long`")
    parser.addoption("--seed", type=int, default=random.randrange(10**6), help="of moments that tests draw")


def pytest_configure(config: pytest.Config) -> None:
    """What the tests start gets all signals, and a cache of its own.

    Signals that are ignored or blocked here (by nohup, a shell's `&`, a supervisor) reach what the tests start.
    An ignored signal stays so in each process that is started, and runs leave it ignored by design.
    """
    cache = tempfile.TemporaryDirectory(prefix="cache-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


@pytest.hookimpl(trylast=True)  # once -k and others have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `long`, unless asked for by --all; let each worker begin with slow files."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("long") is not None]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.get_closest_marker("long") is None]
    items[:] = slow_files_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections, of which libraries ask for many.

    Among millions of objects each takes half a second. It stays until the end in any case.
    """
    gc.collect()
    gc.freeze()


def slow_files_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order tests, file by file, for workers each of which is given an equal share of the list at first.

    Each share begins with files in which a test is marked `slow`: near the end, the others would wait for such a test.
    What one worker has not begun is taken by another from the end of its share.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    begin = [path for path, tests in files.items() if any(item.get_closest_marker("slow") for item in tests)]
    slow = [files.pop(path) for path in begin]
    quick = [item for tests in files.values() for item in tests]
    shares: list[list[pytest.Item]] = [
        [item for tests in slow[worker::workers] for item in tests] for worker in range(workers)
    ]
    for worker, share in enumerate(shares):  # as xdist divides what is left among the workers that are left
        rest = len(quick) + sum(map(len, shares[worker:]))
        count = max(0, rest // (workers - worker) - len(share))
        share += quick[:count]
        del quick[:count]
    return [item for share in shares for item in share] + quick


@pytest.fixture(scope="session")
def few_or_all(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How many cases a test draws: the first number, or the second with --all."""
    wanted = bool(request.config.getoption("--all"))
    return lambda few, many: many if wanted else few


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built tiny-random base."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-random"
    build_tiny_random(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the tiny-random base."""
    return load_tokenizer(ModelArguments(str(base_folder)))
