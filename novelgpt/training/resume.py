"""Whether a run folder holds the run that is asked for, and the checkpoint it goes on from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from novelgpt.model.fingerprint import BASE_RECORD, check_base
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import say
from novelgpt.training.checkpoints.folders import checkpoints, damage
from novelgpt.training.checkpoints.trainer import STATES
from novelgpt.training.data_identity import data_changes

# Of transformers.TrainingArguments, what decides on the batches and on what a step does with them. The rest may change:
# what is logged, evaluated, saved and where, how many processes there are, and how memory is used.
DECISIVE = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha", "seed", "data_seed",
    "train_sampling_strategy", "dataloader_drop_last", "router_aux_loss_coef",
)  # fmt: skip
# Told apart by what they hold.
DATA_FILES = ("train_files", "valid_files")
FILES = (*DATA_FILES, "instruction_templates")
MOST_CHANGES = 4
SMALL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json",
    "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "qwen.tiktoken",
)  # fmt: skip


def model_identity(model: str) -> dict[str, Any]:
    """What tells a base from another without reading its weights: its small files, and the sizes of the large ones."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    small = {name: folder / name for name in SMALL_FILES if (folder / name).is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in small.items()}
    return hashes | {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs, as run.json describes them, so that one cannot go on from the other."""
    now = json.loads(json.dumps(now, default=str))  # as it would be read
    lacking = sorted(set(now) - {"model_identity", "data"} - set(before))
    if not lacking and "training" not in before["arguments"]:
        lacking = ["the arguments of training"]
    if lacking:
        return [f"its run.json says nothing of {', '.join(lacking)}"]
    if before["pipeline"] != now["pipeline"]:
        return [f"the pipeline was {before['pipeline']}"]
    found = []
    identity = now["model_identity"]
    if "data" not in before:  # an earlier version, which looked at fewer files
        identity = {name: identity.get(name) for name in before.get("model_identity", {})}
    if before.get("model_identity", {}) != identity:
        found.append(f"the model ({before['model']}, now {now['model']}) or its files")
    if "data" in before and "data" in now:
        found += data_changes(before["data"], now["data"])
    else:
        found += _changes_of_hashes(before, now)
    if _rows_a_step(before) != _rows_a_step(now):
        found.append(f"rows a step ({_rows_a_step(before)}, now {_rows_a_step(now)})")
    for group, values in now["arguments"].items():
        if group == "model":
            continue
        old = before["arguments"].get(group, {})
        names = [name for name in values if name in DECISIVE] if group == "training" else sorted(set(values) - {*FILES})
        found += [
            f"{name} ({old[name]}, now {values[name]})" for name in names if name in old and old[name] != values[name]
        ]
    return found


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that a run can go on from; damaged ones are named. None where there are none.

    Raises:
        UserError: there are some, and all of them are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in found:
        problem = unusable(checkpoint)
        if problem is None:
            return checkpoint
        note = f"{checkpoint} is not used: {problem}"
        say(note, style="yellow")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} is whole",
            "bring one back from a copy, choose another --output_dir, or begin again with --overwrite_output_dir",
        )
    return None


def unusable(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a folder; None where it can."""
    problem = damage(checkpoint)
    if problem is None and not (checkpoint / STATES).is_file():
        return "it holds weights alone (--save_only_model)"
    return problem


def check_same_run(folder: Path, before: dict[str, Any], now: dict[str, Any], checkpoint: Path | None) -> None:
    """Make sure that the run of a folder is the one that is asked for.

    Raises:
        UserError: names what has changed.
    """
    found = changes(before, now)
    if found:
        more = f", and {len(found) - MOST_CHANGES} more" if len(found) > MOST_CHANGES else ""
        raise UserError(
            f"{folder} holds an unfinished run with other settings: {', '.join(found[:MOST_CHANGES])}{more}",
            "type its settings to go on, choose another --output_dir, or replace it: --overwrite_output_dir",
        )
    if checkpoint is not None and (checkpoint / BASE_RECORD).is_file():
        check_base(checkpoint, now["model"], "name the base that the run was started with")


def _changes_of_hashes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The same of runs of earlier versions, which noted a hash a name: role, order and number as far as that says."""
    old, new = before["data_sha256"], now["data_sha256"]
    if list(old.values()) != list(new.values()):
        names = [Path(name).name for name, digest in new.items() if digest not in old.values()]
        return [f"the content of {', '.join(names)}" if names else "the data files"]
    named = [
        [[hashes.get(name) for name in description["arguments"].get("data", {}).get(role, [])] for role in DATA_FILES]
        for hashes, description in ((old, before), (new, now))
    ]
    known = None not in (digest for roles in named for files in roles for digest in files)
    return ["the order, number or role of the data files"] if known and named[0] != named[1] else []


def _rows_a_step(description: dict[str, Any]) -> int:
    training = description["arguments"]["training"]
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return int(rows * description["processes"])
