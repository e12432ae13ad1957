"""DeepSpeed: its settings are validated before it and accelerate read them, its builds are kept from hanging a run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate.utils import other
from pydantic import BaseModel, ConfigDict, Field

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, parse_object, read_object
from novelgpt.settings.paths import ROOT
from novelgpt.settings.remedies import pip_install

# By the names that --deepspeed takes in place of a path; a user's own file of such a name is written ./zero2.
NAMED = {path.stem: path for path in sorted((ROOT / "scripts" / "deepspeed").glob("*.json"))}
REMEDY = f"name a JSON file, or one of {', '.join(NAMED)}"

BUILD_LOCK = "lock"
PROCESSES = Path("/proc")

Size = Annotated[int, Field(ge=1)] | Literal["auto"] | None
Switch = bool | Literal["auto"] | None
Number = float | Literal["auto"] | None


class _Section(BaseModel):
    """Fields that are not named here are left to DeepSpeed."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Offload(_Section):
    device: str = "none"


class _Zero(_Section):
    stage: Annotated[int, Field(ge=0, le=3)] | Literal["auto"] | None = None
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    cpu_offload: bool | None = None
    overlap_comm: Switch = None
    contiguous_gradients: Switch = None
    reduce_scatter: Switch = None
    stage3_gather_16bit_weights_on_model_save: Switch = None
    reduce_bucket_size: Number = None
    allgather_bucket_size: Number = None
    stage3_prefetch_bucket_size: Number = None
    stage3_param_persistence_threshold: Number = None
    sub_group_size: Number = None


class _Enabled(_Section):
    enabled: Switch = None


class _Made(_Section):
    """An optimizer or a schedule."""

    type: str
    params: dict[str, Any] = {}


class DeepSpeedSettings(_Section):
    """The settings that this toolkit, transformers and accelerate read."""

    zero_optimization: _Zero | None = None
    fp16: _Enabled | None = None
    bf16: _Enabled | None = None
    optimizer: _Made | None = None
    scheduler: _Made | None = None
    train_batch_size: Size = None
    train_micro_batch_size_per_gpu: Size = None
    gradient_accumulation_steps: Size = None
    gradient_clipping: Number = None
    steps_per_print: Number = None
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None
    wall_clock_breakdown: bool | None = None


def deepspeed_place(settings: str | dict[str, Any]) -> str | dict[str, Any]:
    """Return the path that a name such as zero2 stands for; everything else as it is.

    Args:
        settings: a name or a path, or the settings themselves, as a mapping or in JSON.
    """
    return str(NAMED[settings]) if isinstance(settings, str) and settings in NAMED else settings


def check_deepspeed(settings: str | dict[str, Any]) -> None:
    """Validate DeepSpeed's settings.

    Args:
        settings: path of a JSON file; or the settings themselves, as a mapping or in JSON.

    Raises:
        UserError: they cannot be read, naming the file and the field; or DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--deepspeed needs the package deepspeed, which is not installed",
            f"{pip_install('deepspeed')}, on Linux; elsewhere train without it (ZERO=0)",
        )
    name = "--deepspeed"
    if isinstance(settings, str) and settings.lstrip().startswith("{"):
        settings = parse_object(settings.encode(errors="surrogateescape"), name, REMEDY)
    if isinstance(settings, str):
        name = f"{name} {settings}"
        settings = read_object(Path(settings), REMEDY, name=name)
    check_fields(DeepSpeedSettings, settings, name, REMEDY)


def disable_unused_build() -> None:
    """Let DeepSpeed leave out its operator for sums in shared memory, which only its inference on CPUs uses.

    It would be compiled at the first training on a machine, silently for a minute.
    """
    import deepspeed.ops  # slow to import, and only needed by runs that use it

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def release_build_locks() -> list[Path]:
    """Delete the locks on builds of torch extensions that killed processes have left: torch waits for them forever.

    Deletes, and returns, those that no process of this machine holds open, as the one that builds does. Nothing is
    deleted in runs on several machines: they may share the folder, and another one's lock looks the same.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # torchrun's name, DeepSpeed's name
    if os.environ.get("WORLD_SIZE", "1") != here:
        return []
    from torch.utils.cpp_extension import get_default_build_root  # slow to import, and only needed here

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    released = []
    for path in root.glob(f"**/{BUILD_LOCK}"):
        try:
            left = path.stat()
            if not _is_open(left) and path.stat().st_ino == left.st_ino:
                path.unlink()
                released.append(path)
        except FileNotFoundError:
            continue  # deleted by its holder, or by another rank
    return released


def _is_open(file: os.stat_result) -> bool:
    """Whether a visible process has the file open; where no process is visible, it may."""
    if not PROCESSES.is_dir():
        return True
    for descriptor in PROCESSES.glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(descriptor.stat(), file):
                return True
        except OSError:
            continue  # ended, closed, or another user's
    return False


def limit_deepspeed_to_its_runs() -> None:
    """Let accelerate look for DeepSpeed's engine around a model only where DeepSpeed has been imported.

    It would import DeepSpeed at each save, wherever it is installed: seconds, output of its own on the terminal, and on
    some machines a failure, for a wrapper that only an imported DeepSpeed can have put there.
    """
    installed = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules and installed()
