"""Checks of a run's arguments, before anything is loaded and before the run has a folder."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode

from novelgpt.budget.memory import checkpointing_options
from novelgpt.model.hub import locate
from novelgpt.model.loading import adapter_base, longest_row, read_config
from novelgpt.model.random_base import ensure_random_base
from novelgpt.model.weight_files import check_no_pickles
from novelgpt.settings.arguments import (
    ANSWER_FIGURES,
    EVALUATION_FIGURES,
    ConversationArguments,
    CorpusArguments,
    TrainArguments,
    check_ranges,
)
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import pip_install, python_module
from novelgpt.settings.runs import TrainingRun, random_weights_of
from novelgpt.settings.small_bases import small_base_name
from novelgpt.settings.terminal import say
from novelgpt.text.data_names import find_data, find_text_files, split_part
from novelgpt.text.dataset_info import find_datasets

MAX_STEPS = 1e12
# Variables that launchers set and DeepSpeed reads.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What libraries raise on a value that they cannot take.
REFUSALS = (TypeError, ValueError, KeyError, AssertionError, NotImplementedError)
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
    "warmup_steps": (0, MAX_STEPS),
    "save_total_limit": (0, 1e6),
    "dataloader_num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
}


def check_arguments(run: TrainingRun) -> None:
    """Check that files exist, that values are in range, and that options fit each other and the model.

    Raises:
        UserError: names the first option that does not.
    """
    for name in (*run.data.train_files, *run.data.valid_files):
        if isinstance(run.data, CorpusArguments):
            find_text_files(name)
        else:
            find_data(split_part(name)[0])
    if not isinstance(run.data, CorpusArguments):
        for described in find_datasets([*run.data.dataset, *run.data.eval_dataset], run.data.dataset_dir):
            find_data(described.place, described.folder or "")
    if not 0 < run.data.valid_fraction < 1:
        raise UserError(f"--valid_fraction {run.data.valid_fraction} is not a share", "use a number between 0 and 1")
    _check_numbers(run.training)
    if isinstance(run.data, CorpusArguments) and run.data.ditto and run.training.label_smoothing_factor:
        raise UserError(
            "--label_smoothing_factor makes the loss of logits alone, without that of --ditto",
            "leave one of the two out",
        )
    if isinstance(run.data, ConversationArguments) and run.data.streaming:
        _check_streaming(run.data, run.training)
    mixed = isinstance(run.data, ConversationArguments) and bool(run.data.mix)
    for refused, cause, remedy in _combinations(run.training, mixed):
        if refused:
            raise UserError(cause, remedy)
    _check_optimizer(run.training)
    small_base = small_base_name(run.model.model)
    if small_base is not None and is_first_process():
        say(f"training the small base {small_base}, with the settings of {run.pipeline}/configs/{small_base}.yaml")
    make_random_base(run)
    if adapter_base(run.model.model) is not None:
        raise UserError(
            f"{run.model.model} is an adapter, not a base",
            f"merge it first: {python_module('finetune_lora.merge ADAPTER OUTPUT')}, then train on OUTPUT",
        )
    check_no_pickles(Path(locate(run.model)), run.model.allow_pickles)
    longest = longest_row(read_config(run.model))
    if longest is not None and run.data.max_length > longest:
        raise UserError(
            f"--max_length {run.data.max_length} exceeds the {longest} positions of {run.model.model}",
            f"use --max_length {longest} or less; a model with extended positions says so in its config.json",
        )


def make_random_base(run: TrainingRun) -> None:
    """Draw the weights of a run that starts from random ones, unless they are there.

    Raises:
        UserError: as ensure_random_base.
    """
    weights = random_weights_of(run)
    if weights is not None:
        ensure_random_base(weights, run.model)


def _check_numbers(training: TrainArguments) -> None:
    """Check that each number is in range; NaN never is."""
    check_ranges(training, RANGES)
    if training.max_steps != -1:
        check_ranges(training, {"max_steps": (1, MAX_STEPS)})
    elif not training.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs {training.num_train_epochs} is too small", "use more than 0")
    intervals = {"logging": training.logging_strategy, "eval": training.eval_strategy, "save": training.save_strategy}
    for name, strategy in intervals.items():
        every = vars(training)[f"{name}_steps"]
        if strategy == "steps" and every is not None and not 0 < every < math.inf:
            raise UserError(f"--{name}_steps {every} is not an interval", "use a number of steps, or a share below 1")


def _combinations(training: TrainArguments, mixed: bool) -> tuple[tuple[object, str, str], ...]:
    """Return (whether it is refused, cause, remedy) of options that do not fit each other or the launcher.

    Args:
        training: all of its arguments.
        mixed: whether sources are mixed by weight, so that evaluations tell the loss of each.
    """
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    metrics = EVALUATION_FIGURES | ANSWER_FIGURES
    missing = next((name for name in LAUNCHER_VARIABLES if name not in os.environ), None)
    connects = missing is None or importlib.util.find_spec("mpi4py")  # with which DeepSpeed would ask mpirun
    return (
        (
            metric in ANSWER_FIGURES and not training.predict_during_eval,
            f"--metric_for_best_model {metric} is a metric of answers, and evaluations generate none",
            "set how many rows they answer: --predict_during_eval ROWS",
        ),
        (
            metric not in metrics and not (mixed and metric.endswith("_loss")),
            f"--metric_for_best_model {metric} is not a metric of evaluations",
            f"use one of {', '.join(metrics)}",
        ),
        (
            mixed and training.train_sampling_strategy != "random",
            f"--train_sampling_strategy {training.train_sampling_strategy} cannot be combined with --mix, which draws "
            "the rows of each epoch in an order of its own",
            "leave one of the two out",
        ),
        (
            training.load_best_model_at_end and training.save_only_model and training.deepspeed,
            "--save_only_model and --load_best_model_at_end cannot be combined under DeepSpeed",
            "leave one of the two out",
        ),
        (
            training.deepspeed and not connects,
            f"--deepspeed needs a launcher, even for one process: {missing} is not set",
            "ZERO=2 before the script, or before the command novelgpt, starts one",
        ),
        (
            training.fsdp and training.parallel_mode != ParallelMode.DISTRIBUTED,
            "--fsdp shards a model across processes, and there is one",
            "NPROC=2 before the command, or more",
        ),
    )


def _check_streaming(data: ConversationArguments, training: TrainArguments) -> None:
    """Check that the options of a run fit rows whose number is unknown.

    Raises:
        UserError: names the first one that does not.
    """
    one_by_one = "--streaming reads rows one after the other"
    for refused, cause, remedy in (
        (training.max_steps < 1, "--streaming needs --max_steps, as the number of rows is unknown", "add it"),
        (
            not (data.valid_files or data.eval_dataset),
            "--streaming needs --valid_files, as no rows can be held out of a stream",
            "name them",
        ),
        (
            training.train_sampling_strategy != "random",
            f"{one_by_one}, and --train_sampling_strategy {training.train_sampling_strategy} needs all of them",
            "leave one of the two out; rows are shuffled within --buffer_rows",
        ),
        (
            training.dataloader_num_workers > 0,
            f"{one_by_one}, in a thread of its own, and each of --dataloader_num_workers would read all of them",
            "leave one of the two out",
        ),
    ):
        if refused:
            raise UserError(cause, remedy)


def _check_optimizer(training: TrainArguments) -> None:
    """Probe the optimizer, its schedule and the checkpointing of activations on a single weight."""
    optimizer, schedule = _probe_optimizer(training), training.lr_scheduler_kwargs
    try:
        get_scheduler(
            training.lr_scheduler_type, optimizer, num_warmup_steps=10, num_training_steps=100,
            scheduler_specific_kwargs=schedule if isinstance(schedule, dict) else {},
        )  # fmt: skip
    except REFUSALS as error:
        name = SchedulerType(training.lr_scheduler_type).value
        raise UserError(
            f"--lr_scheduler_type {name} with {schedule or 'no'} --lr_scheduler_kwargs: {_first_line(error)}",
            "name what the schedule takes, as in --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}', or use another one",
        ) from error
    options = checkpointing_options(training)["activation_checkpointing_kwargs"] or {}
    try:
        checkpoint(torch.neg, torch.ones(1, requires_grad=True), **({"use_reentrant": False} | options))
    except REFUSALS as error:
        raise UserError(
            f"--activation_checkpointing_kwargs {options}: {_first_line(error)}",
            "use arguments of torch.utils.checkpoint.checkpoint, such as use_reentrant, or leave it out",
        ) from error


def _probe_optimizer(training: TrainArguments) -> torch.optim.Optimizer:
    """Make the optimizer; a plain one in place of one that is not torch's and needs the model or a GPU."""
    weight = torch.nn.Parameter(torch.zeros(1))
    plain = torch.optim.SGD([weight], lr=1.0)
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(training, None)
        return made([weight], **options) if made.__module__.startswith("torch.optim") else plain
    except (*REFUSALS, ImportError) as error:
        if "need to pass a" in str(error):  # the model, which the optimizer looks through
            return plain
        named = re.search(r"pip install (?:-U )?([\w\[\]+:/.-]+)", str(error))
        raise UserError(
            f"--optim {OptimizerNames(training.optim).value}: {_first_line(error)}",
            pip_install(named[1].rstrip(".")) if named else "correct it, or use another --optim",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
