"""Folders of samples and results, and checks of paths. Paths that a user types are relative to the current folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from novelgpt.settings.errors import UserError

# The folder of the rooms: a checkout, or the package that pip installs, where nothing is written.
ROOT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = not (ROOT / "__init__.py").is_file()
SAMPLES = ROOT / "dataset" / "samples"


def _output_folder() -> Path:
    if IS_CHECKOUT:
        return ROOT / "output"
    try:
        return Path("output").absolute()
    except FileNotFoundError:  # the current folder is gone; whatever needs it reports that
        return Path("output")


OUTPUT = _output_folder()
# Read by LLaMA-Factory as well, whose users have it in their shells.
HUB_VARIABLE = "USE_MODELSCOPE_HUB"


def default_hub(environment: Mapping[str, str] = os.environ) -> Literal["huggingface", "modelscope"]:
    """Return the hub that USE_MODELSCOPE_HUB chooses; Hugging Face's where it is not set.

    Args:
        environment: variables of the process.

    Raises:
        UserError: the variable is neither a yes nor a no.
    """
    value = environment.get(HUB_VARIABLE, "")
    if value.strip().lower() in ("1", "true", "yes", "y", "on"):
        return "modelscope"
    if value.strip().lower() not in ("0", "false", "no", "n", "off", ""):
        raise UserError(f"{HUB_VARIABLE}={value} is neither yes nor no", f"{HUB_VARIABLE}=1, or 0; or say it by --hub")
    return "huggingface"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of what can be made again at any time, in the cache of the datasets library.

    Args:
        environment: variables of the process; HF_DATASETS_CACHE, HF_HOME and XDG_CACHE_HOME mean what they mean to it.
    """
    home = environment.get("HF_HOME", f"{environment.get('XDG_CACHE_HOME', '~/.cache')}/huggingface")
    return Path(environment.get("HF_DATASETS_CACHE", f"{from_home(home)}/datasets"), "novelgpt")


def from_home(path: str) -> str:
    """Expand a leading `~` to the user's home; otherwise keep the path as written: ./a stays ./a."""
    return os.path.expanduser(path)  # noqa: PTH111  a Path would drop the `./`


def check_utf8(name: str) -> None:
    """Raise a UserError where a name holds bytes that are not UTF-8, which no file of settings can hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8", "rename the file or folder") from error


def check_not_replaced(path: str, option: str, folder: Path) -> None:
    """Raise a UserError where a file that is read lies in the folder that --overwrite_output_dir clears."""
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"--overwrite_output_dir would delete {path}, which --{option} names",
            "choose another --output_dir, or move what is still needed elsewhere",
        )


def check_folder_can_be_made(folder: Path, name: str) -> None:
    """Check that a folder exists or can be made, without making it.

    Args:
        folder: to check.
        name: of it, for the error.

    Raises:
        UserError: a file has its name or that of a folder above, or nothing can be written there.
    """
    check_utf8(str(folder))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{name} cannot be made: {there} is not a folder", "name a folder that can be written")
    if not os.access(there, os.W_OK):
        raise UserError(f"{name}: nothing can be written into {there}", "name a folder that can be written")


def existing_folder(path: Path) -> Path:
    """Return the path, or the nearest existing folder above it."""
    path = path.absolute()
    return path if path.is_dir() else existing_folder(path.parent)
