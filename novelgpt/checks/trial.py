"""Loads a model and runs its longest batch once, forward, backward and in evaluation, in a process that may be killed.

    python -m novelgpt.checks.trial PIPELINE [arguments of the pipeline]

Its last line on standard output is a JSON list of findings.
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

import psutil
import torch

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
from novelgpt.settings.paths import ROOT
from novelgpt.settings.runs import LoraRun, TrainingRun
from novelgpt.settings.terminal import counted, gigabytes
from novelgpt.text.encoding import encode

TEXT = "潮水退下去的时候，灯塔的影子正好落在那封没有寄出的信上。"
NAME = "longest batch"


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
    settled = ["--model", run.model.model, "--per_device_train_batch_size", str(rows)]
    settled += ["--activation_checkpointing", str(bool(run.training.activation_checkpointing))]
    command = [sys.executable, "-m", "novelgpt.checks.trial", pipeline, *args, *settled]
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
            "--per_device_train_batch_size 1, --activation_checkpointing, a shorter --max_length, or --auto_batch",
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
