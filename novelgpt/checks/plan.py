"""A run as it is looked at: read from the words of its pipeline, its model found without the network."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from novelgpt.budget.auto_batch import set_micro_batch
from novelgpt.budget.disk import bytes_in, describe, forecast_disk, lack_of_room
from novelgpt.budget.memory import compute_dtype
from novelgpt.budget.memory_plan import FULL_SHARE, MemoryPlan
from novelgpt.budget.simulated_model import SimulatedModel
from novelgpt.checks.findings import Finding
from novelgpt.model.cached import cached_folder
from novelgpt.model.embedded_base import ensure_embedded_base
from novelgpt.model.hub import looks_like_path, runs_own_code
from novelgpt.model.lora import lora_config
from novelgpt.settings.arguments import LoraArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import EMBEDDED_BASE, OUTPUT, existing_folder
from novelgpt.settings.remedies import environment_program, pipeline_name, python_module
from novelgpt.settings.runs import FinetuneRun, LoraRun, PretrainRun, TrainingRun
from novelgpt.settings.terminal import gigabytes

RUNS: dict[str, type[TrainingRun]] = {run.pipeline: run for run in (PretrainRun, FinetuneRun, LoraRun)}


@dataclass
class Plan:
    """What the estimate of a run comes to.

    Attributes:
        fits: whether the estimate lies below the device's memory; None where there is none.
        model: the simulated one; None where the architecture cannot be simulated.
        tokenizer: bytes of its files.
    """

    fits: bool | None = None
    model: SimulatedModel | None = None
    tokenizer: int = 0


def parse_run(pipeline: str, words: Sequence[str]) -> TrainingRun:
    """The run that `python -m PIPELINE WORDS` would be, its model as a folder of this host.

    Raises:
        UserError: words that the pipeline does not take; the model would have to be downloaded, or needs code of its
            own, which never runs here.
    """
    run = parse_arguments(RUNS[pipeline], list(words))
    run.model.model = local_model(run.model.model)
    if run.model.trust_remote_code and runs_own_code(run.model):
        raise UserError(
            f"{run.model.model} needs code that lies with it, and none of that is run to look at a model",
            f"start the run itself: {python_module(pipeline)} … --trust_remote_code",
        )
    run.model.trust_remote_code = False
    return run


def local_model(model: str) -> str:
    """The folder of a model, that of the hub's cache where it is a name. Nothing is downloaded.

    Raises:
        UserError: it is not in the cache.
    """
    if looks_like_path(model):
        if model == str(EMBEDDED_BASE):
            ensure_embedded_base()
        return model
    cached = cached_folder(model)
    if cached is None:
        raise UserError(
            f"model {model} is not on this host, and nothing is downloaded here",
            f"{environment_program('hf')} download {shlex.quote(model)}, or name a folder",
        )
    return cached


def base_dtype(run: TrainingRun) -> torch.dtype:
    """Of the base's weights, as the pipelines load them."""
    bf16 = isinstance(run, LoraRun) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def adapt(run: TrainingRun, model: PreTrainedModel) -> nn.Module:
    """What the pipeline trains: the model, or with LoRA an adapter on it, without rows of marks."""
    if not isinstance(run, LoraRun):
        return model
    lora: LoraArguments = run.lora
    config, _ = lora_config(model, lora)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"--lora_targets {' '.join(lora.lora_targets)}: {error}", "--lora_targets all-linear"
        ) from error
    adapted.enable_input_require_grads()
    return adapted


def check_memory(run: TrainingRun, plan: Plan) -> Iterator[Finding]:
    """The estimate for rows of --max_length tokens against the device. Settles checkpointing, as a run does."""

    def build() -> SimulatedModel:
        cast_to = compute_dtype(training) if training.deepspeed else None
        qlora = isinstance(run, LoraRun) and run.lora.qlora
        plan.model = SimulatedModel(run.model, training.device, base_dtype(run), partial(adapt, run), qlora, cast_to)
        return plan.model

    training = run.training
    longest = cast("Dataset[Any]", [{"input_ids": range(run.data.max_length)}])
    memory = MemoryPlan(run, longest)
    rows, checkpointing, estimate = memory.decide(build)
    set_micro_batch(training, rows)
    training.activation_checkpointing = training.gradient_checkpointing = checkpointing
    shape = f"{rows} x {run.data.max_length} tokens"
    if estimate is None:
        text = f"no estimate for this model; {gigabytes(memory.capacity)} are there"
        yield Finding(
            "memory", "note", text, "watch the first steps; --auto_batch finds a micro-batch that fits on a GPU"
        )
        return
    plan.fits = estimate.total <= memory.capacity
    text = (
        f"{gigabytes(estimate.total)} expected of {gigabytes(memory.capacity)} on this {memory.device.type}: {shape}, "
        f"activations {'computed again' if checkpointing else 'kept'}"
    )
    if estimate.total <= FULL_SHARE * memory.capacity:
        yield Finding("memory", "ok", text)
    elif torch.cuda.device_count() > 1:
        yield Finding("memory", "note", f"{text}; one GPU alone is too small", "ZERO=3, with OFFLOAD=1 where needed")
    else:
        remedy = "--per_device_train_batch_size 1, a shorter --max_length, --activation_checkpointing"
        remedy += ", --qlora on a GPU" if isinstance(run, LoraRun) else f", or {pipeline_name('finetune_lora')}"
        yield Finding("memory", "problem", f"{text}: this will not fit", f"{remedy}, or a smaller model")


def check_checkpoints(run: TrainingRun, plan: Plan) -> Iterator[Finding]:
    """What the run leaves on the disk at most against what is free there."""
    if plan.model is None:
        remedy = "count on 16 bytes a weight and checkpoint for full training, with AdamW"
        yield Finding("checkpoints", "note", "no estimate of their size for this model", remedy)
        return
    forecast = forecast_disk(plan.model, run.training, plan.tokenizer)
    folder = Path(run.training.output_dir or OUTPUT)
    held, free = bytes_in(folder), shutil.disk_usage(existing_folder(folder)).free
    text = f"{describe(forecast, held)}, {gigabytes(free)} are free for {folder}"
    problem = lack_of_room(forecast, held, free, folder)
    if problem is not None:
        yield Finding("checkpoints", "problem", problem.cause, problem.remedy)
    elif forecast.most is None:
        yield Finding("checkpoints", "note", text, "--save_total_limit 2")
    else:
        yield Finding("checkpoints", "ok", text)
