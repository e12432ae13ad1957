"""The files that the examples of transformers write at the root of a run, which dashboards and scripts read.

trainer_state.json is the state at the end. train_results.json and eval_results.json hold the figures of training and of
the evaluation of the weights that are saved, all_results.json both of them. They exist once a run is complete: one
that was stopped or killed has its state in its checkpoints, and a resumed run starts without them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.run_record import only_json

TRAIN_RESULTS, EVAL_RESULTS, ALL_RESULTS = "train_results.json", "eval_results.json", "all_results.json"
RESULT_FILES = (TRAIN_RESULTS, EVAL_RESULTS, ALL_RESULTS, TRAINER_STATE_NAME)


def write_result_files(
    folder: Path, state: TrainerState, training: dict[str, Any], train_rows: int, eval_rows: int
) -> None:
    """Write the files, each of them atomically; called by the first process only.

    Args:
        folder: of the run.
        state: at its end; the last evaluation of its history is that of the weights that are saved.
        training: figures of training, as Trainer.train returns them.
        train_rows: number of training rows.
        eval_rows: number of rows evaluated on.
    """
    evaluation = next(entry for entry in reversed(state.log_history) if "eval_loss" in entry)
    evaluation = {name: value for name, value in evaluation.items() if name != "step"}
    evaluation |= {"perplexity": evaluation["eval_perplexity"], "eval_samples": eval_rows}
    training = training | {"train_samples": train_rows}
    # Of the best checkpoint's weights, the evaluation has an epoch of its own; the run's is that of training.
    figures = {TRAIN_RESULTS: training, EVAL_RESULTS: evaluation, ALL_RESULTS: evaluation | training}
    for name, content in figures.items():
        atomic_write(folder / name, json.dumps(only_json(content), indent=4, sort_keys=True) + "\n")
    # This file may leave the machine: it names the best checkpoint, which is beside it, without its path.
    best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
    content = only_json(dataclasses.asdict(dataclasses.replace(state, best_model_checkpoint=best)))
    atomic_write(folder / TRAINER_STATE_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")


def remove_result_files(folder: Path) -> None:
    """Delete the files of an earlier attempt of a run that was killed when it was almost complete."""
    for name in RESULT_FILES:
        (folder / name).unlink(missing_ok=True)
