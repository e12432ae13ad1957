"""The runs that the tests of faults share."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root

from tests.faults.runs import Command, complete, fork_server, write_base, write_rows

# 27 blocks or rows in micro-batches of 2 and windows of 3: an epoch's last step is of fewer micro-batches.
WORDS = (
    "--max_length 32 --per_device_train_batch_size 2 --gradient_accumulation_steps 3 --num_train_epochs 2 "
    "--learning_rate 1e-2 --logging_steps 1 --save_strategy steps --save_steps 2 --stop_check 0"
).split()  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A run from start to end without a fault."""

    command: Command
    folder: Path
    seconds: float


class Runs:
    """Commands by name, and the undisturbed run of each, made when it is first asked for."""

    def __init__(self, embedded: Path, place: Path) -> None:
        self.place = place
        self.base = write_base(embedded, place / "base")
        # What DeepSpeed builds, in a folder of their own: killed processes leave locks there.
        known = Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
        extensions = place / "extensions"
        if known.is_dir():
            shutil.copytree(known, extensions, ignore=shutil.ignore_patterns("lock"))
        variables = {"TORCH_EXTENSIONS_DIR": str(extensions)}
        text, questions = write_rows(place / "rows")
        words = ("--model", str(self.base), *WORDS)
        rows = ("--train_files", str(questions), "--valid_fraction", "0.1", *words)
        corpus = ("--train_files", str(text), "--valid_files", str(text), "--max_valid_tokens", "200", *words)
        padded = (*rows, "--packing", "False")
        self.commands = {
            "pretrain": Command("pretrain", corpus),
            "finetune": Command("finetune", padded),
            "lora": Command("finetune_lora", rows),
            "data parallel": Command("finetune", padded, ranks=2),
            "zero2": Command("finetune", padded, ranks=2, zero=2, variables=variables),
            "zero3": Command("finetune", padded, ranks=2, zero=3, variables=variables),
        }
        self._undisturbed: dict[str, Undisturbed] = {}

    def undisturbed(self, name: str) -> Undisturbed:
        """The run of a command that nothing disturbs."""
        if name not in self._undisturbed:
            folder = self.place / "undisturbed" / name
            fork_server()
            begin = time.monotonic()
            complete(self.commands[name], folder, self.place / "logs" / name)
            self._undisturbed[name] = Undisturbed(self.commands[name], folder, time.monotonic() - begin)
        return self._undisturbed[name]


@pytest.fixture(scope="session")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Small runs of each kind."""
    return Runs(base_folder, tmp_path_factory.mktemp("faults"))
