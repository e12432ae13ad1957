"""Describes a run for run.json, and compares two descriptions before a run resumes from a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from novelgpt import __version__
from novelgpt.model.fingerprint import BASE_RECORD, check_base
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import IS_CHECKOUT, ROOT
from novelgpt.settings.run_record import DataSource, utc_now
from novelgpt.settings.runs import TrainingRun
from novelgpt.training.data_identity import ROLES, data_changes

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")
# The training arguments that determine the batches and what a step does with them. The others may change between
# starts: logging, evaluation, saving, places, the number of processes, and how memory is used.
DECISIVE = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha", "seed", "data_seed",
    "train_sampling_strategy", "dataloader_drop_last", "router_aux_loss_coef",
)  # fmt: skip
MAX_CHANGES = 4
SMALL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json",
    "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "qwen.tiktoken",
)  # fmt: skip


def describe_run(run: TrainingRun, data: list[DataSource]) -> dict[str, Any]:
    """Return the content of run.json for a run that starts.

    Args:
        run: with everything settled by then.
        data: what it trains and evaluates on, as it was before it was read.
    """
    arguments = {}
    for field in dataclasses.fields(run):
        group = vars(run)[field.name]
        values = group.to_dict() if field.name == "training" else dataclasses.asdict(group)
        # Keys for hubs and trackers do not belong in a file that people share.
        arguments[field.name] = {key: value for key, value in values.items() if not key.endswith("_token")}
    return {
        "pipeline": run.pipeline,
        "started": utc_now(),
        "model": run.model.model,
        "model_identity": _model_identity(run.model.model),
        "seed": run.training.seed,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "arguments": arguments,
        "data_sha256": {source.name: source.digest for source in data if source.role != "instruction_templates"},
        "versions": {"python": platform.python_version(), "novelgpt": __version__}
        | {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "data": [source.model_dump() for source in data],
    }


def check_same_run(folder: Path, before: dict[str, Any], now: dict[str, Any], checkpoint: Path | None) -> None:
    """Make sure that a folder holds the run that is about to start.

    Raises:
        UserError: names what has changed.
    """
    found = changes(before, now)
    if found:
        more = f", and {len(found) - MAX_CHANGES} more" if len(found) > MAX_CHANGES else ""
        raise UserError(
            f"{folder} holds an unfinished run with other settings: {', '.join(found[:MAX_CHANGES])}{more}",
            "use its settings to resume it, choose another --output_dir, or replace it: --overwrite_output_dir",
        )
    if checkpoint is not None and (checkpoint / BASE_RECORD).is_file():
        check_base(checkpoint, now["model"], "name the base that the run was started with")


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the differences between two descriptions that keep one run from resuming the other."""
    now = json.loads(json.dumps(now, default=str))  # as it would be read
    lacking = sorted(set(now) - {"model_identity", "data"} - set(before))
    if not lacking and "training" not in before["arguments"]:
        lacking = ["the training arguments"]
    if lacking:
        return [f"its run.json lacks {', '.join(lacking)}"]
    if before["pipeline"] != now["pipeline"]:
        return [f"the pipeline was {before['pipeline']}"]
    found = []
    identity = now["model_identity"]
    if "data" not in before:  # written by an earlier version, which recorded fewer files
        identity = {name: identity.get(name) for name in before.get("model_identity", {})}
    if before.get("model_identity", {}) != identity:
        found.append(f"the model ({before['model']}, now {now['model']}) or its files")
    if "data" in before and "data" in now:
        found += data_changes(before["data"], now["data"])
    else:
        found += _changed_hashes(before, now)
    old_rows, new_rows = _rows_per_step(before), _rows_per_step(now)
    if old_rows != new_rows:
        found.append(f"rows per step ({old_rows}, now {new_rows})")
    for group, values in now["arguments"].items():
        if group == "model":
            continue
        old = before["arguments"].get(group, {})
        names = [name for name in values if name in DECISIVE] if group == "training" else sorted(set(values) - {*ROLES})
        found += [
            f"{name} ({old[name]}, now {values[name]})" for name in names if name in old and old[name] != values[name]
        ]
    return found


def _changed_hashes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare data by `data_sha256` alone, which is all that earlier versions recorded.

    Role, order and number are compared as far as these tell.
    """
    old, new = before["data_sha256"], now["data_sha256"]
    if list(old.values()) != list(new.values()):
        names = [Path(name).name for name, digest in new.items() if digest not in old.values()]
        return [f"the content of {', '.join(names)}" if names else "the data files"]
    files, now_files = (
        [[hashes.get(name) for name in record["arguments"].get("data", {}).get(role, [])] for role in ROLES[:2]]
        for hashes, record in ((old, before), (new, now))
    )
    known = None not in (digest for role in (*files, *now_files) for digest in role)
    return ["the order, number or role of the data files"] if known and files != now_files else []


def _rows_per_step(record: dict[str, Any]) -> int:
    training = record["arguments"]["training"]
    return int(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * record["processes"])


def _model_identity(model: str) -> dict[str, Any]:
    """Identify a base without reading its weights: hashes of its small files, sizes of the large ones."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    small = {name: folder / name for name in SMALL_FILES if (folder / name).is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in small.items()}
    return hashes | {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _git_commit() -> str | None:
    """Return the commit of the checkout; None for an installed wheel, which may lie in somebody else's repository."""
    if not IS_CHECKOUT:
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
