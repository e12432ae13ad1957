"""Train a model on rows and leave a complete run folder."""

from __future__ import annotations

import sys
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
from transformers.utils import GENERATION_CONFIG_NAME

from novelgpt.budget.memory_plan import MemoryPlan, row_lengths
from novelgpt.inference.generation import answer_end_ids
from novelgpt.model.card import CARD, write_card
from novelgpt.model.forward_checks import check_packing
from novelgpt.model.lora import base_model
from novelgpt.model.shared_cores import shared_cores
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.process import first_process_value
from novelgpt.settings.terminal import say
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import end_token_ids
from novelgpt.text.statistics import trained_characters
from novelgpt.training.base_recorder import BaseRecorder
from novelgpt.training.callbacks import Curves, Progress, ProgressLines, RunRecorder
from novelgpt.training.checkpoints.folders import checkpoints
from novelgpt.training.evaluations import plan_evaluations
from novelgpt.training.plan import TrainingPlan
from novelgpt.training.result_files import write_result_files
from novelgpt.training.run_card import RunCard
from novelgpt.training.sample_predictions import SamplePredictions
from novelgpt.training.throughput import peak_memory
from novelgpt.training.trackers import guard_trackers, name_tracked_run
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
        load_best_model_at_end, else the last), their eval_loss, eval_perplexity and eval_token_accuracy over so many
        eval_tokens, those of the untouched model as start_…, stopped (share of training prompts whose answer ended, in
        [0, 1]; not for raw text), train_runtime (seconds, evaluations included) and tokens_per_second (of training).

    Raises:
        UserError: the model cannot be trained so; or the results cannot be written beside the weights, which are there.
        Stopped: a signal came; the step is saved.
    """
    if "position_ids" in train[0]:
        check_packing(base_model(model))
    memory = plan.memory.settle_micro_batch(model)
    plan.folder.start(memory.run)
    recorder = RunRecorder(plan.folder.path)
    try:
        return _fit_into(recorder, model, tokenizer, train, valid, plan, memory)
    finally:
        plan.folder.trained = recorder.trained


def _fit_into(
    recorder: RunRecorder,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    valid: Dataset[Any],
    plan: TrainingPlan,
    memory: MemoryPlan,
) -> dict[str, float]:
    claimed, folder, run = plan.folder, plan.folder.path, memory.run
    training, resumed = run.training, run.training.resume_from_checkpoint
    rows = len(train)  # type: ignore[arg-type]
    evaluations = plan_evaluations(valid, memory.lengths, row_lengths(valid), rows, training)
    valid = evaluations.rows
    if training.process_index == 0:
        say(evaluations.explain())
    name_tracked_run(training, folder, str(claimed.record.get("id", "")))
    base_recorder = BaseRecorder(model)
    # Events of every run lie under logs/, where `tensorboard --logdir output` finds them by the run's name.
    # What a run that is gone on with had written after its checkpoint is not shown.
    begin = int(resumed.rpartition("-")[2]) + 1 if resumed is not None else None
    writer = SummaryWriter(str(folder / "logs"), purge_step=begin) if training.process_index == 0 else None
    curves = None if writer is None else Curves(writer)
    cards = RunCard(run, claimed.record, base_model(model), tokenizer, train) if writer is not None else None

    def complete(unfinished: Path) -> None:
        """Beside weights that are being saved, by the first process."""
        base_recorder.record(unfinished)
        if cards is not None:
            (unfinished / CARD).unlink(missing_ok=True)  # peft's, which says nothing
            write_card(unfinished, cards.card(unfinished, trainer.state))

    try:
        _set_end_tokens(base_model(model), tokenizer)
        trainer = NovelTrainer(
            samples=SamplePredictions(valid, tokenizer, training, folder, writer),
            probes=plan.probes,
            watch_gradients=plan.watch_gradients,
            characters=trained_characters(valid, tokenizer),
            evaluations=evaluations,
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=valid,
            data_collator=Collator(int(tokenizer.pad_token_id)),
            processing_class=tokenizer,
            callbacks=[recorder, base_recorder, claimed.stop],
            complete=complete,
            note=recorder.write if training.process_index == 0 else None,
        )
        guard_trackers(trainer)
        trainer.remove_callback(PrinterCallback if training.disable_tqdm else ProgressCallback)
        trainer.add_callback(ProgressLines() if training.disable_tqdm else Progress())
        if curves is not None:
            trainer.add_callback(curves)
        with shared_cores(training.device):
            outcome = trainer.train(resume_from_checkpoint=resumed)
        with trainer.at_saved_step():
            trainer.evaluate_saved()
            trainer.save_final(folder)
            peak = peak_memory(training.device)  # of training; the estimate knows nothing of the answers that follow
            figures = plan.after_training(cast(PreTrainedModel, trainer.model), training, trainer.accelerator)
            if figures:
                trainer.log(figures)
    finally:
        if recorder.history:
            recorder.draw()
        if curves is not None:
            curves.close()
    results = _results(trainer.state.log_history, outcome.metrics)
    results["saved_step"] = trainer.state.global_step if trainer.saved_step is None else trainer.saved_step
    problem: UserError | None = None
    if trainer.is_world_process_zero():
        try:
            if cards is not None:
                train_loss = {"train_loss": outcome.metrics["train_loss"]}
                write_card(folder, cards.card(folder, trainer.state, results | train_loss))
            write_result_files(folder, trainer.state, outcome.metrics, rows, len(valid))  # type: ignore[arg-type]
            claimed.finish(results)
        except OSError as error:
            problem = _unfinished(folder, error)
    problem = first_process_value(problem)
    if problem is not None:
        raise problem
    if trainer.is_world_process_zero():
        _show(results, memory.compare(peak), folder, trainer.state.max_steps)
    trainer.accelerator.wait_for_everyone()
    return results


def _unfinished(folder: Path, error: OSError) -> UserError:
    """The error of a run whose last words cannot be written: what is safe, and how it comes to its end."""
    kept = checkpoints(folder)
    goes_on = f"the same command goes on from {kept[0].name} and writes them" if kept else "copy the weights"
    return UserError(
        f"{error.filename or folder} cannot be written: {error.strerror or error}; the trained weights are saved in "
        f"{folder}, and its results are not",
        f"make room there; {goes_on}",
    )


def _show(results: dict[str, float], memory: str, folder: Path, steps: int) -> None:
    """What came out, and where it lies."""
    start = f"{results['start_eval_loss']:.4f} -> " if "start_eval_loss" in results else ""
    say(
        f"Done. eval loss {start}{results['eval_loss']:.4f}, perplexity {results['eval_perplexity']:.2f}",
        f"  {memory}",
        f"  weights       {folder}, those of step {results['saved_step']} of {steps}",
        f"  curve         {folder / 'loss.png'}",
        f"  all figures   {Path(sys.executable).with_name('tensorboard')} --logdir {folder.parent}",
    )


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """All that is saved stops at the same tokens: those of the template, the tokenizer and the base.

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


def save_generation_config(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """All tokens that end an answer, those that the folder's file names already included, and the padding token."""
    path = folder / GENERATION_CONFIG_NAME
    named = read_object(path).get("eos_token_id") if path.is_file() else None
    known = named if isinstance(named, list) else [] if named is None else [named]
    ends = sorted({*end_token_ids(tokenizer), *known})
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def _results(history: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, float]:
    evaluations = [entry for entry in history if "eval_loss" in entry]
    names = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
    results = {name: evaluations[-1][name] for name in (*names, "eval_tokens")}
    if evaluations[0]["step"] == 0:
        results |= {f"start_{name}": evaluations[0][name] for name in names}
    # The first entry holds the warm-up of caches and kernels.
    speeds = sorted(entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry)
    if speeds:
        results["tokens_per_second"] = speeds[len(speeds) // 2]
    shares = [entry["stopped"] for entry in history if "stopped" in entry]
    if shares:
        results["stopped"] = shares[-1]
    return results | {"train_runtime": metrics["train_runtime"]}
