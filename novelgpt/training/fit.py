"""Train a model on rows and leave a complete run folder."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)

from novelgpt.inference.generation import answer_end_ids
from novelgpt.model.card import CARD, write_card
from novelgpt.model.forward_checks import check_packing
from novelgpt.model.lora import base_model
from novelgpt.model.shared_cores import shared_cores
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import raise_on_all_ranks
from novelgpt.settings.terminal import say
from novelgpt.text.collator import Collator
from novelgpt.text.sections import SectionedRows, rows_per_epoch
from novelgpt.text.statistics import row_lengths, show_counts, trained_characters
from novelgpt.training.base_recorder import BaseRecorder
from novelgpt.training.callbacks import (
    Curves,
    ProgressBar,
    ProgressLines,
    RunRecorder,
    guard_trackers,
    name_tracked_run,
)
from novelgpt.training.checkpoints.folders import checkpoints, step_of
from novelgpt.training.evaluations import plan_evaluations
from novelgpt.training.plan import TrainingPlan
from novelgpt.training.run_card import RunCard
from novelgpt.training.run_folder import write_result_files
from novelgpt.training.sample_predictions import SamplePredictions
from novelgpt.training.throughput import peak_memory
from novelgpt.training.trainer import NovelTrainer


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    valid: Dataset[Any],
    plan: TrainingPlan,
) -> dict[str, float]:
    """Train, evaluate, and save the final weights with the tokenizer into the run folder.

    Returns:
        The figures that run.json keeps: saved_step, whose weights are saved (that of the best checkpoint with
        load_best_model_at_end, else the last), their eval_loss, eval_perplexity and eval_token_accuracy over
        eval_tokens tokens, those of the untrained model as start_…, stopped (share of training prompts whose answer
        ended, in [0, 1]; not for raw text), train_runtime (seconds, with evaluations) and tokens_per_second (of
        training).

    Raises:
        UserError: the model cannot be trained this way; or results cannot be written beside the saved weights.
        Stopped: a signal arrived; the step is saved.
    """
    if "position_ids" in train[0]:
        check_packing(base_model(model))
    memory, folder = plan.memory.settle_micro_batch(model), plan.folder
    training, first = memory.run.training, memory.run.training.process_index == 0
    folder.start(memory.run)
    rows = rows_per_epoch(train)
    evaluations = plan_evaluations(valid, memory.lengths, row_lengths(valid), rows, training)
    if first:
        say(evaluations.explain())
    name_tracked_run(training, folder.path, str(folder.record.get("id", "")))
    _set_end_tokens(base_model(model), tokenizer)
    base_recorder = BaseRecorder(model)
    cards = RunCard(memory.run, folder.record, base_model(model), tokenizer, train)

    def complete(unfinished: Path) -> None:
        base_recorder.record(unfinished)
        (unfinished / CARD).unlink(missing_ok=True)  # peft's, which says nothing
        write_card(unfinished, cards.card(unfinished, trainer.state))

    # Events of every run are in logs/, where `tensorboard --logdir output` finds them by the run's name. What a resumed
    # run had written after its checkpoint is not shown.
    purged = None if folder.checkpoint is None else step_of(folder.checkpoint) + 1
    writer = SummaryWriter(str(folder.path / "logs"), purge_step=purged) if first else None
    with closing(RunRecorder(folder.path)) as recorder, closing(Curves(writer)) as curves:
        trainer = NovelTrainer(
            samples=SamplePredictions(evaluations.rows, tokenizer, training, folder.path, writer),
            probes=plan.probes,
            watch_gradients=plan.watch_gradients,
            characters=functools.cache(lambda: trained_characters(evaluations.rows, tokenizer)),
            evaluations=evaluations,
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=evaluations.rows,
            data_collator=Collator(int(tokenizer.pad_token_id)),
            processing_class=tokenizer,
            callbacks=[recorder, base_recorder, folder.stop],
            complete=complete,
            note=recorder.write if first else None,
        )
        guard_trackers(trainer)
        trainer.remove_callback(PrinterCallback if training.disable_tqdm else ProgressCallback)
        trainer.add_callback(ProgressLines() if training.disable_tqdm else ProgressBar())
        trainer.add_callback(curves)
        with shared_cores(training.device), _counts_shown_at_the_end(train, first):
            outcome = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        with trainer.at_saved_step():
            trainer.evaluate_saved()
            trainer.save_final(folder.path)
            peak = peak_memory(training.device)  # of training; the answers that follow are not part of the estimate
            figures = plan.after_training(cast(PreTrainedModel, trainer.model), training, trainer.accelerator)
            if figures:
                trainer.log(figures)
    results = _results(trainer.state.log_history, outcome.metrics)
    results["saved_step"] = trainer.state.global_step if trainer.saved_step is None else trainer.saved_step
    with raise_on_all_ranks():
        if first:
            try:
                train_loss = {"train_loss": outcome.metrics["train_loss"]}
                write_card(folder.path, cards.card(folder.path, trainer.state, results | train_loss))
                evaluated = len(evaluations.rows)  # type: ignore[arg-type]
                write_result_files(folder.path, trainer.state, outcome.metrics, rows, evaluated)
                folder.finish(results)
            except OSError as error:
                kept = checkpoints(folder.path)
                then = f"the same command resumes from {kept[0].name} and writes them" if kept else "copy the weights"
                raise UserError(
                    f"{error.filename or folder.path} cannot be written: {error.strerror or error}; the trained "
                    f"weights are saved in {folder.path}, and its results are not",
                    f"make room there; {then}",
                ) from error
            start = f"{results['start_eval_loss']:.4f} -> " if "start_eval_loss" in results else ""
            tensorboard = Path(sys.executable).with_name("tensorboard")
            say(
                f"Done. eval loss {start}{results['eval_loss']:.4f}, perplexity {results['eval_perplexity']:.2f}",
                f"  {memory.compare(peak)}",
                f"  weights       {folder.path}, those of step {results['saved_step']} of {trainer.state.max_steps}",
                f"  curve         {folder.path / 'loss.png'}",
                f"  all figures   {tensorboard} --logdir {folder.path.parent}",
            )
    trainer.accelerator.wait_for_everyone()
    return results


@contextmanager
def _counts_shown_at_the_end(rows: Dataset[Any], first: bool) -> Iterator[None]:
    """Where rows are read as the training goes on, print what was counted of them, however it ends.

    Args:
        rows: to train on.
        first: whether this is the first process, which prints.
    """
    try:
        yield
    finally:
        counts = rows.counts() if first and isinstance(rows, SectionedRows) else None
        if counts is not None:
            show_counts({"train": counts}, title="Data read")


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let all that is saved stop at the same tokens: those of the template, the tokenizer and the base.

    Nothing else of the base's generation settings is kept: some are not valid, which would stop saving, and those of
    sampling were chosen for another model.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=answer_end_ids(model, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Else the Trainer does it, with a warning as if something were wrong.
    config = model.config.get_text_config()
    special = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, token in special.items():
        named = getattr(config, name, None)  # missing in some configurations
        others = named if isinstance(named, list) else []
        if token is not None and token != named and token not in others:
            setattr(config, name, [token, *others] if others else token)


def _results(history: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, float]:
    evaluations = [entry for entry in history if "eval_loss" in entry]
    figures = ("eval_loss", "eval_perplexity", "eval_bits_per_character", "eval_token_accuracy")
    names = [name for name in figures if name in evaluations[-1]]
    results = {name: evaluations[-1][name] for name in (*names, "eval_tokens")}
    if evaluations[0]["step"] == 0:
        results |= {f"start_{name}": evaluations[0][name] for name in names}
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    if speeds:
        results["tokens_per_second"] = statistics.median_high(speeds)  # the first one includes warming up
    shares = [entry["stopped"] for entry in history if "stopped" in entry]
    return results | ({"stopped": shares[-1]} if shares else {}) | {"train_runtime": metrics["train_runtime"]}
