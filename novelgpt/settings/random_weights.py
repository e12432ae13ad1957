"""Options of a pretraining that starts from random weights, and the folder that these weights get.

The weights are drawn once, into a folder whose name holds a hash of all that decides them. From then on it is a base
like every other: ranks, ZeRO-3, resuming, estimates and records need to know nothing else of it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from novelgpt.settings.arguments import ModelArguments, option
from novelgpt.settings.atomic_files import hash_json
from novelgpt.settings.errors import UserError
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.paths import OUTPUT, ROOT
from novelgpt.settings.remedies import python_module
from novelgpt.settings.small_bases import model_place, small_base_name

SIZES = ROOT / "pretrain" / "configs" / "models"
# The settings of training that go with random weights, unless the user sets others.
FROM_SCRATCH = "from_scratch"
CONFIG_FILE = "config.json"
TRAINS_A_TOKENIZER = "dataset tokenizer CORPUS FOLDER --kind byte_bpe --vocab_size N"
# Another number wherever the same settings would give other weights than before.
INITIALISATION = 1
# What decides the tokens of a text, in the folder of a tokenizer: no reports on it, in which times stand.
TOKENIZER_FILES = (
    "tokenizer.*", "tokenizer_config.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja",
    "special_tokens_map.json", "added_tokens.json", "config.json", "*.py",
)  # fmt: skip
# Options that say more about random weights, and nothing without them.
DETAILS = ("tokenizer_name", "config_overrides", "make_vocab_size_divisible_by")


@dataclass(frozen=True)
class RandomWeights:
    """All that decides a model's random weights, and where they are.

    Attributes:
        source: the ready size or the file that `settings` come from, for messages.
        settings: of config.json.
        overrides: of single settings, by name.
        tokenizer: folder or hub name.
        divisor: the vocabulary is a multiple of it.
        seed: of the generator.
        folder: with configuration, weights and tokenizer, once they were made.
    """

    source: str
    settings: dict[str, Any]
    overrides: dict[str, Any]
    tokenizer: str
    divisor: int
    seed: int
    folder: Path


@dataclass
class PretrainModelArguments(ModelArguments):
    """The base model, or the size of one with random weights."""

    config_name: str | None = option(
        None,
        "Start from random weights of this size, in place of --model: a ready one (gpt2-10m, qwen3-26m, …; "
        "docs/from_scratch.md lists them), a config.json, or a folder with one. Trained with the settings in "
        "pretrain/configs/from_scratch.yaml.",
    )
    tokenizer_name: str | None = option(
        None, "With config_name: folder or hub name of the tokenizer, which decides the size of the vocabulary."
    )
    config_overrides: dict[str, Any] | None = option(
        None,
        "With config_name: settings of it to change, as hidden_size=512,num_hidden_layers=8, or a mapping in YAML.",
    )
    make_vocab_size_divisible_by: int = option(
        1, "With config_name: pad the vocabulary to a multiple of this; 64 is faster on GPUs."
    )

    def __post_init__(self) -> None:
        """Check that options of random weights stand together.

        Raises:
            UserError: one of them has no effect, or the tokenizer is missing; or as ModelArguments.
        """
        super().__post_init__()
        self.random_weights: RandomWeights | None = None
        if not 1 <= self.make_vocab_size_divisible_by <= 1 << 16:
            raise UserError(
                f"--make_vocab_size_divisible_by {self.make_vocab_size_divisible_by} is out of range",
                "use a number from 1 to 65536; 64 is common",
            )
        if self.config_name is None:
            lone = [name for name in DETAILS if vars(self)[name] not in (None, 1)]
            if lone:
                raise UserError(
                    f"--{lone[0]} is for random weights, and no --config_name says of which size",
                    f"add --config_name SIZE, one of {', '.join(ready_sizes())}; or leave it out",
                )
        elif self.tokenizer_name is None:
            raise UserError(
                f"--config_name {self.config_name} needs a tokenizer, and none is named",
                f"--tokenizer_name FOLDER names it; {python_module(TRAINS_A_TOKENIZER)} trains one",
            )

    def settle_random_weights(self, seed: int) -> None:
        """Find what decides the random weights, and take their folder, which need not exist yet, for the model.

        Args:
            seed: of the run.

        Raises:
            UserError: there is no such size, file or tokenizer.
        """
        if self.config_name is None or self.tokenizer_name is None:
            return
        _, settings = read_size(self.config_name)
        tokenizer = model_place(self.tokenizer_name)
        overrides = {name: _parsed(value) for name, value in (self.config_overrides or {}).items()}
        divisor = self.make_vocab_size_divisible_by
        decisive = [INITIALISATION, settings, overrides, _identity(tokenizer), divisor, seed]
        # A name that begins with a hyphen would be read as an option.
        name = re.sub(r"[^A-Za-z0-9._-]", "-", size_name(self.config_name)).lstrip("-.") or "model"
        folder = OUTPUT / "bases" / f"{name}-{hash_json(decisive)[:12]}"
        self.random_weights = RandomWeights(self.config_name, settings, overrides, tokenizer, divisor, seed, folder)
        self.model = str(folder)


def ready_sizes() -> list[str]:
    """Names of the sizes that come with the toolkit, by family and size."""
    return sorted((path.stem for path in SIZES.glob("*.json")), key=_by_family_and_size)


def size_file(name: str) -> Path:
    """Find the file with the settings of a model's size.

    Args:
        name: of a ready size, of a JSON file, or of a folder with config.json.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if name in ready_sizes():
        return SIZES / f"{name}.json"
    if path.is_dir():
        return path / CONFIG_FILE
    if not path.is_file():
        nearest = difflib.get_close_matches(name.lower(), ready_sizes(), n=1, cutoff=0.0)[0]
        raise UserError(
            f"--config_name {name} is no ready size, no file and no folder",
            f"did you mean {nearest}? Ready sizes: {', '.join(ready_sizes())}",
        )
    return path


def read_size(name: str) -> tuple[Path, dict[str, Any]]:
    """Find and read the settings of a model's size.

    Args:
        name: as for `size_file`.

    Raises:
        UserError: there is none, or it is not a mapping.
    """
    path = size_file(name)
    return path, read_object(path, "name a config.json in the shape of transformers, or a ready size")


def size_name(size: str) -> str:
    """The name of a ready size or of a file, and of config.json, that of its folder.

    Args:
        size: that `read_size` reads.
    """
    if size in ready_sizes():
        return size
    path = Path(os.path.abspath(size))  # noqa: PTH100 - of a link, its own name
    if path.name == CONFIG_FILE:
        path = path.parent
    return path.stem if path.is_file() else path.name


def _by_family_and_size(name: str) -> tuple[str, float, str]:
    """Sort key: gpt2-10m before gpt2-124m, and qwen3-104m before qwen3-0.6b."""
    family, size, kind = [*name.split("-", 2), ""][:3]
    return family, float(size[:-1]) * {"m": 1, "b": 1000}[size[-1]], kind


def _parsed(value: Any) -> Any:
    """The value that a text stands for: a number, true or false, or itself."""
    if not isinstance(value, str):
        return value
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return words[value]
    try:
        return json.loads(value)
    except ValueError:
        return value


def _identity(tokenizer: str) -> Any:
    """Hashes of a tokenizer's files; of a hub's, and of a small base's, which may not be there yet, the name.

    Raises:
        UserError: the folder holds no tokenizer, or a file cannot be read.
    """
    folder, small_base = Path(tokenizer), small_base_name(tokenizer)
    if small_base is not None:
        return folder.name
    if not (folder.exists() or tokenizer.startswith(("/", ".")) or tokenizer.count("/") > 1):
        return tokenizer
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    if not files:
        what = "holds no tokenizer" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"--tokenizer_name {tokenizer} {what}",
            f"name a folder with tokenizer.json; {python_module(TRAINS_A_TOKENIZER)} trains one",
        )
    try:
        return {file.name: content_hash(file)[0] for file in files}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "name a folder that can be read") from error
