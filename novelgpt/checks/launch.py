"""What must hold before anything is loaded."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

from transformers.training_args import ParallelMode

from novelgpt.checks.optimizer import check_optimizer
from novelgpt.model.hub import locate
from novelgpt.model.loading import adapter_base, longest_row, read_config
from novelgpt.model.pickles import check_no_pickles
from novelgpt.settings.arguments import ANSWER_FIGURES, EVALUATION_FIGURES, TrainArguments, check_ranges
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import EMBEDDED_BASE, TINY
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import python_module
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import say

MOST_STEPS = 1e12
# What launchers tell a process, which DeepSpeed reads.
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANGES: dict[str, tuple[float, float]] = {
    "max_eval_share": (0, 1e6),
    "predict_during_eval": (0, 1e6),
    "predict_max_new_tokens": (1, 1e6),
    "stop_check": (0, 1e6),
    "stop_check_max_new_tokens": (1, 1e6),
    "router_aux_loss_coef": (0, 1e3),
    "per_device_train_batch_size": (1, 1e6),
    "per_device_eval_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6),
    "learning_rate": (0, 1),
    "num_train_epochs": (0, 1e6),
    "weight_decay": (0, 1),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, 1e6),
    "warmup_steps": (0, MOST_STEPS),
    "save_total_limit": (0, 1e6),
    "dataloader_num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
}


def check_before_launch(run: TrainingRun) -> None:
    """Files are there, and switches make sense.

    Raises:
        UserError: otherwise.
    """
    for name in (*run.data.train_files, *run.data.valid_files):
        if not name or not _exists(name):
            raise UserError(f"{name or repr(name)} is no file", "check the path; relative ones start where you type")
    if not 0 < run.data.valid_fraction < 1:
        raise UserError(f"--valid_fraction {run.data.valid_fraction} is no share", "take a number between 0 and 1")
    _check_numbers(run.training)
    _check_best(run.training)
    _check_processes(run.training)
    check_optimizer(run.training)
    if run.model.model == str(EMBEDDED_BASE) and is_first_process():
        say(f"training the small base ({TINY}), with the settings of {run.pipeline}/configs/{TINY}.yaml")
    if adapter_base(run.model.model) is not None:
        raise UserError(
            f"{run.model.model} is an adapter, not a base",
            f"merge it first: {python_module('finetune_lora.merge ADAPTER OUTPUT')}, then train on OUTPUT",
        )
    check_no_pickles(Path(locate(run.model)), run.model.allow_pickles)
    longest = longest_row(read_config(run.model))
    if longest is not None and run.data.max_length > longest:
        raise UserError(
            f"--max_length {run.data.max_length} is more than the {longest} positions that {run.model.model} knows",
            f"take --max_length {longest} or less; a model whose positions were stretched says so in its config.json",
        )


def _check_numbers(training: TrainArguments) -> None:
    """Each number lies where training makes something of it; NaN lies nowhere."""
    check_ranges(training, RANGES)
    if training.max_steps != -1:
        check_ranges(training, {"max_steps": (1, MOST_STEPS)})
    elif not training.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs {training.num_train_epochs} is too small", "take more than 0")
    intervals = {"logging": training.logging_strategy, "eval": training.eval_strategy, "save": training.save_strategy}
    for name, strategy in intervals.items():
        every = vars(training)[f"{name}_steps"]
        if strategy == "steps" and every is not None and not 0 < every < math.inf:
            raise UserError(f"--{name}_steps {every} is no distance", "take a number of steps, or a share below 1")


def _check_best(training: TrainArguments) -> None:
    """The figure that tells the best checkpoint is one that evaluations have."""
    if training.metric_for_best_model is None:
        return
    figure = training.metric_for_best_model.removeprefix("eval_")
    if figure in ANSWER_FIGURES and not training.predict_during_eval:
        raise UserError(
            f"--metric_for_best_model {figure} is a figure of answers, and evaluations give none",
            "--predict_during_eval ROWS says how many rows they answer",
        )
    if figure not in EVALUATION_FIGURES | ANSWER_FIGURES:
        raise UserError(
            f"--metric_for_best_model {figure} is no figure of evaluations",
            f"take one of {', '.join(EVALUATION_FIGURES | ANSWER_FIGURES)}",
        )
    if training.load_best_model_at_end and training.save_only_model and training.deepspeed:
        raise UserError(
            "--save_only_model and --load_best_model_at_end do not go together under DeepSpeed",
            "leave one of the two out",
        )


def _check_processes(training: TrainArguments) -> None:
    """Several processes are there for what is shared among them, and DeepSpeed finds what it meets them by."""
    if training.deepspeed and not importlib.util.find_spec("mpi4py"):  # by which it would ask mpirun
        missing = [name for name in OF_LAUNCHERS if name not in os.environ]
        if missing:
            raise UserError(
                f"--deepspeed needs a launcher, also for one process: {missing[0]} is not set",
                "ZERO=2 before the script, or before the command novelgpt, starts one",
            )
    if training.fsdp and training.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "--fsdp shares a model among processes, and there is one", "NPROC=2 before the command, or more"
        )


def _exists(name: str) -> bool:
    """Whether there is a file or folder of that name; names that no file can have are of none."""
    try:
        return Path(name).exists()
    except OSError:
        return False
