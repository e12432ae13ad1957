"""What a run will take on the disk, known before its weights are loaded, against what is free there."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from novelgpt.budget.memory import ADAMW_BYTES, compute_dtype, optimizer_bytes
from novelgpt.budget.memory_plan import MemoryPlan
from novelgpt.budget.simulated_model import SimulatedModel
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import existing_folder
from novelgpt.settings.process import is_first_process, raise_on_all_ranks
from novelgpt.settings.terminal import gigabytes, say
from novelgpt.text.sections import rows_per_epoch

# DeepSpeed trains copies of the weights in fp32, which belong to the optimizer's states.
MASTER_BYTES = 4
# A checkpoint's small files: configuration, counters, schedule, headers.
SMALL_FILES = 40_000
# Of a run: run.json, loss.png, TensorBoard's first event; and of each point of the curves, in all places that keep it.
RUN_FILES, POINT_BYTES = 200_000, 1_000
# What the file system keeps for itself as files grow.
MARGIN = 1.01


@dataclass(frozen=True)
class DiskForecast:
    """Bytes of a run folder when it is fullest.

    Attributes:
        checkpoint: of one, all processes' parts together.
        most: checkpoints that exist at the same time, the one that is being written included; None where nothing limits
            them.
        kept: of these, those that are kept when a newer one is complete.
        final: of the final weights, which are written when no checkpoint is.
        other: logs and curves.
    """

    checkpoint: int
    most: int | None
    kept: int
    final: int
    other: int

    @property
    def need(self) -> int:
        """Bytes at the fullest moment; without those of checkpoints where nothing limits them."""
        writing = self.checkpoint * (self.most or 0)
        return int(MARGIN * (max(writing, self.checkpoint * self.kept + self.final) + self.other))


@raise_on_all_ranks()
def check_disk(plan: MemoryPlan, train: Dataset[Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Show what the run will take on the disk, and refuse to start where it is not there.

    Args:
        plan: with the settled run, and the model as far as it could be simulated.
        train: the rows.
        tokenizer: as it is saved with each checkpoint.

    Raises:
        UserError: less is free than the run takes, on all processes.
    """
    if is_first_process() and plan.model is not None:
        steps = steps_in_epoch(rows_per_epoch(train), plan.training)
        forecast = forecast_disk(plan.model, plan.training, saved_bytes(tokenizer), steps)
        folder = Path(str(plan.training.output_dir))
        held, free = bytes_in(folder), shutil.disk_usage(existing_folder(folder)).free
        say(f"disk: {describe(forecast, held)}, {gigabytes(free)} free")
        problem = lack_of_room(forecast, held, free, folder)
        if problem is not None:
            raise problem


def forecast_disk(
    model: SimulatedModel, training: TrainArguments, tokenizer: int, steps: int | None = None
) -> DiskForecast:
    """What a run of `model` leaves on the disk.

    Args:
        model: what trains.
        training: optimizer, DeepSpeed, and when and how often it saves.
        tokenizer: bytes of its files.
        steps: optimizer steps of an epoch; None where the rows are not known.
    """
    # ZeRO gathers tied weights as separate copies.
    weights = model.saved + (model.shared if training.deepspeed else 0) + tokenizer + SMALL_FILES
    numbers = sum(count for count, _ in model.trained)
    each: float = optimizer_bytes(training)
    if training.deepspeed:
        settings: dict[str, Any] = training.hf_deepspeed_config.config
        each = ADAMW_BYTES if "optimizer" in settings else each
        stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        each += MASTER_BYTES if stage or compute_dtype(training) is not None else 0
    states = 0 if training.save_only_model else int(numbers * each)
    total = training.max_steps if training.max_steps > 0 else None
    if total is None and steps is not None:
        total = math.ceil(training.num_train_epochs * steps)
    most, kept = _checkpoints(training, total)
    points = 0 if total is None else _times(total, training.logging_steps, total)
    return DiskForecast(weights + states, most, kept, weights, RUN_FILES + POINT_BYTES * points)


def steps_in_epoch(rows: int, training: TrainArguments) -> int:
    """Optimizer steps that the Trainer makes of `rows` rows."""
    batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    return max(1, math.ceil(batches / training.gradient_accumulation_steps))


def lack_of_room(forecast: DiskForecast, held: int, free: int, folder: Path) -> UserError | None:
    """What to say where a run does not fit on its disk; None where it fits.

    Args:
        forecast: of the run.
        held: bytes that its folder holds already, which it resumes from or replaces.
        free: bytes of its file system.
        folder: of the run.
    """
    if forecast.need - held <= free:
        return None
    remedies = ["another disk: --output_dir FOLDER"]
    if forecast.most is not None and forecast.most > 2:
        remedies.insert(0, f"keep fewer: --save_total_limit {max(1, forecast.most - 2)}")
    if forecast.most:
        remedies.append("or weights that cannot be resumed from: --save_only_model True")
    also = f", of which {gigabytes(held)} are there" if held else ""
    return UserError(
        f"the disk of {folder} is too small for this run: {describe(forecast)}{also}, and {gigabytes(free)} are free",
        f"make room, or {', '.join(remedies)}",
    )


def describe(forecast: DiskForecast, held: int = 0) -> str:
    """Format the forecast."""
    each = gigabytes(forecast.checkpoint)
    if forecast.most is None:
        what = f"final weights; nothing limits the checkpoints of {each} each"
    elif forecast.most == 0:
        what = "final weights, no checkpoints"
    else:
        what = f"at most {forecast.most} checkpoint{'s' * (forecast.most > 1)} of {each} at once, and the final weights"
    also = f", {gigabytes(held)} of it there already" if held else ""
    return f"{gigabytes(forecast.need)} expected ({what}){also}"


def saved_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the files that a tokenizer is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return bytes_in(Path(folder))


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder and below; none where it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _checkpoints(training: TrainArguments, total: int | None) -> tuple[int | None, int]:
    """Checkpoints at once while one is being written, None where nothing limits them; and when it is complete.

    The best one is never deleted, so that a limit of 1 keeps two where the best one is tracked.
    """
    strategy = SaveStrategy(training.save_strategy)
    if strategy == SaveStrategy.NO:
        return 0, 0
    made: int | None = None
    if strategy == SaveStrategy.STEPS:
        made = None if total is None else _times(total, training.save_steps, total)
    elif strategy == SaveStrategy.EPOCH and training.max_steps <= 0:
        made = math.ceil(training.num_train_epochs)
    elif total is not None:
        made = total  # at most: epochs of max_steps, or each evaluation that is better than those before
    limit = training.save_total_limit
    if not limit:
        return made, made or 0
    best = training.metric_for_best_model is not None and training.eval_strategy != IntervalStrategy.NO
    kept = max(limit, 2 if best else 1)
    return (kept + 1, kept) if made is None else (min(made, kept + 1), min(made, kept))


def _times(total: int, every: float, share_of: int) -> int:
    """How often something happens that is done every so many steps, or every share of all; at the end in any case."""
    return math.ceil(total / max(1, math.ceil(every * share_of) if every < 1 else every))
