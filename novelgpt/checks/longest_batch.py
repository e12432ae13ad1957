"""The longest micro-batch of a run, tried once: before the first step, or by the doctor in a process of its own.

    python -m novelgpt.checks.longest_batch PIPELINE [arguments of the pipeline]

The last line that the command prints on standard output is a JSON list of findings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy
import psutil
import torch
from torch import nn

from novelgpt.budget.auto_batch import cuda_peak
from novelgpt.budget.memory import checkpointing_options, compute_dtype, optimizer_bytes
from novelgpt.budget.memory_plan import MemoryPlan
from novelgpt.budget.simulated_model import changes_logits, worst_batch
from novelgpt.checks.findings import Finding, first_case, run_check
from novelgpt.checks.first_step import check_forward, check_gradients
from novelgpt.checks.run import adapt, base_dtype, parse_run
from novelgpt.model.loading import load_model
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT
from novelgpt.settings.process import raise_on_all_ranks
from novelgpt.settings.runs import LoraRun, TrainingRun, random_weights_of
from novelgpt.settings.terminal import counted, gigabytes
from novelgpt.text.encoding import encode
from novelgpt.training.plan import Autocast
from novelgpt.training.sample_predictions import preserve_mode_and_rng

REMEDY = "--per_device_train_batch_size 1, --activation_checkpointing, a shorter --max_length, or --auto_batch"
TEXT = "潮水退下去的时候，灯塔的影子正好落在那封没有寄出的信上。"
NAME = "longest batch"


def rows_to_try(lengths: numpy.ndarray, training: TrainArguments) -> list[int]:
    """Indices of the longest rows, as many as a micro-batch has.

    On CPUs one row, as it takes seconds and no GPU memory is at stake; and none where even that would take longer than
    a step.

    Args:
        lengths: [rows] tokens of each row.
        training: batch sizes and device.
    """
    rows = training.per_device_train_batch_size
    longest: list[int] = numpy.argsort(-lengths, kind="stable")[:rows].tolist()
    if training.device.type != "cpu":
        return longest
    step = lengths.mean() * rows * training.gradient_accumulation_steps
    return longest[:1] if lengths[longest[0]] <= step else []


@raise_on_all_ranks()
def try_batch(model: nn.Module, batch: dict[str, Any], training: TrainArguments, autocast: Autocast) -> None:
    """Run forward and backward in training mode, and a pass as in evaluation.

    Gradients are computed apart from those of the weights (`torch.autograd.grad`), so that no hook of data parallelism
    or of ZeRO sees them. Under DeepSpeed, which reduces gradients as they are computed, only that of the first trained
    weight is kept; the path to it leads through all others.

    Args:
        model: the bare one, set up for training; it returns a loss for labelled rows.
        batch: rows of this process, on its device.
        training: optimizer, checkpointing and DeepSpeed.
        autocast: the context of each pass.

    Raises:
        UserError: the batch does not fit, on all processes.
    """
    cuda = batch["input_ids"].is_cuda
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rows, tokens = batch["input_ids"].shape
    what = f"the longest micro-batch, {rows} x {counted(tokens, 'token')}"
    try:
        with preserve_mode_and_rng(model):
            _passes(model, batch, training, autocast)
        if cuda:
            trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            later = 0 if training.deepspeed else optimizer_bytes(training) * trained
            # What other processes hold is neither free nor reserved.
            capacity = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            peak = torch.cuda.max_memory_allocated()
            if peak + later > capacity:
                raise UserError(
                    f"{what}, takes {gigabytes(peak)}, the optimizer another {gigabytes(later)}, and the GPU has "
                    f"{gigabytes(capacity)}",
                    REMEDY,
                )
    except torch.OutOfMemoryError:
        device = batch["input_ids"].device.type
        raise UserError(f"{what}, does not fit into the memory of this {device}", REMEDY) from None
    finally:
        if cuda:
            torch.cuda.empty_cache()


def _passes(model: nn.Module, batch: dict[str, Any], training: TrainArguments, autocast: Autocast) -> None:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with autocast():
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
    options = checkpointing_options(training)["activation_checkpointing_kwargs"] or {}
    # Recomputed this way, activations support gradients of the weights only.
    if not (training.activation_checkpointing and options.get("use_reentrant")):
        torch.autograd.grad(loss, trained[:1] if training.deepspeed else trained, allow_unused=True)
    del loss
    model.eval()
    with torch.no_grad(), autocast():
        model(**batch)


def check_trial(
    run: TrainingRun, plan: MemoryPlan | None, pipeline: str, args: Sequence[str], time_limit: float
) -> Iterator[Finding]:
    """Load the model and run the longest batch in a process of its own, and pass on what that finds.

    Args:
        run: whose micro-batch and checkpointing are used.
        plan: a model that will not fit is not loaded; None where there is no estimate.
        pipeline: of the run.
        args: of its command line.
        time_limit: seconds until the process is killed.
    """
    if plan is not None and plan.estimate is not None and plan.estimate.total > plan.capacity:
        yield Finding(
            NAME,
            "note",
            "not tried, and the model not loaded: the estimate exceeds the available memory",
            "see the remedy at memory",
        )
        return
    if run.training.deepspeed:
        yield Finding(NAME, "note", "not tried under DeepSpeed", "leave --deepspeed out to try it with one process")
        return
    rows = run.training.per_device_train_batch_size if torch.cuda.is_available() else 1
    # Random weights are named by `args`.
    settled = ["--model", run.model.model] if random_weights_of(run) is None else []
    settled += ["--per_device_train_batch_size", str(rows)]
    settled += ["--activation_checkpointing", str(bool(run.training.activation_checkpointing))]
    command = [sys.executable, "-m", "novelgpt.checks.longest_batch", pipeline, *args, *settled]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=time_limit, env=environment)
    except subprocess.TimeoutExpired:
        yield Finding(
            NAME,
            "note",
            f"loading and trying it took more than {time_limit:.0f} s and was stopped",
            f"--time_limit {time_limit * 4:.0f} waits longer",
        )
        return
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        yield from (Finding(**finding) for finding in json.loads(lines[-1]))
        return
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    yield Finding(
        NAME,
        "problem",
        f"the process that tried it exited with status {done.returncode}: {reason:.300}",
        "status -9 means out of memory: a shorter --max_length, or a smaller model",
    )


def try_longest_batch(run: TrainingRun) -> Iterator[Finding]:
    """Load the model and run it on rows of --max_length tokens, in the precision of the run.

    Raises:
        UserError: it cannot be loaded or trained.
    """
    training, device = run.training, run.training.device
    start = time.perf_counter()
    tokenizer = load_tokenizer(run.model)
    qlora = isinstance(run, LoraRun) and run.lora.qlora
    base = load_model(run.model, tokenizer, base_dtype(run), qlora)
    model = adapt(run, base).to(device)
    loaded = f"{type(base).__name__} loaded in {time.perf_counter() - start:.0f} s, no weight missing"
    yield Finding("model", "ok", loaded)
    if training.activation_checkpointing:
        base.activation_checkpointing_enable(**checkpointing_options(training))
    attach_chunked_loss(base, not changes_logits(base.config))
    dtype = compute_dtype(training)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    tokens = run.data.max_length
    batch = worst_batch(training.per_device_train_batch_size, tokens, run.data.packing, device)
    ids = torch.tensor(encode(TEXT, tokenizer), device=device)
    size = batch["input_ids"].numel()
    batch["input_ids"] = ids.repeat(size // len(ids) + 1)[:size].reshape(batch["input_ids"].shape)
    batch["labels"] = batch["input_ids"].clone()

    def train() -> None:
        model.train()
        with check_gradients(model):
            with autocast():
                loss = model(**batch, num_items_in_batch=size).loss
            loss.backward()

    shape = f"{training.per_device_train_batch_size} x {counted(tokens, 'token')}"
    start = time.perf_counter()
    try:
        if device.type == "cuda":
            peak, has = cuda_peak(train), torch.cuda.get_device_properties(device).total_memory
        else:
            train()
            peak, has = psutil.Process().memory_info().rss, sys.maxsize  # what it holds, gradients included
        model.zero_grad()
        check_forward(model, batch, dtype or base_dtype(run), autocast)
    except torch.OutOfMemoryError:
        yield Finding(
            NAME,
            "problem",
            f"{shape} do not fit into the memory of this {device.type}",
            REMEDY,
        )
        return
    states = optimizer_bytes(training) * sum(part.numel() for part in model.parameters() if part.requires_grad)
    text = (
        f"{shape} on this {device.type}: forward, backward and evaluation pass in {time.perf_counter() - start:.0f} s, "
        f"{gigabytes(peak)} with {gigabytes(states)} of optimizer to come"
    )
    yield first_case(
        NAME,
        text,
        (
            peak + states > has,
            "problem",
            f"{text}: more than the GPU has",
            "--auto_batch, or --activation_checkpointing",
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the findings on the run that the arguments describe."""
    pipeline, *args = list(sys.argv[1:] if argv is None else argv)
    findings = run_check("model", lambda: try_longest_batch(parse_run(pipeline, args)))
    print(json.dumps([asdict(finding) for finding in findings]), flush=True)  # noqa: T201 - for the doctor, in ASCII


if __name__ == "__main__":
    main()
