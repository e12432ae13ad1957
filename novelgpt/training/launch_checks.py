"""What must hold before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from novelgpt.model.hub import locate
from novelgpt.model.loading import adapter_base, longest_row, read_config
from novelgpt.model.pickles import check_no_pickles
from novelgpt.settings.errors import UserError
from novelgpt.settings.runs import TrainingRun
from novelgpt.training.run_folder import choose_run_folder


def check_before_launch(run: TrainingRun) -> None:
    """Files are there, switches make sense, and the run has a folder of its own, noted as its output_dir.

    Raises:
        UserError: otherwise.
    """
    for name in (*run.data.train_files, *run.data.valid_files):
        if not Path(name).exists():
            raise UserError(f"{name} is no file", "check the path; relative ones start where you type")
    if not 0 < run.data.valid_fraction < 1:
        raise UserError(f"--valid_fraction {run.data.valid_fraction} is no share", "take a number between 0 and 1")
    leasts = {"predict_during_eval": 0, "predict_max_new_tokens": 1, "stop_check": 0, "stop_check_max_new_tokens": 1}
    leasts |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
    for name, least in (leasts | {"learning_rate": 0}).items():
        value = vars(run.training)[name]
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small", f"take at least {least}")
    if adapter_base(run.model.model) is not None:
        raise UserError(
            f"{run.model.model} is an adapter, not a base",
            "merge it first: python -m finetune_lora.merge ADAPTER OUTPUT, then train on OUTPUT",
        )
    check_no_pickles(Path(locate(run.model)), run.model.allow_pickles)
    longest = longest_row(read_config(run.model))
    if longest is not None and run.data.max_length > longest:
        raise UserError(
            f"--max_length {run.data.max_length} is more than the {longest} positions that {run.model.model} knows",
            f"take --max_length {longest} or less; a model whose positions were stretched says so in its config.json",
        )
    choose_run_folder(run)
