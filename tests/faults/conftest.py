"""The runs that the tests of faults share."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root

from tests.faults.runs import Command, complete, write_base, write_rows
from tests.warm_python import warm_server

WORDS = (
    "--max_length", "32", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3",
    "--num_train_epochs", "2", "--learning_rate", "1e-2", "--logging_steps", "1", "--save_strategy", "steps",
    "--save_steps", "2", "--stop_check", "0",
)  # fmt: skip
# 26 rows to train on: an epoch is 13 micro-batches on one rank and 7 on each of two, so that the last of its optimizer
# steps, of 3 micro-batches otherwise, is of one.
ROWS = 29
# 24 rows to train on, which two ranks share evenly.
EVEN_ROWS = 27


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
        base = write_base(embedded, place / "base")
        self.other_base = write_base(embedded, place / "base without dropout", dropout=0.0)
        text, self.questions = write_rows(place / "rows", ROWS)
        words = ("--model", str(base), *WORDS)
        rows = ("--train_files", str(self.questions), "--valid_fraction", "0.1", *words)
        corpus = ("--train_files", str(text), "--valid_files", str(text), "--max_valid_tokens", "200", *words)
        padded = (*rows, "--packing", "False", "--save_steps", "1")
        # What DeepSpeed builds, in a folder of their own: killed processes leave locks there.
        known = Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
        if known.is_dir():
            shutil.copytree(known, place / "extensions", ignore=shutil.ignore_patterns("lock"))
        built = {"TORCH_EXTENSIONS_DIR": str(place / "extensions")}
        self.commands = {
            "pretrain": Command("pretrain", corpus),
            "finetune": Command("finetune", padded),
            "lora": Command("finetune_lora", rows),
            "data parallel": Command("finetune", padded, ranks=2),
            "zero2": Command("finetune", padded, ranks=2, zero=2, variables=built),
            "zero3": Command("finetune", padded, ranks=2, zero=3, variables=built),
        }
        # Two sources, each of some of the rows: more than once, or not all of them in an epoch.
        parts = [place / "rows" / f"part {number}.jsonl" for number in (1, 2)]
        lines = self.questions.read_text(encoding="utf-8").splitlines(keepends=True)
        for path, part in zip(parts, (lines[:10], lines[10:]), strict=True):
            path.write_text("".join(part), encoding="utf-8")
        mixed = ("--mix", f"{parts[0]}=1.7", f"{parts[1]}=0.6", *words)
        stream = ("--streaming", "--buffer_rows", "9", "--valid_files", str(self.questions), "--max_steps", "6")
        self.commands |= {
            "mix": Command("finetune", (*mixed, "--num_train_epochs", "3")),
            "mix on two": Command("finetune", (*mixed, "--num_train_epochs", "3"), ranks=2),
            "stream": Command("finetune", (*mixed, *stream)),
            "stream on two": Command("finetune", (*mixed, *stream, "--packing", "False"), ranks=2),
        }
        # The same run on two ranks and on one: as many rows a step, and no draws, which are another rank's own.
        even = write_rows(place / "even rows", EVEN_ROWS)[1]
        alike = (*padded, "--model", str(self.other_base), "--learning_rate", "1e-3", "--train_files")
        of_parts = [str(path.with_stem(f"even {path.stem}")) for path in parts]
        for name, part in zip(of_parts, (lines[:8], lines[8:20]), strict=True):
            Path(name).write_text("".join(part), encoding="utf-8")
        mixed = (*alike, *of_parts, "--mix", f"{of_parts[0]}=1.5", f"{of_parts[1]}=1", "--valid_files", str(even))
        words = {"rows": (*alike, str(even)), "mix": mixed, "stream": (*mixed, *stream)}
        self.on_two = {
            name: Command("finetune", words[name], ranks=2, zero=zero, variables=built)
            for name, zero in {"rows": 2, "mix": 0, "stream": 0}.items()
        }
        self.on_one = {
            name: Command("finetune", (*own, "--gradient_accumulation_steps", "6")) for name, own in words.items()
        }
        self._undisturbed: dict[str, Undisturbed] = {}

    def undisturbed(self, name: str) -> Undisturbed:
        """The run of a command that nothing disturbs."""
        if name not in self._undisturbed:
            folder = self.place / "undisturbed" / name
            warm_server()
            begin = time.monotonic()
            complete(self.commands[name], folder, self.place / "logs" / name)
            self._undisturbed[name] = Undisturbed(self.commands[name], folder, time.monotonic() - begin)
        return self._undisturbed[name]


@pytest.fixture(scope="session")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Small runs of each kind."""
    return Runs(base_folder, tmp_path_factory.mktemp("faults"))
