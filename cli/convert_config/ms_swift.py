"""Settings of `swift sft` and `swift pt`, as ms-swift 4.6.0 reads them (arguments/*.py); names of 3.x as well."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import (
    MARKS,
    QLORA,
    TEMPLATE,
    Conversion,
    attention,
    convert_keys,
    deepspeed,
    lora_targets,
    output_dir,
    overwrite,
    precision,
    resume,
    trackers,
    warmup,
)
from cli.convert_config.evaluation import hold_out
from cli.convert_config.ms_swift_data import dataset_files
from cli.convert_config.rows import RowWriter
from novelgpt.settings.remedies import as_typed

TOOL = "ms-swift 4.6.0"
DEFAULTS: dict[str, Any] = {
    "tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["all-linear"],
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0,
    "seed": 42, "logging_steps": 5, "logging_first_step": True, "save_strategy": "steps", "save_steps": 500,
    "eval_on_start": False, "gradient_checkpointing": True, "packing": False, "split_dataset_ratio": 0.0,
    "truncation_strategy": "delete", "loss_scale": "default", "report_to": "none", "data_seed": 42,
}  # fmt: skip
_ATTENTION = {"sdpa": "", "eager": "eager", "flash_attn": "flash_attention_2", "flash_attention_2": "flash_attention_2"}
_TUNER = ("tuner_type", "train_type", "sft_type")
_OVERLONG = {"right": "truncate", "split": "split", "delete": "refuse", "left": "refuse"}
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TAKEN = (
    *_TUNER, "_command", "rlhf_type", "ENV", "model", "dataset", "val_dataset", "split_dataset_ratio",
    "dataset_test_ratio", "columns", "system", "loss_scale", "use_hf", "lora_alpha",
)  # fmt: skip


def convert(given: dict[str, Any], file: Path, root: Path, folder: Path | None) -> tuple[Conversion, RowWriter]:
    """What becomes of a file for `swift sft` or `swift pt`; as `llamafactory.convert`."""
    conversion = Conversion(TOOL, file, root, given, DEFAULTS)
    conversion.pipeline = _pipeline(conversion)
    writer = RowWriter(conversion, folder)
    if not conversion.is_given("model"):
        raise conversion.refuse("model", "no model is named", "name one")
    _model(conversion)
    _datasets(conversion, writer)
    convert_keys(conversion, _HANDLERS, _TAKEN)
    _derived(conversion)
    if conversion.is_given("ENV"):
        conversion.note("ENV", "differs", f"set these variables before the command: {given['ENV']}")
    return conversion, writer


def _pipeline(conversion: Conversion) -> str:
    if conversion.is_given("rlhf_type"):
        remedy = "train it with ms-swift or TRL; here are pretraining, full and LoRA fine-tuning on answers"
        raise conversion.refuse("rlhf_type", "there is no such training here", remedy)
    key = next((key for key in _TUNER if conversion.is_given(key)), "tuner_type")
    method = conversion.value(key)
    text = conversion.given.get("_command") == "pt" or conversion.given.get("use_chat_template") is False
    if method not in ("lora", "full"):
        raise conversion.refuse(key, "there is none here", f"{key}: lora, or full")
    if text and method == "lora":
        raise conversion.refuse(key, "adapters are not pretrained here", f"{key}: full, or fine-tune (swift sft)")
    if conversion.is_given("adapters"):
        remedy = as_typed("merge it first: `finetune_lora.merge ADAPTER FOLDER`; then model: FOLDER")
        raise conversion.refuse("adapters", "a training starts from a base, and makes an adapter of its own", remedy)
    return "pretrain" if text else "finetune_lora" if method == "lora" else "finetune"


def _model(conversion: Conversion) -> None:
    model = str(conversion.given["model"])
    local = conversion.path(model)
    conversion.set("model", str(local) if local.is_dir() else model, "model")
    if not local.is_dir() and model != "tiny" and not conversion.value("use_hf"):
        conversion.set("hub", "modelscope", "use_hf", why="ms-swift looks names up on ModelScope")


def _datasets(conversion: Conversion, writer: RowWriter) -> None:
    sources = dataset_files(conversion, "dataset")
    if not sources:
        raise conversion.refuse("dataset", "no data set is named", "name files of rows")
    conversion.set("train_files", writer.paths(sources), "dataset")
    valid = writer.paths(dataset_files(conversion, "val_dataset"))
    for key in ("columns", "system"):
        if conversion.is_given(key):
            conversion.note(key, "same", "the rows hold it")
    scale = str(conversion.value("loss_scale"))
    if conversion.is_given("loss_scale") and conversion.pipeline != "pretrain":
        base, _, further = scale.partition("+")
        if base == "last_round":
            conversion.note("loss_scale", "same", "the rows mark earlier answers as not trained")
        elif base == "default":
            conversion.note("loss_scale", "same", "all answers are trained, as here")
        if base not in ("last_round", "default") or further:
            conversion.note(
                "loss_scale", "missing", "an answer counts in the loss or not, with one weight for all of it"
            )
    share = "dataset_test_ratio" if conversion.is_given("dataset_test_ratio") else "split_dataset_ratio"
    hold_out(conversion, writer, valid, "val_dataset", share)


def _derived(conversion: Conversion) -> None:
    """What ms-swift derives from other settings."""
    adapter = conversion.pipeline == "finetune_lora"
    if adapter:
        conversion.set("lora_alpha", int(conversion.value("lora_alpha")), "lora_alpha")
        conversion.note("target_modules", "differs", MARKS)
    if not conversion.is_given("learning_rate"):
        conversion.set("learning_rate", 1e-4 if adapter else 1e-5, why="its default for this method")
    if not conversion.is_given("gradient_accumulation_steps"):
        steps = max(1, math.ceil(16 / int(conversion.value("per_device_train_batch_size"))))
        conversion.set("gradient_accumulation_steps", steps, why="by default, 16 rows a step")
        text = "ms-swift makes 16 rows a step of it by default; divide it by the number of devices"
        conversion.note("gradient_accumulation_steps", "differs", text)
    evaluates = any(conversion.is_given(key) for key in ("val_dataset", "eval_strategy")) or bool(
        conversion.value("split_dataset_ratio") or conversion.value("dataset_test_ratio")
    )
    if not conversion.is_given("eval_strategy"):
        strategy = conversion.value("save_strategy") if evaluates else "no"
        conversion.set("eval_strategy", strategy, why="by default, as save_strategy, where there are rows for it")
        if strategy == "steps" and not conversion.is_given("eval_steps"):
            conversion.set("eval_steps", conversion.value("save_steps"), why="by default, as save_steps")
    _length(conversion)
    if conversion.is_given("metric_for_best_model"):
        value = str(conversion.given["metric_for_best_model"]).removeprefix("eval_")
        conversion.set("metric_for_best_model", value, "metric_for_best_model")


def _length(conversion: Conversion) -> None:
    if conversion.is_given("max_length"):
        return
    config = Path(conversion.settings["model"].value) / "config.json"
    longest = None
    if config.is_file():
        longest = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    if isinstance(longest, int):
        conversion.set("max_length", longest, why="by default, the positions of the model")
    else:
        text = "by default, ms-swift takes all positions of the model; here 2,048 unless you set it"
        conversion.note("max_length", "differs", text)


def _truncation(conversion: Conversion) -> None:
    value = str(conversion.value("truncation_strategy"))
    if conversion.pipeline == "pretrain":
        conversion.note("truncation_strategy", "differs", "text that does not fit goes on in the next block")
    elif value not in _OVERLONG:
        raise conversion.refuse("truncation_strategy", "there is none of that name", "delete, right or split")
    else:
        conversion.set("overlong", _OVERLONG[value], "truncation_strategy")
        if value in ("delete", "left"):
            text = "rows above max_length stop the run before it trains; overlong takes truncate and split as well"
            conversion.note("truncation_strategy", "differs", text)


def _dtype(conversion: Conversion) -> None:
    value = conversion.value("torch_dtype")
    if value in _PRECISIONS and not any(conversion.is_given(key) for key in ("bf16", "fp16")):
        conversion.set("precision", _PRECISIONS[value], "torch_dtype")


def _quantization(conversion: Conversion) -> None:
    bits, method = conversion.value("quant_bits"), conversion.value("quant_method") or "bnb"
    if bits == 4 and method == "bnb" and conversion.pipeline == "finetune_lora":
        conversion.set("qlora", True, "quant_bits")
    elif bits:
        conversion.note("quant_bits", "missing", QLORA)


def _checkpointing(conversion: Conversion) -> None:
    conversion.set(
        "activation_checkpointing", bool(conversion.value("gradient_checkpointing")), "gradient_checkpointing"
    )


def _packing(conversion: Conversion) -> None:
    conversion.set("packing", bool(conversion.value("packing")), "packing")


def _template(conversion: Conversion) -> None:
    if conversion.is_given("template") and conversion.pipeline != "pretrain":
        conversion.note("template", "differs", as_typed(TEMPLATE))


def _chat_template(conversion: Conversion) -> None:
    if conversion.is_given("use_chat_template"):
        conversion.note("use_chat_template", "same", "the pipeline says it: pretrain writes no template")


_HANDLERS = {
    **dict.fromkeys(("bf16", "fp16"), precision),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), warmup),
    **dict.fromkeys(("report_to", "use_swanlab"), trackers),
    "torch_dtype": _dtype,
    "attn_impl": attention(_ATTENTION),
    "truncation_strategy": _truncation,
    "target_modules": lora_targets("target_modules", "all-linear"),
    "quant_bits": _quantization,
    "gradient_checkpointing": _checkpointing,
    "packing": _packing,
    "template": _template,
    "use_chat_template": _chat_template,
    "deepspeed": deepspeed,
    "output_dir": output_dir,
    "overwrite_output_dir": overwrite,
    "resume_from_checkpoint": resume,
    "metric_for_best_model": lambda conversion: None,  # derived
}
