"""What the tests share: the embedded base, built once, and its tokenizer."""

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from novelgpt.model.embedded_base import build_embedded_base
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.tokenizer import load_tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    """Moments at which processes are killed are new ones each time, unless a seed is given."""
    parser.addoption("--seed", type=int, default=random.randrange(10**6), help="of moments that tests draw")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built embedded base."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-qwen3"
    build_embedded_base(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the embedded base."""
    return load_tokenizer(ModelArguments(str(base_folder)))
