"""Checks of a run before it starts: options, model files, tokenizer, chat template, memory and disk."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.budget.disk import bytes_in, describe, forecast_disk, lack_of_room
from novelgpt.budget.memory_plan import FULL_SHARE, MemoryPlan, plan_memory
from novelgpt.checks.arguments import check_arguments, make_random_base
from novelgpt.checks.findings import Finding, first_case
from novelgpt.model.hub import cached_folder, looks_like_path, runs_own_code
from novelgpt.model.loading import frozen_dtype, read_config
from novelgpt.model.lora import attach_lora
from novelgpt.model.small_bases import ensure_small_base
from novelgpt.model.tokenizer import known_ends
from novelgpt.model.weight_files import DTYPE_NAMES, check_no_pickles, stored_tensors, weight_files
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import OUTPUT, existing_folder
from novelgpt.settings.remedies import environment_program, pipeline_name, python_module
from novelgpt.settings.runs import FinetuneRun, LoraRun, PretrainRun, TrainingRun
from novelgpt.settings.terminal import counted, gigabytes
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation
from novelgpt.text.messages import Message
from novelgpt.text.templates import template_record
from novelgpt.training.run_choice import preview_run_folder

RUNS: dict[str, type[TrainingRun]] = {run.pipeline: run for run in (PretrainRun, FinetuneRun, LoraRun)}
QUESTION, ANSWER = "灯塔下有什么？", "一封信。"


def parse_run(pipeline: str, args: Sequence[str]) -> TrainingRun:
    """Return the run that `python -m PIPELINE ARGS` would be, with its model as a folder of this host.

    Raises:
        UserError: arguments that the pipeline does not take; the model would have to be downloaded, or needs its own
            code, which never runs here.
    """
    run = parse_arguments(RUNS[pipeline], list(args))
    make_random_base(run)
    model: Any = replace(run.model, model=local_model(run.model.model))
    if model.trust_remote_code and runs_own_code(model):
        raise UserError(
            f"{model.model} needs its own code, and none of that is run for checks",
            f"start the run itself: {python_module(pipeline)} … --trust_remote_code",
        )
    return replace(run, model=replace(model, trust_remote_code=False))


def local_model(model: str) -> str:
    """Return the folder of a model, in the hub's cache where it is a hub name. Nothing is downloaded.

    Raises:
        UserError: it is not in the cache.
    """
    if looks_like_path(model):
        ensure_small_base(model)
        return model
    cached = cached_folder(model)
    if cached is None:
        raise UserError(
            f"model {model} is not on this host, and nothing is downloaded here",
            f"{environment_program('hf')} download {shlex.quote(model)}, or name a folder",
        )
    return cached


def settle_folder(run: TrainingRun) -> TrainingRun:
    """Check what every run is checked for before anything is loaded, and return the run with its folder chosen.

    Raises:
        UserError: the run would be refused.
    """
    check_arguments(run)
    return preview_run_folder(run)


def check_settings(run: TrainingRun) -> Iterator[Finding]:
    """Report the settled settings, and check that no data file is empty."""
    yield Finding(
        "settings", "ok", f"{run.pipeline}, rows of {run.data.max_length} tokens, into {run.training.output_dir}"
    )
    names = [*run.data.train_files, *run.data.valid_files]
    sizes = {name: Path(name).stat().st_size for name in names if Path(name).is_file()}
    empty = ", ".join(name for name, size in sizes.items() if size == 0)
    text = f"{counted(len(names), 'path')}, {sum(sizes.values()) / 1e6:.1f} MB in files"
    yield first_case(
        "data", text, (bool(empty), "problem", f"empty: {empty}", "name files that hold rows: --train_files FILE")
    )


def check_files(run: TrainingRun) -> Iterator[Finding]:
    """Check that the architecture is known without code of the checkpoint, and that every weight file can be read."""
    config = read_config(run.model)
    check_no_pickles(Path(run.model.model), run.model.allow_pickles)
    files = weight_files(Path(run.model.model))
    tensors = [tensor for file in files for tensor in stored_tensors(file).values()]
    kinds = ", ".join(sorted({DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for tensor in tensors}))
    count = f"{counted(len(tensors), 'tensor')} in {counted(len(files), 'file')}"
    size = gigabytes(sum(tensor.nbytes for tensor in tensors))
    yield Finding("model files", "ok", f"{config.model_type}: {count}, {size} of {kinds}")


def check_vocabulary(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Check that each token has a row in the embedding."""
    rows = read_config(run.model).get_text_config().vocab_size
    ids = tokenizer.get_vocab().values()
    beyond = sum(index >= rows for index in ids)
    text = f"{counted(len(tokenizer), 'token')}, {counted(rows, 'row')} in the embedding"
    lacks = f"{'has' if beyond == 1 else 'have'} no row in the embedding of {rows}"
    yield first_case(
        "vocabulary",
        text,
        (
            beyond > 0,
            "problem",
            f"{counted(beyond, 'token')} of {len(tokenizer)} {lacks}, as token {max(ids)}",
            "put the tokenizer that belongs to the model beside its weights",
        ),
    )


def check_ends(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Report the end and padding tokens, and check whether the model knows how answers end."""
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    same = ", the same; padding is masked by position" if end == pad else ""
    yield Finding("end and padding", "ok", f"end {end} ({tokenizer.eos_token_id}), padding {pad}{same}")
    if isinstance(run, PretrainRun):
        return
    known = known_ends(run.model.model, tokenizer)
    last = _trained_tokens(tokenizer)[-1]
    token = tokenizer.convert_ids_to_tokens(last)
    learned = f"{token}, {'known to the base' if last in known else 'which the base learns in training'}"
    unknown = f"answers end with {token}, with which the base has never ended one"
    remedy = "--train_special_tokens auto, the default, trains its row; or use a chat model as base"
    lacking = isinstance(run, LoraRun) and last not in known
    yield first_case("end of answers", learned, (lacking, "note", unknown, remedy))


def check_template(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Report which chat template renders conversations, and check that it trains complete answers."""
    if isinstance(run, PretrainRun):
        yield Finding("chat template", "ok", "not needed: raw text")
        return
    record = template_record(tokenizer)
    trained = tokenizer.decode(_trained_tokens(tokenizer))
    text = f"{record['name']}, sha256 {record['sha256'][:12]}; it trains {trained!r} of a sample"
    yield first_case(
        "chat template",
        text,
        (
            ANSWER not in trained,
            "problem",
            f"{text}, which is not the answer",
            "put the model's own chat_template.jinja beside its weights",
        ),
        (
            record["name"] == "plain",
            "note",
            f"the tokenizer has none, so: {text}",
            "right for base models; for a chat model, put its chat_template.jinja beside its weights",
        ),
    )


def adapt(run: TrainingRun, model: PreTrainedModel) -> nn.Module:
    """Return what the pipeline trains: the model, or with LoRA an adapter on it, without rows of special tokens."""
    return attach_lora(model, run.lora) if isinstance(run, LoraRun) else model


def base_dtype(run: TrainingRun) -> torch.dtype:
    """Return the dtype of the base's weights, as the pipelines load them."""
    return frozen_dtype() if isinstance(run, LoraRun) else torch.float32


def estimate_run(run: TrainingRun) -> MemoryPlan:
    """Plan the memory of a run on rows of --max_length tokens, as the pipelines do on the rows that they read.

    Raises:
        UserError: as plan_memory.
    """
    longest = cast("Dataset[Any]", [{"input_ids": range(run.data.max_length)}])
    qlora = isinstance(run, LoraRun) and run.lora.qlora
    return plan_memory(run, longest, base_dtype(run), qlora, partial(adapt, run))


def check_memory(plan: MemoryPlan) -> Iterator[Finding]:
    """Compare the estimate with the memory of the device."""
    run, training, estimate = plan.run, plan.training, plan.estimate
    if estimate is None:
        yield Finding(
            "memory",
            "note",
            f"no estimate for this model; the device has {gigabytes(plan.capacity)}",
            "watch the first steps; --auto_batch finds a micro-batch that fits on a GPU",
        )
        return
    text = (
        f"{gigabytes(estimate.total)} expected of {gigabytes(plan.capacity)} on this {plan.device.type}: "
        f"{training.per_device_train_batch_size} x {run.data.max_length} tokens, "
        f"activations {'recomputed' if training.activation_checkpointing else 'kept'}"
    )
    full = estimate.total > FULL_SHARE * plan.capacity
    remedy = "--per_device_train_batch_size 1, a shorter --max_length, --activation_checkpointing"
    remedy += ", --qlora on a GPU" if isinstance(run, LoraRun) else f", or {pipeline_name('finetune_lora')}"
    several = full and torch.cuda.device_count() > 1
    yield first_case(
        "memory",
        text,
        (several, "note", f"{text}; one GPU alone is too small", "ZERO=3, with OFFLOAD=1 where needed"),
        (full, "problem", f"{text}: this will not fit", f"{remedy}, or a smaller model"),
    )


def check_checkpoints(plan: MemoryPlan | None, tokenizer: int) -> Iterator[Finding]:
    """Compare what the run leaves on the disk at most with what is free there.

    Args:
        plan: of the run; None where it cannot be made.
        tokenizer: bytes of its files.
    """
    if plan is None or plan.model is None:
        yield Finding(
            "checkpoints",
            "note",
            "no estimate of their size for this model",
            "expect 16 bytes per weight and checkpoint for full training with AdamW",
        )
        return
    forecast = forecast_disk(plan.model, plan.training, tokenizer)
    folder = Path(plan.training.output_dir or OUTPUT)
    held, free = bytes_in(folder), shutil.disk_usage(existing_folder(folder)).free
    text = f"{describe(forecast, held)}, {gigabytes(free)} are free for {folder}"
    problem = lack_of_room(forecast, held, free, folder)
    if problem is not None:
        yield Finding("checkpoints", "problem", problem.cause, problem.remedy)
    else:
        yield first_case("checkpoints", text, (forecast.most is None, "note", text, "--save_total_limit 2"))


def _trained_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that are trained of a question and its answer."""
    messages: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return [label for label in encode_conversation(messages, tokenizer)[0].labels if label != IGNORE_INDEX]
