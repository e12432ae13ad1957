"""The settings of --deepspeed, a file or a mapping, before DeepSpeed and accelerate read them: of kinds they take."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, parse_object, read_object
from novelgpt.settings.paths import ROOT
from novelgpt.settings.remedies import pip_install

# By the names that --deepspeed takes in place of a path. A file of the user's own that is called so is ./zero2.
NAMED = {path.stem: path for path in sorted((ROOT / "scripts" / "deepspeed").glob("*.json"))}
REMEDY = f"name a JSON file, or one of {', '.join(NAMED)}"

Size = Annotated[int, Field(ge=1)] | Literal["auto"] | None
Switch = bool | Literal["auto"] | None
Number = float | Literal["auto"] | None


class _Settings(BaseModel):
    """Fields that are not named here are for DeepSpeed to judge."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Offload(_Settings):
    device: str = "none"


class _Zero(_Settings):
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


class _Enabled(_Settings):
    enabled: Switch = None


class _Made(_Settings):
    """An optimizer or a schedule."""

    type: str
    params: dict[str, Any] = {}


class DeepSpeedSettings(_Settings):
    """The settings that this toolkit, transformers and accelerate look at."""

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
    """What --deepspeed names: the path that belongs to a name, such as zero2; whatever else there is stays as it is.

    Args:
        settings: a name or a path, or the settings themselves, as a mapping or in JSON.
    """
    return str(NAMED[settings]) if isinstance(settings, str) and settings in NAMED else settings


def check_deepspeed(settings: str | dict[str, Any]) -> None:
    """Refuse what DeepSpeed's settings cannot be read from, by its name and field.

    Args:
        settings: path of a JSON file; or the settings themselves, as a mapping or in JSON.

    Raises:
        UserError: so it is.
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
