"""The Trainer whose checkpoints are whole, and which goes on from one as if it had never stopped.

Three things make that exact: every optimizer step draws from a random state that follows from the seed, the process and
the step alone; the order of rows follows from the seed and the epoch alone; and the states of the optimizer are kept by
the names of the weights, whatever the number of processes.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from novelgpt.training.checkpoints.best import best_checkpoint, load_into_parts
from novelgpt.training.checkpoints.folders import (
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
from novelgpt.training.checkpoints.sampling import ShuffledRows, seed_step
from novelgpt.training.checkpoints.weights import check_weights, expected_weights, load_weights, weight_paths

STATES = "states.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
Problem = tuple[str, str]


class CheckpointTrainer(Trainer):
    """The stock training loop around checkpoints of our own."""

    def __init__(self, *, complete: Callable[[Path], None] | None = None, **arguments: Any) -> None:
        """`complete` adds files to a folder of weights, on the first process, before it is looked at and listed."""
        super().__init__(**arguments)
        self._complete = complete
        self._order: ShuffledRows | None = None
        self._stored: dict[str, Any] | None = None  # states.json of the checkpoint that the run goes on from
        self._aux_sum = torch.zeros(())  # of the routers' balancing losses of this process, since the last log entry
        self._aux_loss: torch.Tensor | None = None  # of the micro-batch that is going on
        self.saved_step: int | None = None  # of the best checkpoint, once it is found at the end
        self.reloaded = False  # that checkpoint's weights have taken the place of the last step's
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[Any] | None:
        """The stock order of rows, from any row on in no time."""
        stock = super()._get_train_sampler(train_dataset)
        if type(stock) is not torch.utils.data.RandomSampler:
            return stock
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = ShuffledRows(len(cast(Any, train_dataset or self.train_dataset)), seed)
        return self._order

    def _init_training_state(self, max_steps: int, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        """The stock start, with shares of the run as the steps that they are.

        Else a run that goes on with the same share is warned that it differs from the steps in its checkpoint.
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = vars(self.args)[name]
            if value is not None and value < 1:
                setattr(self.args, name, math.ceil(max_steps * value))
        started: tuple[int, int] = super()._init_training_state(max_steps, *arguments, **keywords)
        return started

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The stock preparation; states are read by us, DeepSpeed's too, whose files are pickles."""
        if resume_from_checkpoint is None or self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        folder = Path(resume_from_checkpoint)
        if self.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
            self._load_from_checkpoint(str(folder))  # in place, where ZeRO's fp32 weights do not belong to it yet
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
        """Nothing to load: random states follow from the step."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Without the pickle of the arguments, which run.json holds; settings as transformers 4 reads them, too."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            make_portable(folder)
            follow_umask(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Fill a folder under another name, look at it, list it, rename it; only then may older ones go.

        Raises:
            UserError: on all processes, where one of them could not write or what was written is not sound; the folder
                is gone then, and the older checkpoints are there.
        """
        run_folder = Path(str(self.args.output_dir))
        folder = checkpoint_folder(run_folder, self.state.global_step)
        self.store_flos()
        self._note_best(folder)
        with self._filling(folder) as unfinished:
            if not self.args.save_only_model:
                with self._together(folder):
                    self._write_states(unfinished)
            files: dict[str, Any] = {}
            with self._together(folder):
                files = self._describe(unfinished)
            files = {name: entry for part in gather_object([files]) for name, entry in part.items()}
            with self._together(folder):
                if self.is_world_process_zero():
                    finish(folder, files, self.state.global_step)
                    delete_old(run_folder, folder, self.state.best_model_checkpoint, self.args.save_total_limit)

    def _note_best(self, *being_saved: Path) -> None:
        """Let the state name the best checkpoint of those that are there, and of the one that is being saved."""
        folders = {*checkpoints(Path(str(self.args.output_dir))), *being_saved}
        best = best_checkpoint(folders, self.state.log_history, self.args)
        self.state.best_model_checkpoint = None if best is None else str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Full weights are read by us: the stock loading passes over those of other names than in memory."""
        into = model or self.model
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled or not isinstance(into, PreTrainedModel) or not weight_paths(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(folder, into)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, unless it is that of the last step; `saved_step` tells its step."""
        folder = Path(str(self.state.best_model_checkpoint))
        self.saved_step = step_of(folder)
        self.reloaded = self.saved_step != self.state.global_step
        if not self.reloaded:
            return
        if self.is_fsdp_enabled:
            super()._load_best_model()
        elif is_deepspeed_zero3_enabled():
            load_into_parts(folder, cast(nn.Module, self.model))
        else:
            self._load_from_checkpoint(str(folder))

    def save_final(self, folder: Path) -> None:
        """Save weights and tokenizer into the run folder, all of them sound or none.

        Raises:
            UserError: as `_save_checkpoint`.
        """
        work = folder / "weights"
        with self._filling(work) as unfinished, self._together(work):
            if self.is_world_process_zero():
                describe_files(unfinished, files_in(unfinished))  # for what it syncs
                if not may_write_card(folder):
                    (unfinished / CARD).unlink(missing_ok=True)
                for path in sorted(unfinished.iterdir()):
                    path.replace(folder / path.name)
                unfinished.rmdir()

    @contextmanager
    def _filling(self, folder: Path) -> Iterator[Path]:
        """The unfinished folder with sound weights in it; after an error it is gone."""
        unfinished = unfinished_folder(folder)
        try:
            with self._together(folder):
                if self.is_world_process_zero():
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True)
            expected = expected_weights(cast(nn.Module, self.model))
            with self._together(folder):
                self.save_model(str(unfinished), _internal_call=True)
            with self._together(folder):
                if self.is_world_process_zero():
                    if self._complete is not None:
                        self._complete(unfinished)
                    check_weights(unfinished, expected, self._has_moved())
            yield unfinished
        except BaseException:
            if self.is_world_process_zero():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    @contextmanager
    def _together(self, folder: Path) -> Iterator[None]:
        """What one process meets within is raised on all of them; each of them waits for the others at the end."""
        problem: Problem | None = None
        try:
            yield
        except UserError as error:
            problem = (error.cause, error.remedy)
        except Exception as error:  # the tokenizers' writer raises nothing narrower
            problem = _write_problem(error, folder)
            if problem is None:
                raise
        found = [one for one in gather_object([problem]) if one is not None]
        if found:
            raise UserError(*found[0])

    def _has_moved(self) -> bool:
        """Whether a step was made with a learning rate above zero, which a warm-up's first one is not."""
        return self.state.global_step > 1 and self.args.learning_rate > 0

    def _write_states(self, unfinished: Path) -> None:
        """What the run needs to go on, beside the weights."""
        if self.is_fsdp_enabled:
            self._save_optimizer_and_scheduler(str(unfinished))
        elif self.is_deepspeed_enabled or self.is_world_process_zero():
            rank, processes = (self.args.process_index, self.args.world_size) if self.is_deepspeed_enabled else (0, 1)
            write_states(unfinished, cast(nn.Module, self.model), self.optimizer, rank, processes)
        losses = gather_object([float(self._tr_loss)])
        aux_losses = gather_object([float(self._aux_sum)])
        if not self.is_world_process_zero():
            return
        scaler = self.accelerator.scaler
        schedule: Any = self.lr_scheduler
        engine: Any = self.model_wrapped if self.is_deepspeed_enabled else None
        names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        states = {
            "processes": self.args.world_size,
            # Functions, which JSON cannot hold, are made again from the arguments.
            "schedule": {key: value for key, value in schedule.state_dict().items() if _is_plain(value)},
            "scaler": None if scaler is None else scaler.state_dict(),
            "engine": {name: int(vars(engine)[name]) for name in names} if engine is not None else {},
            "losses": losses,
            "aux_losses": aux_losses,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }
        (unfinished / STATES).write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                cast(dict[str, Any], self.state.stateful_callbacks)[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))

    def _describe(self, unfinished: Path) -> dict[str, Any]:
        """Sizes and hashes: of its own states by each process, of everything else by the first."""
        own = f"optimizer-{self.args.process_index}-of-{self.args.world_size}.safetensors"
        names = files_in(unfinished)
        states = [name for name in names if name.startswith("optimizer-")]
        if not self.is_world_process_zero():
            return describe_files(unfinished, [name for name in states if name == own])
        others = [name for name in states if name != own] if self.is_deepspeed_enabled else []
        return describe_files(unfinished, [name for name in names if name not in others])


class _Steps(TrainerCallback):
    """Where each step begins: its random state, its epoch's order of rows, and what a checkpoint says of losses."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        self.trainer = trainer
        self._evaluates_again = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Losses since the last log entry count in the next one; what was evaluated is not evaluated again."""
        if state.global_step:
            self.trainer._note_best()  # the folder may have been moved, with all that lies in it
        stored = self.trainer._stored
        if not state.global_step or stored is None:
            return
        losses, aux_losses = stored["losses"], stored.get("aux_losses", [0.0])
        same = len(losses) == args.world_size
        self.trainer._tr_loss += losses[args.process_index] if same else sum(losses) / len(losses)
        self.trainer._aux_sum += aux_losses[args.process_index] if same else sum(aux_losses) / args.world_size
        self.trainer._total_loss_scalar = stored["total_loss"]
        self.trainer._globalstep_last_logged = stored["last_logged"]
        evaluated = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
        at_end = state.global_step % self._steps_an_epoch() == 0
        # An epoch's evaluation follows the checkpoint of its last step, and may have been lost; a signal leaves out
        # that of the step it ends the run at.
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
        """The checkpoint that the run goes on from may be the best one; at a start, the stock loop does not look."""
        if self._evaluates_again and metrics is not None:
            self.trainer._determine_best_metric(metrics, None)
        self._evaluates_again = False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The order of the epoch; rows of steps that a checkpoint holds are not looked at."""
        order = self.trainer._order
        if order is not None:
            epoch, steps = divmod(state.global_step, self._steps_an_epoch())
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            order.epoch, order.skipped = epoch, steps * rows

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The step's own random state."""
        seed_step(args.seed, args.process_index, state.global_step)

    def _steps_an_epoch(self) -> int:
        loader: Any = self.trainer.callback_handler.train_dataloader
        return max(1, math.ceil(len(loader) / self.trainer.args.gradient_accumulation_steps))


def _write_problem(error: Exception, folder: Path) -> Problem | None:
    """What the user is told of an error in writing; None for errors of another kind."""
    full = isinstance(error, OSError) and error.errno in FULL_DISK
    full = full or any(words in str(error) for words in ("No space left", "os error 28", "Disk quota", "os error 122"))
    # torch's writer of archives says only that it failed.
    full = full or (isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error))
    full = full or (isinstance(error, RuntimeError) and "unexpected pos" in str(error))
    if not full and not isinstance(error, (OSError, SafetensorError)) and "(os error" not in str(error):
        return None
    name = folder.name
    if full:
        return (
            f"the disk of {folder.parent} is full: {name} was not written",
            "make room there (older checkpoints are whole), and type the same command again to go on from the last one",
        )
    return f"{name} cannot be written: {error}", f"make {folder.parent} writable, and type the same command again"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
