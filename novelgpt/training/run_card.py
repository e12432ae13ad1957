"""The model card of a run, beside each of its checkpoints and beside the final weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from novelgpt.model.card import Card, base_identity, base_metadata, code, shown_name, table, use_section
from novelgpt.settings.random_weights import size_name
from novelgpt.settings.run_record import DataSource
from novelgpt.settings.runs import TrainingRun, random_weights_of
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.sections import rows_per_epoch
from novelgpt.training.run_identity import DECISIVE, PLACES

KINDS = {
    "pretrain": ("Continued pretraining of", ["continued-pretraining"]),
    "finetune": ("Full fine-tuning of", ["sft"]),
    "finetune_lora": ("A LoRA adapter for", ["lora", "sft"]),
}
# Training settings shown beside those that decide on its steps; others say how and where it was run.
SHOWN = {
    *DECISIVE, "per_device_train_batch_size", "gradient_accumulation_steps", "load_best_model_at_end",
    "metric_for_best_model", "on_non_finite", "use_liger_kernel",
}  # fmt: skip
# Files, which have a table of their own, and names of places.
LEFT_OUT = {"model", "config_name", "tokenizer_name", *PLACES, "hub"}
FIGURES = {
    "eval_loss": "eval loss", "eval_perplexity": "eval perplexity", "eval_token_accuracy": "eval token accuracy",
    "eval_bits_per_character": "eval bits per character", "eval_tokens": "tokens of the evaluation",
    "start_eval_loss": "eval loss before training", "start_eval_perplexity": "eval perplexity before training",
    "start_eval_bits_per_character": "eval bits per character before training",
    "train_loss": "train loss", "stopped": "share of training prompts whose answer ended",
    "train_runtime": "seconds of training", "tokens_per_second": "tokens per second",
}  # fmt: skip
ROWS_READ, TOKENS_READ = 50, 1000
_HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003134f]")
_OTHER = re.compile(r"[A-Za-z\u0370-\u06ff\u3040-\u30ff\uac00-\ud7af]")


class RunCard:
    """Makes the model cards of a run."""

    def __init__(
        self,
        run: TrainingRun,
        description: Mapping[str, Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset[Any],
    ) -> None:
        """`description` is the content of run.json, `model` the one within an adapter."""
        self.run, self.description = run, description
        self.rows = rows_per_epoch(train)
        self.architecture = str(model.config.model_type)
        self.language = _language(tokenizer, train)

    def card(self, folder: Path, state: TrainerState, figures: Mapping[str, Any] | None = None) -> Card:
        """Make the card of weights.

        Args:
            folder: that holds them, or will, and base.json of an adapter.
            state: of training.
            figures: the final ones; None during training, where those of the last evaluation are taken.
        """
        run, base = self.run, self.run.model.model
        kind, tags = KINDS[run.pipeline]
        adapter, chat = run.pipeline == "finetune_lora", run.pipeline != "pretrain"
        step = state.global_step if figures is None else int(figures["saved_step"])
        metadata = {
            "library_name": "peft" if adapter else "transformers",
            "pipeline_tag": "text-generation",
            **base_metadata(base, "adapter" if adapter else "finetune", run.model.hub),
            **({"language": [self.language]} if self.language else {}),
            "tags": ["novelgpt", *tags],
            "metrics": ["perplexity"],
        }
        identity = base_identity(base, folder)
        random = random_weights_of(run)
        if random is not None:
            kind, metadata["tags"] = "Pretraining, from random weights, of", ["novelgpt", "pretraining"]
            tokenizer = code(shown_name(random.tokenizer))
            identity = f"Random weights: {code(size_name(random.source))}, seed {random.seed}, tokenizer {tokenizer}"
        lead = f"{kind} {code(shown_name(base))}, made by NovelGPT: step {step:,} of {state.max_steps:,}."
        sections = {
            "": f"{lead}\n\n{identity}",
            "Use": use_section(adapter, base, self.architecture, chat),
            "Data": self._data(),
            "Settings": self._settings(),
            "Results": _results(state, figures),
            "Versions": ", ".join(f"{name} {code(number)}" for name, number in self.description["versions"].items()),
        }
        name = Path(str(run.training.output_dir)).name
        return Card(metadata, code(name if figures is not None else f"{name}, step {step}"), sections)

    def _data(self) -> str:
        rows = []
        for source in self.description["data"]:
            digest = DataSource.model_validate(source).digest
            size = sum(file["bytes"] for file in source["files"])
            rows.append([code(source["role"]), code(Path(source["name"]).name), f"{size:,}", code(digest)])
        listed = table(["role", "file", "bytes", "sha256"], rows)
        return f"{self.rows:,} rows were trained on.\n\n{listed}"

    def _settings(self) -> str:
        training = self.run.training
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        found = {"precision": precision, "seed": training.seed, "processes": self.description["processes"]}
        for group in dataclasses.fields(self.run):
            values = vars(self.run)[group.name]
            for field in dataclasses.fields(values):
                if field.name in LEFT_OUT or (group.name == "training" and field.name not in SHOWN):
                    continue
                value = vars(values)[field.name]
                value = getattr(value, "value", value)  # of an enumeration
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                if value != getattr(default, "value", default):
                    found[field.name] = value
        listed = table(["setting", "value"], [[code(name), code(value)] for name, value in found.items()])
        return f"Those that differ from the defaults, and a few more.\n\n{listed}"


def _results(state: TrainerState, figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        entries = [entry for entry in state.log_history if "eval_loss" in entry]
        figures = entries[-1] if entries else {}
    known = {label: figures[name] for name, label in FIGURES.items() if figures.get(name) is not None}
    rows = [[label, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"] for label, value in known.items()]
    return table(["figure", "value"], rows) if rows else "Not evaluated yet."


def _language(tokenizer: PreTrainedTokenizerBase, train: Dataset[Any]) -> str | None:
    """Chinese where more than half of the trained letters of the first rows are; otherwise unknown."""
    count = min(ROWS_READ, len(train))  # type: ignore[arg-type]
    labels = [torch.as_tensor(train[row]["labels"][:TOKENS_READ]) for row in range(count)]
    text = "".join(str(tokenizer.decode(row[row != IGNORE_INDEX].tolist(), skip_special_tokens=True)) for row in labels)
    return "zh" if len(_HAN.findall(text)) > len(_OTHER.findall(text)) else None
