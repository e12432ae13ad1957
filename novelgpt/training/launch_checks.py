"""What must hold before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from novelgpt.settings.errors import UserError
from novelgpt.settings.runs import TrainingRun
from novelgpt.training.run_folder import prepare_run_folder


def check_before_launch(run: TrainingRun) -> Path:
    """Files are there, switches make sense, and the run has a folder of its own, which is returned.

    Raises:
        UserError: otherwise.
    """
    for name in (*run.data.train_files, *run.data.valid_files):
        if not Path(name).is_file():
            raise UserError(f"{name} is no file", "check the path; relative ones start where you type")
    if not 0 <= run.data.valid_fraction < 1:
        raise UserError(f"--valid_fraction {run.data.valid_fraction} is no share", "take a number from 0 to below 1")
    return prepare_run_folder(run)
