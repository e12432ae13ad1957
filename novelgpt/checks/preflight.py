"""The doctor's checks before each training: those that take no noticeable time, in the process that trains.

What needs the rows or the weights follows where these are at hand: disk and memory before weights are loaded, the
longest micro-batch on the model itself before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from novelgpt.budget.memory import compute_dtype
from novelgpt.checks import devices, machine, model, versions
from novelgpt.checks.findings import Check, Finding, run_check
from novelgpt.model.pickles import pickled_weights
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process, raise_on_all_ranks
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import say


@raise_on_all_ranks()
def preflight(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look at versions, devices and the model's files; print a line for what may not be as meant.

    Nothing is looked at with `--preflight False`. A check that fails itself is only told.

    Raises:
        UserError: with the first thing that stands in the way, on all processes.
    """
    if not run.training.preflight:
        return
    if is_first_process():
        findings = list(_findings(run, tokenizer))
        for finding in findings:
            if finding.mark == "note":
                say(f"{finding.check}: {finding.text}; {finding.remedy}", style="yellow")
        problems = [finding for finding in findings if finding.mark == "problem"]
        if problems:
            text = f"{problems[0].check}: {problems[0].text}"
            raise UserError(text, f"{problems[0].remedy}; --preflight False looks at nothing")


def _findings(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    for name, check in _checks(run, tokenizer):
        yield from run_check(name, check, failure="note")


def _checks(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Check]]:
    """By name, those that this run can fall over."""
    yield "packages", versions.check_packages
    cuda = torch.cuda.is_available()
    if cuda or devices.driver_cuda() is not None:
        yield "gpu", devices.check_gpus
    if cuda and run.training.precision == "auto":
        yield "precision", devices.check_precision
    elif compute_dtype(run.training) is not None and run.training.device.type == "cpu":
        yield "precision", partial(devices.check_precision, run.training)
    if cuda and run.training.world_size > 1:
        yield "shared memory", machine.check_shared_memory
    if cuda and run.training.deepspeed and compiles_operators(run.training.hf_deepspeed_config.config):
        yield "compilers", devices.check_toolchain
    folder = Path(run.model.model)
    if folder.is_dir() and not pickled_weights(folder):  # those are read once, as they are loaded
        yield "model files", partial(model.check_files, run)
    yield "vocabulary", partial(model.check_vocabulary, run, tokenizer)


def compiles_operators(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed settings ask for operators that DeepSpeed compiles: its own optimizers, and offloading to them.

    Args:
        settings: as the JSON file holds them.
    """
    zero: dict[str, Any] = settings.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    return "optimizer" in settings or offload.get("device", "none") != "none" or bool(zero.get("cpu_offload", False))
