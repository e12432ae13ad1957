"""The stock Trainer with the chunked loss, evaluation in constant memory, guards, and throughput in its logs.

With `num_items_in_batch` from the Trainer, the loss is the token mean over the whole optimizer step, micro-batches and
ranks together: sum(weight x loss) / sum(weight) over its trained tokens, where all weights are 1 unless rows say so.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, StackDataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
)

from novelgpt.model.forward_checks import head_is_last
from novelgpt.model.lora import base_model
from novelgpt.model.loss import TokenLoss, attach_chunked_loss
from novelgpt.model.routers import explain_balance, router_balance
from novelgpt.scoring.perplexity import loss_by_source, row_sums, summarise
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import raise_on_all_ranks
from novelgpt.settings.terminal import say, say_above_bars
from novelgpt.text.collator import NUMBER, NUMBERS, ROW, Collator
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.packing import PackedBlocks
from novelgpt.text.sections import ROWS_STATE, SectionedRows, rows_per_epoch
from novelgpt.text.statistics import row_lengths
from novelgpt.training.checkpoints.folders import checkpoints, step_of
from novelgpt.training.checkpoints.trainer import CheckpointTrainer
from novelgpt.training.evaluations import EvaluationPlan
from novelgpt.training.numbers import DocumentLoss, MicroBatch, StepMonitor, document_losses
from novelgpt.training.plan import Probe
from novelgpt.training.sample_predictions import SamplePredictions, weights_are_sharded
from novelgpt.training.signals import EvaluationStopped
from novelgpt.training.throughput import Throughput


class Numbers(Dataset[int]):
    """Each number of `count`, and those behind them, is itself."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        """The number."""
        return number


class NumberedRows(StackDataset[Any]):
    """{"row", "number"} of each row, by which its file and line can be named; of sections, of rows without an end."""

    def __init__(self, rows: Any) -> None:
        super().__init__(**{ROW: rows, NUMBER: Numbers(len(rows))})
        self.rows = rows

    def __len__(self) -> int:
        return rows_per_epoch(self.rows)


class RowLengths(Dataset[Any]):
    """Rows of which only the lengths are true: samplers that sort by length would read all rows to know them."""

    def __init__(self, rows: Any) -> None:
        self.lengths = row_lengths(rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, range]:
        """{"input_ids"}, [tokens] numbers that stand for tokens."""
        return {"input_ids": range(self.lengths[index])}


class NovelTrainer(CheckpointTrainer):
    """Trainer whose metrics are token-weighted and whose evaluation keeps three numbers per row."""

    def __init__(
        self,
        *,
        train_dataset: Any = None,
        samples: SamplePredictions | None = None,
        characters: Callable[[], int] | None = None,
        evaluations: EvaluationPlan | None = None,
        note: Callable[[dict[str, Any]], None] | None = None,
        probes: Sequence[Probe] = (),
        watch_gradients: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
        **arguments: Any,
    ) -> None:
        """The stock arguments, and those of this trainer.

        Args:
            train_dataset: rows to train on; None where the trainer evaluates only.
            samples: answered at each evaluation.
            characters: counts those of the evaluation rows at the first evaluation, for bits per character.
            evaluations: the schedule, which adds those to come to the time left.
            note: takes entries of metrics.jsonl about single steps, such as skipped ones.
            probes: run before training (see `TrainingPlan`).
            watch_gradients: the context of the first backward pass (see `TrainingPlan`).
            arguments: of `CheckpointTrainer`.
        """
        self.rows = train_dataset
        numbered = None if train_dataset is None else NumberedRows(train_dataset)
        super().__init__(
            **arguments,
            train_dataset=numbered,
            compute_metrics=lambda prediction: self._figures(numpy.asarray(prediction.predictions), characters),
        )
        self.samples = samples
        self.evaluations = evaluations
        self._last_evaluation: float | None = None  # its seconds
        self._evaluated = 0.0  # seconds, since the first step
        base = base_model(self.model)
        self.balance = router_balance(base, cast(TrainArguments, self.args).router_aux_loss_coef)
        if self.balance is not None and self.label_smoother is not None:
            raise UserError(
                "--label_smoothing_factor makes the loss of logits alone, without the routers' balancing loss",
                "leave it out, or set --router_aux_loss_coef 0",
            )
        attach_chunked_loss(base, head_is_last(base), self.balance)
        if isinstance(self.data_collator, Collator):
            self.data_collator.mask_packs = self.balance is not None
            # One more pass gathers sharded weights, in which all processes take part, whichever rows they have.
            repeats = isinstance(train_dataset, PackedBlocks) and train_dataset.repetitive_share > 0
            self.data_collator.always_periods = repeats and weights_are_sharded(self.accelerator)
        line = explain_balance(base, self.balance)
        if line and self.is_world_process_zero():
            say(line)
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, whatever the architecture

        def keep(entry: dict[str, Any]) -> None:
            self.state.log_history.append(entry)
            if note is not None:
                note(entry)

        self.monitor = StepMonitor(
            cast(nn.Module, self.model),
            self.rows,
            recompute=self._document_losses,
            gather=self.accelerator.gather,
            skip=cast(TrainArguments, self.args).on_non_finite == "skip",
            note=keep,
        )
        # Sums since the last log entry, before the current step.
        self._loss_before, self._aux_before = torch.zeros(()), torch.zeros(())
        self.throughput: Throughput | None = None  # from the first step on
        self._first_step = 0
        self.probes = probes
        self._watch_gradients = watch_gradients  # of the first backward pass

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[Any] | None:
        """The order of the rows themselves, as it may depend on their lengths."""
        by_length = self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        return super()._get_train_sampler(RowLengths(self.rows) if by_length else self.rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler[Any] | None:
        """The stock order, which depends on the lengths of the rows where that of training does."""
        by_length = self.args.train_sampling_strategy == "group_by_length"
        return super()._get_eval_sampler(RowLengths(eval_dataset) if by_length else eval_dataset)

    def _rows_state(self) -> dict[str, Any]:
        """Where the rows of the next step are, for rows that are read as the training goes on."""
        if not isinstance(self.rows, SectionedRows):
            return {}
        state = self.rows.state(self.state.global_step * self.rows_per_step())
        return {} if state is None else {ROWS_STATE: state}

    def _prepare_for_training(self, *arguments: Any, **keywords: Any) -> Any:
        """The stock preparation; then each probe checks the model, set up for training, on its micro-batch.

        Raises:
            UserError: what they find.
        """
        prepared = super()._prepare_for_training(*arguments, **keywords)
        training = cast(TrainArguments, self.args)
        for probe in self.probes:
            rows = [self.rows[index] for index in probe.rows(training)]
            if rows:
                batch = self._prepare_inputs(self.data_collator(rows))
                probe.run(cast(nn.Module, self.model), batch, training, self.accelerator.autocast)
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        """The stock divisor of a step's losses or, where rows are weighted, the sum of the weights of its tokens.

        Raises:
            UserError: weights with label smoothing, on all processes.
        """
        weighted = any("loss_weights" in batch for batch in batch_samples)
        if self.label_smoother is not None:
            with raise_on_all_ranks():
                if weighted:
                    raise UserError(
                        "--label_smoothing_factor makes the loss of logits alone, without the weights of rows",
                        "leave it out, or take the weights out of the rows",
                    )
        alone = self.args.world_size == 1 or not self.args.average_tokens_across_devices
        if not batch_samples or (alone and not weighted):
            return super()._get_num_items_in_batch(batch_samples, device)
        # Another process may have weights where this one has none. Numbers of tokens are exact in fp64, as in integers.
        items = torch.zeros((), dtype=torch.float32 if alone else torch.float64, device=device)
        for batch in batch_samples:
            trained = batch["labels"][:, 1:] != IGNORE_INDEX
            own = batch["loss_weights"][:, 1:] * trained if "loss_weights" in batch else trained
            items += own.sum(dtype=items.dtype).to(device)
        return (items if alone else self.accelerator.gather(items).sum()).float()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The stock step of a micro-batch; counts its tokens, and watches the first one's gradients."""
        if self.throughput is None:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            self._first_step = self.state.global_step
            self.throughput = Throughput(base_model(self.model), self.args.device, dtype)
        if self.monitor.start(inputs, inputs.pop(NUMBERS)):
            self._loss_before, self._aux_before = self._tr_loss.clone(), self._aux_sum.clone()
        self.throughput.count(inputs)
        self._aux_loss = None
        watch, self._watch_gradients = self._watch_gradients, nullcontext
        with watch(cast(nn.Module, self.model)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.balance is None or self._aux_loss is None:
            return loss
        # The balancing loss of routers is logged as a figure of its own.
        self._aux_sum = self._aux_sum.to(loss.device) + self._aux_loss
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss - self.balance.coefficient * processes * self._aux_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The stock loss of a micro-batch, NaN where the optimizer is to skip the step (see StepMonitor)."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._aux_loss = outputs.aux_loss if isinstance(outputs, TokenLoss) else None  # not with label smoothing
        loss = self.monitor.see_loss(loss, last=self.accelerator.sync_gradients)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """The stock norm, once the step is judged: the last moment before the optimizer steps, except under DeepSpeed,
        where it has just stepped or, on gradients that are not finite, skipped the step.
        """
        norm: torch.Tensor | float | None = super()._get_grad_norm(model, grad_norm)
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        done = self.accelerator.optimizer_step_was_skipped if deepspeed else None
        scaler, scale = self.accelerator.scaler, None
        if self.args.fp16:
            scale = float(scaler.get_scale() if scaler else cast(Any, self.optimizer).optimizer.loss_scale)
        skipped = self.monitor.judge(self.state.global_step + 1, norm, scale, done)
        if not deepspeed:
            cast(AcceleratedOptimizer, self.optimizer)._is_overflow = skipped  # the schedule does not advance then
        if skipped:
            self._tr_loss.copy_(self._loss_before)
            self._aux_sum = self._aux_before
            if scaler is not None:
                scaler.update()  # or it would mistake the next step's gradients for these
            # The optimizer then does nothing, as within a step; the Trainer clears the gradients.
            self.accelerator.gradient_state._set_sync_gradients(False)
        return norm

    def _document_losses(self, batches: list[MicroBatch]) -> list[DocumentLoss]:
        model = cast(nn.Module, self.model)
        found = document_losses(model, batches, self._prepare_inputs, self.accelerator.autocast)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # ZeRO-3 has started to gather weights for a backward pass that does not follow, and could not save them.
            self.accelerator.deepspeed_engine_wrapped.engine.empty_partition_cache()
        return found

    def _means(self, loss: float) -> dict[str, float]:
        """Mean losses of the trained steps since the last entry, and the number of steps skipped so far.

        Computed from the history alone, which a resumed run has as well.
        """
        since = list(itertools.takewhile(lambda entry: "loss" not in entry, reversed(self.state.log_history)))
        last = self.state.log_history[-len(since) - 1] if len(since) < len(self.state.log_history) else {}
        skipped = sum(bool(entry.get("skipped")) for entry in since)
        total = last.get("skipped_steps", 0) + skipped
        steps = self.state.global_step - last.get("step", 0)
        if skipped:
            loss = loss * steps / (steps - skipped) if skipped < steps else math.nan
        means = {"loss": loss} | ({"skipped_steps": total} if total else {})
        if self.balance is not None:
            of_all = float(self.accelerator.reduce(self._aux_sum.to(self.args.device), "sum"))
            means["aux_loss"] = of_all / (steps - skipped) if skipped < steps else math.nan
            self._aux_sum = torch.zeros(())
        return means

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Return [rows, 3] sums in place of logits, so that memory does not grow with the evaluation set."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        sums = row_sums(outputs.token_losses, outputs.token_hits, inputs["labels"])
        return None, sums, sums[:, 1]

    def _figures(self, sums: numpy.ndarray, characters: Callable[[], int] | None) -> dict[str, float]:
        """Figures of an evaluation: of all rows, and the loss of each source where it is told."""
        figures = summarise(sums, None if characters is None else characters())
        if self.evaluations is None or self.evaluations.sources is None:
            return figures
        return figures | loss_by_source(sums, self.evaluations.sources, self.evaluations.names)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """The stock evaluation; its time does not count in the training throughput.

        Raises:
            Stopped: a signal arrived; the step is saved.
        """
        start = time.perf_counter()
        try:
            return super().evaluate(*arguments, **keywords)
        except EvaluationStopped:
            if not self.reloaded:
                self._save_checkpoint(cast(nn.Module, self.model), None)
            else:  # the weights of a checkpoint; the optimizer's states are of the last step
                self.state.global_step = step_of(checkpoints(Path(str(self.args.output_dir)))[0])
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise AssertionError("the callback that stopped the evaluation did not end the run") from None
        finally:
            self._last_evaluation = time.perf_counter() - start
            if self.throughput is not None:
                self.throughput.outside += self._last_evaluation
                self._evaluated += self._last_evaluation

    @contextmanager
    def at_saved_step(self) -> Iterator[None]:
        """After training: log what follows with the step whose weights the model has, the last or the best.

        The step of the best is logged itself, as "saved_step".
        """
        last = self.state.global_step, self.state.epoch
        if self.args.load_best_model_at_end and self.is_world_process_zero():
            figure = self.args.metric_for_best_model
            say_above_bars(
                f"no checkpoint has a finite {figure}: the weights of the last step, {last[0]}, are saved"
                if self.saved_step is None
                else f"the weights of step {self.saved_step} are saved, whose {figure} is the best of all checkpoints"
            )
        if self.saved_step is not None:
            self.state.global_step = self.saved_step
            history = self.state.log_history
            own = next(entry for entry in history if _is_evaluation_of(entry, self.saved_step))
            self.state.epoch = own.get("epoch", self.state.epoch)
            self.log({"saved_step": self.saved_step})
        yield
        self.state.global_step, self.state.epoch = last

    def evaluate_saved(self) -> None:
        """Evaluate the weights that the model has at the end, unless those of this step are evaluated already."""
        step, history = self.state.global_step, self.state.log_history
        if self.reloaded or not any(_is_evaluation_of(entry, step) for entry in history):
            self.evaluate()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock saving; end tokens are saved beside an adapter too, as beside full weights."""
        super().save_model(output_dir, _internal_call)
        ends = base_model(self.model).generation_config
        if isinstance(self.model, PeftModel) and self.args.should_save and isinstance(ends, GenerationConfig):
            ends.save_pretrained(str(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speeds, peak memory and the time left to the entries of training."""
        if "train_loss" in logs:  # the stock one covers the steps since the run was last started
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs and self.throughput is not None:
            logs |= self._means(logs["loss"])
            logs |= self.throughput.read(lambda sums: self.accelerator.reduce(sums, "sum"), self.args.world_size)
            logs["seconds_left"] = round(self._seconds_left(logs["seconds"], logs["tokens_per_second"]), 1)
        if "eval_loss" in logs and self.samples is not None:
            # Not in the evaluation loop, whose rows per second are those of the loss alone.
            model = cast(PreTrainedModel, self.model)  # or the same with an adapter
            logs |= self.samples.scores(model, self.accelerator, self.state.global_step)
        super().log(logs, start_time)

    def _seconds_left(self, since_first_step: float, tokens_per_second: float) -> float:
        """Seconds to the end of the last step and of the evaluations to come."""
        step = self.state.global_step
        of_steps = (since_first_step - self._evaluated) / (step - self._first_step) * (self.state.max_steps - step)
        if self.evaluations is None:
            return of_steps
        return of_steps + self.evaluations.seconds_left(step, self._last_evaluation, tokens_per_second)


def _is_evaluation_of(entry: dict[str, Any], step: int) -> bool:
    return "eval_loss" in entry and entry["step"] == step
