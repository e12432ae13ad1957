"""Settings of `swift sft` and `swift pt`, as ms-swift 4.6.0 reads them (arguments/*.py); names of 3.x as well."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import TEMPLATE, Conversion, Peer, attention, quantization
from cli.convert_config.rows import RowFile, convert_file, hold_out
from dataset.readers import messages_of
from dataset.records import Record
from novelgpt.settings.remedies import as_typed
from novelgpt.text.dataset_info import MAX_ROWS

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_METHOD_KEYS = ("tuner_type", "train_type", "sft_type")
_OVERLONG = {"right": "truncate", "split": "split", "delete": "drop", "left": "refuse"}
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _pipeline(conversion: Conversion) -> str:
    if conversion.is_given("rlhf_type"):
        remedy = "train it with ms-swift or TRL; here are pretraining, full and LoRA fine-tuning on answers"
        raise conversion.refuse("rlhf_type", "there is no such training here", remedy)
    key = next((key for key in _METHOD_KEYS if conversion.is_given(key)), "tuner_type")
    method = conversion.value(key)
    text = conversion.value("_command") == "pt" or conversion.value("use_chat_template") is False
    if method not in ("lora", "full"):
        raise conversion.refuse(key, "not supported here", f"{key}: lora, or full")
    if text and method == "lora":
        raise conversion.refuse(key, "adapters are not pretrained here", f"{key}: full, or fine-tune (swift sft)")
    if conversion.is_given("adapters"):
        remedy = as_typed("merge it first: `finetune_lora.merge ADAPTER FOLDER`; then model: FOLDER")
        raise conversion.refuse("adapters", "training starts from a base, and makes a new adapter", remedy)
    return "pretrain" if text else "finetune_lora" if method == "lora" else "finetune"


def _datasets(conversion: Conversion) -> None:
    model = conversion.settings["model"]
    if model != "tiny" and not Path(model).is_dir() and not conversion.value("use_hf"):
        conversion.set("hub", "modelscope", "use_hf", why="ms-swift looks names up on ModelScope")
    sources = _dataset_files(conversion, "dataset")
    if not sources:
        raise conversion.refuse("dataset", "no dataset is named", "name files of rows")
    conversion.set("train_files", [convert_file(conversion, source) for source in sources], "dataset")
    valid = [convert_file(conversion, source) for source in _dataset_files(conversion, "val_dataset")]
    if conversion.is_given("loss_scale") and conversion.pipeline != "pretrain":
        base, _, further = str(conversion.value("loss_scale")).partition("+")
        known = {
            "last_round": "the rows mark earlier answers as not trained",
            "default": "all answers are trained, as here",
        }
        if base in known:
            conversion.note("loss_scale", "same", known[base])
        if base not in known or further:
            text = "an answer has one weight for all of it, which rows say"
            conversion.note("loss_scale", "missing", text)
    share = "dataset_test_ratio" if conversion.is_given("dataset_test_ratio") else "split_dataset_ratio"
    hold_out(conversion, valid, "val_dataset", share)


def _dataset_files(conversion: Conversion, key: str) -> list[RowFile]:
    """The files that a key names as `path#rows`.

    Raises:
        UserError: a hub name, or a file of an unknown kind.
    """
    column = "text" if conversion.pipeline == "pretrain" else None
    read = partial(_read, conversion=conversion, names=_columns(conversion), column=column)
    sources = []
    value = conversion.value(key) or []
    for name in [value] if isinstance(value, str) else value:
        text, sampled = str(name), None
        if not conversion.path(text).exists() and "#" in text:
            text, _, number = text.rpartition("#")
            if not re.fullmatch("[0-9]{1,9}", number) or not 0 < int(number) <= MAX_ROWS:
                raise conversion.refuse(key, f"{number!r} is not a number of rows", "write path#1000")
            sampled = int(number)
        path = conversion.path(text)
        if not path.exists():
            remedy = "download it (modelscope download --dataset NAME --local_dir FOLDER), and name its file"
            raise conversion.refuse(key, f"{text} is not a local file, and nothing is downloaded from a hub", remedy)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not files:
            raise conversion.refuse(key, f"{path} holds no {', '.join(SUFFIXES)}", "name a file of rows")
        if sampled is not None and len(files) > 1:
            raise conversion.refuse(key, "a number of rows of several files", "join them into one file")
        for file in files:
            own = file.stem if key == "dataset" else f"{key}_{file.stem}"
            sources.append(RowFile(own, file, read, sampled=sampled, text_column=column))
        if sampled is not None:
            conversion.note(key, "differs", f"{sampled} rows of {text} are sampled; ms-swift samples different ones")
    return sources


def _columns(conversion: Conversion) -> dict[str, str]:
    value = conversion.value("columns") or {}
    try:
        columns = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise conversion.refuse("columns", f"not a JSON mapping: {error}", "correct it") from error
    if not isinstance(columns, dict):
        raise conversion.refuse("columns", "not a mapping of names", 'write {"text1": "query"}')
    return {str(old): str(new) for old, new in columns.items()}


def _read(record: Record, conversion: Conversion, names: dict[str, str], column: str | None) -> Record | None:
    """A row under the names that ms-swift gives its fields; its shapes are among those that are read here."""
    row: dict[str, Any] = {names.get(name, name): value for name, value in record.items()}
    if column is not None:  # an answer without a question, or a field that is the answer
        if isinstance(turns := row.get("messages"), list):
            text = "".join(str(message.get("content") or "") for message in turns if isinstance(message, dict))
        else:
            fields = ("response", "text", "content", "output")
            text = next((str(row[name]) for name in fields if row.get(name)), "")
        return {"text": text} if text else None
    system = conversion.value("system")
    last_round = str(conversion.value("loss_scale")).startswith("last_round")
    if not system and not last_round:
        return row
    messages: list[dict[str, Any]] = [dict(message) for message in messages_of(row, str(conversion.file))]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if last_round:
        last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
        for message in messages[:last]:
            if message["role"] == "assistant":
                message["weight"] = 0
    return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})


def _derived(conversion: Conversion) -> None:
    """What ms-swift derives from other settings."""
    if not conversion.is_given("learning_rate"):
        rate = 1e-4 if conversion.pipeline == "finetune_lora" else 1e-5
        conversion.set("learning_rate", rate, why="its default for this method")
    if not conversion.is_given("gradient_accumulation_steps"):
        steps = max(1, math.ceil(16 / int(conversion.value("per_device_train_batch_size"))))
        conversion.set("gradient_accumulation_steps", steps, why="by default, 16 rows per step")
        text = "ms-swift makes 16 rows per step of it by default; divide it by the number of devices"
        conversion.note("gradient_accumulation_steps", "differs", text)
    if not conversion.is_given("eval_strategy"):
        evaluates = any(map(conversion.value, ("val_dataset", "split_dataset_ratio", "dataset_test_ratio")))
        strategy = conversion.value("save_strategy") if evaluates else "no"
        conversion.set("eval_strategy", strategy, why="by default, as save_strategy, where there are rows for it")
        if strategy == "steps" and not conversion.is_given("eval_steps"):
            conversion.set("eval_steps", conversion.value("save_steps"), why="by default, as save_steps")
    if not conversion.is_given("max_length"):
        config = Path(conversion.settings["model"]) / "config.json"
        described = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if isinstance(positions := described.get("max_position_embeddings"), int):
            conversion.set("max_length", positions, why="by default, the positions of the model")
        else:
            text = "by default, ms-swift takes all positions of the model; here 2,048 unless you set it"
            conversion.note("max_length", "differs", text)
    if conversion.is_given("ENV"):
        conversion.note("ENV", "differs", f"set these variables before the command: {conversion.given['ENV']}")


def _truncation(conversion: Conversion, key: str) -> None:
    value = str(conversion.value(key))
    if conversion.pipeline == "pretrain":
        conversion.note(key, "differs", "text that does not fit continues in the next block")
    elif value not in _OVERLONG:
        raise conversion.refuse(key, "there is none of that name", "delete, right or split")
    else:
        conversion.set("overlong", _OVERLONG[value], key)
        if _OVERLONG[value] == "refuse":
            text = "longer rows stop the run before it trains; overlong takes truncate, split and drop as well"
            conversion.note(key, "differs", text)


def _dtype(conversion: Conversion, key: str) -> None:
    value = conversion.value(key)
    if value in _PRECISIONS and not any(map(conversion.is_given, ("bf16", "fp16"))):
        conversion.set("precision", _PRECISIONS[value], key)


def _template(conversion: Conversion, key: str) -> None:
    if conversion.is_given(key) and conversion.pipeline != "pretrain":
        conversion.note(key, "differs", as_typed(TEMPLATE))


MS_SWIFT = Peer(
    tool="ms-swift 4.6.0",
    model_key="model",
    lora_targets=("target_modules", "all-linear"),
    attention={
        "sdpa": "", "eager": "eager", "flash_attn": "flash_attention_2", "flash_attention_2": "flash_attention_2",
    },
    defaults={
        "tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05,
        "target_modules": ["all-linear"], "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "weight_decay": 0.1,
        "adam_beta2": 0.95, "max_grad_norm": 1.0, "seed": 42, "logging_steps": 5, "logging_first_step": True,
        "save_strategy": "steps", "save_steps": 500, "eval_on_start": False, "gradient_checkpointing": True,
        "packing": False, "split_dataset_ratio": 0.0, "truncation_strategy": "delete", "loss_scale": "default",
        "report_to": "none", "data_seed": 42,
    },
    pipeline=_pipeline,
    datasets=_datasets,
    handlers={
        "torch_dtype": _dtype,
        "attn_impl": attention,
        "truncation_strategy": _truncation,
        "quant_bits": quantization,
        "template": _template,
    },
    values={"metric_for_best_model": ("metric_for_best_model", lambda name: str(name).removeprefix("eval_"))},
    notes={
        "columns": ("same", "the rows hold it"),
        "system": ("same", "the rows hold it"),
        "use_chat_template": ("same", "the pipeline decides: pretrain uses no template"),
    },
    derived=_derived,
    taken=(
        *_METHOD_KEYS, "_command", "rlhf_type", "ENV", "dataset", "val_dataset", "split_dataset_ratio",
        "dataset_test_ratio", "loss_scale", "use_hf",
    ),
)  # fmt: skip
