"""What must hold before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from novelgpt.model.loading import adapter_base
from novelgpt.settings.errors import UserError
from novelgpt.settings.runs import TrainingRun
from novelgpt.training.run_folder import choose_run_folder


def check_before_launch(run: TrainingRun) -> None:
    """Files are there, switches make sense, and the run has a folder of its own, noted as its output_dir.

    Raises:
        UserError: otherwise.
    """
    for name in (*run.data.train_files, *run.data.valid_files):
        if not Path(name).is_file():
            raise UserError(f"{name} is no file", "check the path; relative ones start where you type")
    if not 0 < run.data.valid_fraction < 1:
        raise UserError(f"--valid_fraction {run.data.valid_fraction} is no share", "take a number between 0 and 1")
    for name, least in (("predict_during_eval", 0), ("predict_max_new_tokens", 1)):
        if vars(run.training)[name] < least:
            raise UserError(f"--{name} {vars(run.training)[name]} is too small", f"take at least {least}")
    if adapter_base(run.model.model) is not None:
        raise UserError(
            f"{run.model.model} is an adapter, not a base",
            "merge it first: python -m finetune_lora.merge ADAPTER OUTPUT, then train on OUTPUT",
        )
    choose_run_folder(run)
