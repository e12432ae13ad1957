"""The Trainer with verified checkpoints, which resumes from one as if it had never stopped.

Three things make that exact: every optimizer step draws from a random state that follows from the seed, the process and
the step alone; the order of rows follows from the seed and the epoch alone; and the states of the optimizer are stored
by the names of the weights, whatever the number of processes.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from novelgpt.model.card import CARD, may_write_card
from novelgpt.model.portable import make_portable
from novelgpt.settings.atomic_files import follow_umask
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import raise_on_all_ranks
from novelgpt.text.sections import SectionedRows
from novelgpt.training.checkpoints.folders import (
    best_checkpoint,
    checkpoint_folder,
    checkpoints,
    delete_old,
    describe_files,
    files_in,
    finish,
    step_of,
    unfinished_folder,
)
from novelgpt.training.checkpoints.optimizer_states import read_states, write_states
from novelgpt.training.checkpoints.sampling import EpochRows, ShuffledRows, order_seed, seed_step
from novelgpt.training.checkpoints.weights import (
    StoredWeights,
    check_weights,
    expected_weights,
    gather_and_set,
    load_weights,
    weight_paths,
)

STATES = "states.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# What libraries say of a full disk; torch's writer of archives says only that it failed.
FULL_DISK_MESSAGES = ("No space left", "os error 28", "Disk quota", "os error 122")
FULL_DISK_FAILURES = ("PytorchStreamWriter", "unexpected pos")


class CheckpointTrainer(Trainer):
    """The stock training loop with checkpoints of our own."""

    def __init__(self, *, complete: Callable[[Path], None] | None = None, **arguments: Any) -> None:
        """`complete` adds files to a folder of weights, on the first process, before it is verified and hashed."""
        super().__init__(**arguments)
        self._complete = complete
        self._order: EpochRows | None = None
        self._stored: dict[str, Any] | None = None  # states.json of the checkpoint that is resumed
        self._aux_sum = torch.zeros(())  # of the routers' balancing losses of this process, since the last log entry
        self._aux_loss: torch.Tensor | None = None  # of the current micro-batch
        self.saved_step: int | None = None  # of the best checkpoint, known at the end
        self.reloaded = False  # whether its weights have replaced those of the last step
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[Any] | None:
        """The stock order of rows, which can start at any row at no cost."""
        rows: Any = train_dataset or self.train_dataset
        if isinstance(rows, SectionedRows):
            self._order = EpochRows(rows.per_epoch)
            return self._order
        stock = super()._get_train_sampler(train_dataset)
        if type(stock) is not torch.utils.data.RandomSampler:
            return stock
        self._order = ShuffledRows(len(rows), order_seed(self.args))
        return self._order

    def _init_training_state(self, max_steps: int, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        """The stock start, with intervals given as shares of the run converted to steps.

        Otherwise a run resumed with the same share is warned that it differs from the steps in its checkpoint.
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = vars(self.args)[name]
            if value is not None and value < 1:
                setattr(self.args, name, math.ceil(max_steps * value))
        return cast("tuple[int, int]", super()._init_training_state(max_steps, *arguments, **keywords))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The stock preparation, but states are read here, also DeepSpeed's, whose own files are pickles."""
        if resume_from_checkpoint is None or self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        folder = Path(resume_from_checkpoint)
        if self.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            self._load_from_checkpoint(str(folder))  # in place, before ZeRO's fp32 weights are set
        read_states(folder, cast(nn.Module, self.model), self.optimizer)
        self._stored = json.loads((folder / STATES).read_text(encoding="utf-8"))
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(schedule.state_dict() | self._stored["schedule"])
        scaler = self.accelerator.scaler
        if scaler is not None and self._stored["scaler"] is not None:
            scaler.load_state_dict(self._stored["scaler"])
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            for name, value in self._stored["engine"].items():
                setattr(engine, name, value)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing: random states follow from the step."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The stock saving, without the pickle of the arguments, which run.json holds; transformers 4 can read it."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            make_portable(folder)
            follow_umask(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Fill a folder under another name, verify, hash and rename it; only then may older ones be deleted.

        Raises:
            UserError: on all processes, where one of them could not write or what was written is not sound; the folder
                is gone then, and the older checkpoints are there.
        """
        run_folder = Path(str(self.args.output_dir))
        folder = checkpoint_folder(run_folder, self.state.global_step)
        first = self.is_world_process_zero()
        self.store_flos()
        self._note_best(folder)
        with self._filling(folder) as unfinished:
            if not self.args.save_only_model:
                with raise_write_errors(folder):
                    self._write_states(unfinished)
            with raise_write_errors(folder):
                # Each process hashes its own optimizer states, the first one everything else.
                own = f"optimizer-{self.args.process_index}-of-{self.args.world_size}.safetensors"
                states = "optimizer-" if self.is_deepspeed_enabled else own
                names = [
                    name for name in files_in(unfinished) if name == own or (first and not name.startswith(states))
                ]
                files = describe_files(unfinished, names)
            files = {name: entry for part in gather_object([files]) for name, entry in part.items()}
            with raise_write_errors(folder):
                if first:
                    finish(folder, files, self.state.global_step)
                    delete_old(run_folder, folder, self.state.best_model_checkpoint, self.args.save_total_limit)

    def _note_best(self, *being_saved: Path) -> None:
        """Let the state name the best checkpoint, of those that exist and the one that is being saved."""
        folders = {*checkpoints(Path(str(self.args.output_dir))), *being_saved}
        best = best_checkpoint(folders, self.state.log_history, self.args)
        self.state.best_model_checkpoint = None if best is None else str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Full weights are read here: the stock loading skips those that have other names than in memory."""
        into = model or self.model
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled or not isinstance(into, PreTrainedModel) or not weight_paths(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(folder, into)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, unless it is that of the last step, and note its step as `saved_step`."""
        folder = Path(str(self.state.best_model_checkpoint))
        self.saved_step = step_of(folder)
        self.reloaded = self.saved_step != self.state.global_step
        if not self.reloaded:
            return
        if self.is_fsdp_enabled:
            super()._load_best_model()
        elif is_deepspeed_zero3_enabled():
            with ExitStack() as stack:
                gather_and_set(cast(nn.Module, self.model), StoredWeights(folder, stack).tensor)
        else:
            self._load_from_checkpoint(str(folder))

    def save_final(self, folder: Path) -> None:
        """Save weights and tokenizer into the run folder, all of them verified, or none.

        Raises:
            UserError: as `_save_checkpoint`.
        """
        work = folder / "weights"
        with self._filling(work) as unfinished, raise_write_errors(work):
            if self.is_world_process_zero():
                describe_files(unfinished, files_in(unfinished))  # for the sync
                if not may_write_card(folder):
                    (unfinished / CARD).unlink(missing_ok=True)
                for path in sorted(unfinished.iterdir()):
                    path.replace(folder / path.name)
                unfinished.rmdir()

    @contextmanager
    def _filling(self, folder: Path) -> Iterator[Path]:
        """Yield the unfinished folder with verified weights in it; after an error it is gone."""
        unfinished = unfinished_folder(folder)
        first = self.is_world_process_zero()
        try:
            with raise_write_errors(folder):
                if first:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True)
            expected = expected_weights(cast(nn.Module, self.model))
            with raise_write_errors(folder):
                self.save_model(str(unfinished), _internal_call=True)
            with raise_write_errors(folder):
                if first:
                    if self._complete is not None:
                        self._complete(unfinished)
                    # A warm-up's first step has a learning rate of zero.
                    moved = self.state.global_step > 1 and self.args.learning_rate > 0
                    check_weights(unfinished, expected, moved)
            yield unfinished
        except BaseException:
            if first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def rows_per_step(self) -> int:
        """Rows of an optimizer step, on all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _rows_state(self) -> dict[str, Any]:
        """What states.json holds of the rows: nothing where these follow from the step."""
        return {}

    def _write_states(self, unfinished: Path) -> None:
        """Write what the run needs to resume, beside the weights."""
        if self.is_fsdp_enabled:
            self._save_optimizer_and_scheduler(str(unfinished))
        elif self.is_deepspeed_enabled or self.is_world_process_zero():
            rank, processes = (self.args.process_index, self.args.world_size) if self.is_deepspeed_enabled else (0, 1)
            write_states(unfinished, cast(nn.Module, self.model), self.optimizer, rank, processes)
        losses = gather_object([(float(self._tr_loss), float(self._aux_sum))])
        if not self.is_world_process_zero():
            return
        scaler = self.accelerator.scaler
        schedule: Any = self.lr_scheduler
        engine: Any = self.model_wrapped if self.is_deepspeed_enabled else None
        names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        states = {
            "processes": self.args.world_size,
            # Functions, which JSON cannot hold, are restored from the arguments.
            "schedule": {key: value for key, value in schedule.state_dict().items() if _is_plain(value)},
            "scaler": None if scaler is None else scaler.state_dict(),
            "engine": {name: int(vars(engine)[name]) for name in names} if engine is not None else {},
            "losses": [loss for loss, _ in losses],
            "aux_losses": [aux_loss for _, aux_loss in losses],
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        } | self._rows_state()
        (unfinished / STATES).write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                cast(dict[str, Any], self.state.stateful_callbacks)[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))


class _Steps(TrainerCallback):
    """Sets up each step: its random state, its epoch's order of rows, and the losses stored in the checkpoint."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        self.trainer = trainer
        self._evaluates_again = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore losses since the last log entry; evaluate where the evaluation of the checkpoint's step was lost."""
        if not state.global_step:
            return
        self.trainer._note_best()  # the folder may have been moved, with all that is in it
        stored = self.trainer._stored
        if stored is None:
            return
        losses, aux_losses = stored["losses"], stored.get("aux_losses", [0.0])
        same = len(losses) == args.world_size
        self.trainer._tr_loss += losses[args.process_index] if same else sum(losses) / len(losses)
        self.trainer._aux_sum += aux_losses[args.process_index] if same else sum(aux_losses) / args.world_size
        self.trainer._total_loss_scalar = stored["total_loss"]
        self.trainer._globalstep_last_logged = stored["last_logged"]
        evaluated = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
        at_end = state.global_step % self._steps_per_epoch() == 0
        # An epoch's evaluation follows the checkpoint of its last step, and may have been lost; a signal skips that of
        # the step at which it ends the run.
        by_steps = args.eval_strategy == IntervalStrategy.STEPS and state.global_step % state.eval_steps == 0
        by_epochs = args.eval_strategy == IntervalStrategy.EPOCH and at_end
        args.eval_on_start = (by_steps or by_epochs) and not evaluated
        self._evaluates_again = args.eval_on_start

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Note whether the resumed checkpoint is the best one, which the stock loop does not do at a start."""
        if self._evaluates_again and metrics is not None:
            self.trainer._determine_best_metric(metrics, None)
        self._evaluates_again = False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the order of the epoch; rows of steps before the checkpoint are skipped without being read."""
        if self.trainer._order is not None:
            epoch, steps = divmod(state.global_step, self._steps_per_epoch())
            self.trainer._order.epoch = epoch
            self.trainer._order.skipped = steps * self.trainer.rows_per_step()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the random state of the step."""
        seed_step(args.seed, args.process_index, state.global_step)

    def _steps_per_epoch(self) -> int:
        loader: Any = self.trainer.callback_handler.train_dataloader
        return max(1, math.ceil(len(loader) / self.trainer.args.gradient_accumulation_steps))


@contextmanager
def raise_write_errors(folder: Path) -> Iterator[None]:
    """Raise on all processes what one of them meets in writing a folder; each waits for the others at the end."""
    with raise_on_all_ranks():
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the tokenizers' writer raises nothing narrower
            message = str(error)
            full = isinstance(error, OSError) and error.errno in FULL_DISK
            full = full or any(part in message for part in FULL_DISK_MESSAGES)
            full = full or (isinstance(error, RuntimeError) and any(part in message for part in FULL_DISK_FAILURES))
            if full:
                raise UserError(
                    f"the disk of {folder.parent} is full: {folder.name} was not written",
                    "make room there (older checkpoints are intact), and run the same command again to resume from the "
                    "last one",
                ) from error
            if not isinstance(error, (OSError, SafetensorError)) and "(os error" not in message:
                raise
            raise UserError(
                f"{folder.name} cannot be written: {error}",
                f"make {folder.parent} writable, and run the same command again",
            ) from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
