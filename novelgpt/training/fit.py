"""Train a model on rows and leave a complete run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.runs import TrainingRun
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import end_token_ids
from novelgpt.text.statistics import trained_characters
from novelgpt.training.callbacks import Curves, Progress, ProgressLines, RunRecorder
from novelgpt.training.forward_checks import check_packing
from novelgpt.training.memory_plan import MemoryPlan
from novelgpt.training.run_folder import finish_run_folder, start_run_folder
from novelgpt.training.sample_predictions import SamplePredictions
from novelgpt.training.throughput import peak_memory
from novelgpt.training.trainer import NovelTrainer, base_model


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    valid: Dataset[Any],
    run: TrainingRun,
    plan: MemoryPlan,
) -> dict[str, float]:
    """Train, evaluate, and save the final weights with the tokenizer into the run folder.

    Returns:
        The figures that run.json keeps: eval_loss, eval_perplexity, eval_token_accuracy, those of the untouched model
        as start_…, train_runtime (seconds, evaluations included) and tokens_per_second (of training alone).
    """
    training = run.training
    resumed = _checkpoint(training)
    if "position_ids" in train[0]:
        check_packing(base_model(model))
    plan.settle_micro_batch(model)
    folder = start_run_folder(run)
    recorder = RunRecorder(folder)
    # Events of every run lie under logs/, where `tensorboard --logdir output` finds them by the run's name.
    writer = SummaryWriter(str(folder / "logs")) if training.process_index == 0 else None
    trainer = NovelTrainer(
        samples=SamplePredictions(valid, tokenizer, training, folder, writer),
        characters=trained_characters(valid, tokenizer),
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=Collator(int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback if training.disable_tqdm else ProgressCallback)
    trainer.add_callback(ProgressLines() if training.disable_tqdm else Progress())
    if writer is not None:
        trainer.add_callback(Curves(writer))
    _set_end_tokens(model, tokenizer)
    try:
        outcome = trainer.train(resume_from_checkpoint=resumed)
        last = trainer.state.log_history
        if not any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in last):
            trainer.evaluate()
    finally:
        if recorder.history:
            recorder.draw()
        if writer is not None:
            writer.close()
    trainer.save_model(str(folder))
    results = _results(trainer.state.log_history, outcome.metrics)
    if trainer.is_world_process_zero():
        save_generation_config(tokenizer, folder)
        finish_run_folder(folder, results)
        console = Console(soft_wrap=True)
        console.print(
            f"[bold]Done.[/bold] eval loss {results.get('start_eval_loss', float('nan')):.4f} -> "
            f"{results['eval_loss']:.4f}, perplexity {results['eval_perplexity']:.2f}\n"
            f"  {plan.compare(peak_memory(training.device))}\n"
            f"  weights       {folder}\n  curve         {folder / 'loss.png'}\n"
            f"  all figures   {Path(sys.executable).with_name('tensorboard')} --logdir {folder.parent}"
        )
    trainer.accelerator.wait_for_everyone()
    return results


def _checkpoint(training: TrainArguments) -> str | bool | None:
    """What to resume from: a folder, True for the newest in output_dir, None for a fresh start."""
    wanted = training.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        if not any(Path(str(training.output_dir)).glob("checkpoint-*")):
            raise UserError(f"{training.output_dir} holds no checkpoint to resume from", "start without the flag")
        return True
    if not Path(wanted).is_dir():
        raise UserError(f"--resume_from_checkpoint {wanted} is no folder", "name a checkpoint-N folder, or `true`")
    return str(wanted)


def _set_end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checkpoints saved on the way stop at the same tokens as the final weights."""
    config = model.generation_config
    if isinstance(model, PreTrainedModel) and isinstance(config, GenerationConfig):
        config.eos_token_id = end_token_ids(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id


def save_generation_config(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """All tokens that end an answer, beside full weights and adapters alike."""
    GenerationConfig(eos_token_id=end_token_ids(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def _results(history: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, float]:
    evaluations = [entry for entry in history if "eval_loss" in entry]
    names = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
    results = {name: evaluations[-1][name] for name in names}
    if evaluations[0]["step"] == 0:
        results |= {f"start_{name}": evaluations[0][name] for name in names}
    # The first entry holds the warm-up of caches and kernels.
    speeds = sorted(entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry)
    if speeds:
        results["tokens_per_second"] = speeds[len(speeds) // 2]
    return results | {"train_runtime": metrics["train_runtime"]}
