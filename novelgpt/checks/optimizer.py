"""Tries the optimizer, its schedule and activation checkpointing on a single weight, before a run has a folder."""

from __future__ import annotations

import re

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler

from novelgpt.budget.memory import checkpointing_options
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pip_install

# What libraries raise on a value that they cannot take.
REFUSALS = (TypeError, ValueError, KeyError, AssertionError, NotImplementedError)
STEPS = 100
WARMUP_STEPS = 10


def check_optimizer(training: TrainArguments) -> None:
    """Make sure that the optimizer, its schedule and the checkpointing of activations can be made as they are set.

    Raises:
        UserError: names the option, and the package where one is missing.
    """
    _check_schedule(training, _try_optimizer(training))
    options = checkpointing_options(training)["activation_checkpointing_kwargs"] or {}
    try:
        checkpoint(torch.neg, torch.ones(1, requires_grad=True), **({"use_reentrant": False} | options))
    except REFUSALS as error:
        raise UserError(
            f"--activation_checkpointing_kwargs {options}: {_line(error)}",
            "take arguments of torch.utils.checkpoint.checkpoint, such as use_reentrant, or leave it out",
        ) from error


def _try_optimizer(training: TrainArguments) -> torch.optim.Optimizer:
    """The optimizer on one weight; a plain one in place of one that is not torch's and needs the model or a GPU."""
    weight = torch.nn.Parameter(torch.zeros(1))
    plain = torch.optim.SGD([weight], lr=1.0)
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(training, None)
        return made([weight], **options) if made.__module__.startswith("torch.optim") else plain
    except (*REFUSALS, ImportError) as error:
        if "need to pass a" in str(error):  # the model, which the optimizer looks through
            return plain
        named = re.search(r"pip install (?:-U )?([\w\[\]+:/.-]+)", str(error))
        remedy = pip_install(named[1].rstrip(".")) if named else "correct it, or take another --optim"
        name = str(getattr(training.optim, "value", training.optim))
        raise UserError(f"--optim {name}: {_line(error)}", remedy) from error


def _check_schedule(training: TrainArguments, optimizer: torch.optim.Optimizer) -> None:
    options = training.lr_scheduler_kwargs
    try:
        get_scheduler(
            training.lr_scheduler_type, optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=STEPS,
            scheduler_specific_kwargs=options if isinstance(options, dict) else {},
        )  # fmt: skip
    except REFUSALS as error:
        name = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
        raise UserError(
            f"--lr_scheduler_type {name} with {options or 'no'} --lr_scheduler_kwargs: {_line(error)}",
            "name what the schedule takes, as in --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}', or take another one",
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
