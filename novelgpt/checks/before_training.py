"""Checks before training, each as early as its inputs exist, so that no problem is found after hours of preparation.

`check_arguments` (checks/arguments.py) needs the command line alone and runs before the folder is claimed; `preflight`
needs the tokenizer and runs before rows are read and tokenised; `check` needs the rows and runs before weights are
loaded. Checks that need the weights are passed to training in the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.budget.disk import check_disk
from novelgpt.budget.memory import compute_dtype
from novelgpt.budget.memory_plan import plan_memory
from novelgpt.checks import devices, machine
from novelgpt.checks.findings import Check, run_check
from novelgpt.checks.first_step import check_gradients, first_rows, probe_first_rows
from novelgpt.checks.longest_batch import rows_to_try, try_batch
from novelgpt.checks.run import check_files, check_vocabulary
from novelgpt.checks.scale import scale_of
from novelgpt.checks.stop_check import check_stops
from novelgpt.model.weight_files import pickled_weights
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process, raise_on_all_ranks
from novelgpt.settings.runs import TrainingRun, random_weights_of
from novelgpt.settings.terminal import say
from novelgpt.training.plan import Probe, TrainingPlan
from novelgpt.training.run_folder import RunFolder


@raise_on_all_ranks()
def preflight(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> None:
    """Run the doctor's quick checks of versions, devices and the model's files; print a line for each note.

    `--preflight False` skips them. A check that fails itself is only a note.

    Raises:
        UserError: the first problem, on all processes.
    """
    training = run.training
    if not (training.preflight and is_first_process()):
        return
    cuda, folder = torch.cuda.is_available(), Path(run.model.model)
    slow_precision = training.device.type == "cpu" and compute_dtype(training) is not None
    precision = slow_precision or (cuda and training.precision == "auto")
    compilers = cuda and training.deepspeed and compiles_operators(training.hf_deepspeed_config.config)
    readable = folder.is_dir() and not pickled_weights(folder)  # pickles are read once, when they are loaded
    checks: tuple[tuple[object, str, Check], ...] = (
        (True, "packages", machine.check_packages),
        (cuda or devices.driver_cuda() is not None, "gpu", devices.check_gpus),
        (precision, "precision", partial(devices.check_precision, training)),
        (cuda and training.world_size > 1, "shared memory", machine.check_shared_memory),
        (compilers, "compilers", devices.check_toolchain),
        (readable, "model files", partial(check_files, run)),
        (True, "vocabulary", partial(check_vocabulary, run, tokenizer)),
    )
    findings = [one for needed, name, check in checks if needed for one in run_check(name, check, failure="note")]
    for finding in findings:
        if finding.mark == "note":
            say(f"{finding.check}: {finding.text}; {finding.remedy}", style="yellow")
    for finding in findings:
        if finding.mark == "problem":
            raise UserError(
                f"{finding.check}: {finding.text}", f"{finding.remedy}; --preflight False skips these checks"
            )


def compiles_operators(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed settings ask for operators that DeepSpeed compiles: its own optimizers, and offloading to them.

    Args:
        settings: as in the JSON file.
    """
    zero: dict[str, Any] = settings.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    return "optimizer" in settings or offload.get("device", "none") != "none" or bool(zero.get("cpu_offload", False))


def check(
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    dtype: torch.dtype = torch.float32,
    qlora: bool = False,
    prepare: Callable[[PreTrainedModel], nn.Module] | None = None,
) -> TrainingPlan:
    """Estimate memory and disk of a run before its weights are loaded, and plan the checks of its training.

    Args:
        folder: with the run; micro-batch and checkpointing are settled in the plan's where the user left them open.
        tokenizer: as it is saved with each checkpoint.
        train: the rows.
        dtype: of the base's weights.
        qlora: whether the base is held in 4 bits.
        prepare: what the run makes of the base, such as attaching an adapter.

    Raises:
        UserError: memory or disk are too small, on all processes.
    """
    memory = plan_memory(folder.run, train, dtype, qlora, prepare)
    check_disk(memory, train, tokenizer)
    if is_first_process() and random_weights_of(folder.run) is not None:
        say(scale_of(memory))
    training, probes = memory.training, []
    if training.guards:
        probes.append(Probe(partial(first_rows, len(train)), probe_first_rows))  # type: ignore[arg-type]
    if training.preflight:
        probes.append(Probe(partial(rows_to_try, memory.lengths), try_batch))
    # Where weights may be left out of a step, a tensor without a gradient is not an error.
    watched = training.guards and not training.ddp_find_unused_parameters
    watch_gradients = check_gradients if watched else nullcontext
    return TrainingPlan(folder, memory, probes, watch_gradients, partial(check_stops, tokenizer, train))
