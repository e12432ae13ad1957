"""Settings of `llamafactory-cli train`, as llamafactory 0.9.5 reads them (hparams/*.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.convert_config.conversion import (
    MARKS,
    QLORA,
    TEMPLATE,
    THINKING,
    Conversion,
    all_tokens,
    attention,
    check_trains,
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
from cli.convert_config.llamafactory_data import dataset_files
from cli.convert_config.rows import RowWriter
from novelgpt.settings.remedies import as_typed

TOOL = "LLaMA-Factory 0.9.5"
# What it takes where the file says nothing and this toolkit would take something else.
DEFAULTS: dict[str, Any] = {
    "stage": "sft", "finetuning_type": "lora", "dataset_dir": "data", "cutoff_len": 2048,
    "lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all", "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
    "bf16": False, "logging_steps": 500, "logging_first_step": False, "eval_strategy": "no", "eval_on_start": False,
    "save_strategy": "steps", "save_steps": 500, "disable_gradient_checkpointing": False, "packing": False,
    "val_size": 0.0, "report_to": "none", "enable_thinking": True, "mix_strategy": "concat", "model_revision": "main",
}  # fmt: skip
_ATTENTION = {"auto": "", "sdpa": "", "fa2": "flash_attention_2", "disabled": "eager"}
_PIPELINES = {("sft", "lora"): "finetune_lora", ("sft", "full"): "finetune", ("pt", "full"): "pretrain"}
# Formats that the tokenizer's own template, or Baichuan's here, write as well; others are named with a warning.
_TEMPLATES = ("qwen", "qwen3_nothink", "qwen3_5_nothink", "baichuan", "baichuan2", "chatml")
# Those of models that think.
_REASONING = ("qwen3", "qwen3_5")
_TAKEN = (
    "do_train", "stage", "finetuning_type", "dataset", "eval_dataset", "dataset_dir", "val_size", "max_samples",
    "mask_history", "default_system",
)  # fmt: skip


def convert(given: dict[str, Any], file: Path, root: Path, folder: Path | None) -> tuple[Conversion, RowWriter]:
    """What becomes of a file for `llamafactory-cli train`.

    Args:
        given: what it says.
        file: for errors.
        root: the folder in which the tool is called.
        folder: for rows that have to be written anew.

    Raises:
        UserError: a stage or a method that is not here, or datasets that cannot be read.
    """
    conversion = Conversion(TOOL, file, root, given, DEFAULTS)
    conversion.pipeline = _pipeline(conversion)
    if not conversion.is_given("model_name_or_path"):
        raise conversion.refuse("model_name_or_path", "no model is named", "name one")
    writer = RowWriter(conversion, folder)
    model = str(given["model_name_or_path"])
    local = conversion.path(model)
    conversion.set("model", str(local) if local.is_dir() else model, "model_name_or_path")
    _datasets(conversion, writer)
    convert_keys(conversion, _HANDLERS, (*_TAKEN, "model_name_or_path"))
    if conversion.pipeline == "finetune_lora":
        alpha = conversion.value("lora_alpha")
        if alpha:
            conversion.set("lora_alpha", alpha, "lora_alpha")
        else:
            conversion.set("lora_alpha", 2 * conversion.value("lora_rank"), why="by default, it is 2 * lora_rank")
        conversion.note("lora_target", "differs", MARKS)
    return conversion, writer


def _pipeline(conversion: Conversion) -> str:
    check_trains(conversion)
    stage, method = str(conversion.value("stage")), str(conversion.value("finetuning_type"))
    if stage not in ("sft", "pt"):
        remedy = "train it with LLaMA-Factory or TRL; here are pretraining, full and LoRA fine-tuning on answers"
        raise conversion.refuse("stage", "there is no such training here", remedy)
    if method not in ("lora", "full"):
        raise conversion.refuse("finetuning_type", "there is none here", "finetuning_type: lora, or full")
    if (stage, method) == ("pt", "lora"):
        raise conversion.refuse("stage", "adapters are not pretrained here", "finetuning_type: full, or stage: sft")
    if conversion.is_given("adapter_name_or_path"):
        raise conversion.refuse(
            "adapter_name_or_path", "a training starts from a base, and makes an adapter of its own",
            as_typed("merge it first: `finetune_lora.merge ADAPTER FOLDER`; then model_name_or_path: FOLDER"),
        )  # fmt: skip
    return _PIPELINES[stage, method]


def _datasets(conversion: Conversion, writer: RowWriter) -> None:
    folder = conversion.value("dataset_dir")
    sources = dataset_files(conversion, "dataset", folder)
    if not sources:
        raise conversion.refuse("dataset", "no data set is named", "name one of dataset_info.json")
    columns = {source.text_column for source in sources if source.file.suffix.lower() != ".txt"} - {None}
    if len(columns) > 1:
        named = " and ".join(sorted(map(str, columns)))
        raise conversion.refuse("dataset", f"their texts stand in {named}", "give the column one name")
    paths = writer.paths(sources)
    conversion.set("train_files", paths, "dataset", why=f"by {conversion.path(folder) / 'dataset_info.json'}")
    if columns - {"text"}:
        conversion.set("text_column", columns.pop(), why="columns: prompt, in dataset_info.json")
    valid = writer.paths(dataset_files(conversion, "eval_dataset", folder))
    if conversion.is_given("max_samples"):
        conversion.note("max_samples", "same", "the files of train_files hold no more rows than that")
    if conversion.is_given("mask_history"):
        masked = conversion.value("mask_history")
        text = "the rows mark earlier answers as not trained" if masked else "all answers are trained, as here"
        conversion.note("mask_history", "same", text)
    if conversion.is_given("default_system"):
        conversion.note("default_system", "same", "the rows hold it")
    if conversion.pipeline == "pretrain" and any(source.file.suffix.lower() == ".txt" for source in sources):
        text = "LLaMA-Factory takes each line of a .txt for a text that ends; here the file is one text"
        conversion.note("dataset", "differs", text)
    hold_out(conversion, writer, valid, "eval_dataset", "val_size")


def _packing(conversion: Conversion) -> None:
    neat, packing = conversion.value("neat_packing"), conversion.value("packing")
    if "packing" in conversion.settings:
        return
    packs = bool(neat or packing or conversion.pipeline == "pretrain" and conversion.given.get("packing") is None)
    why = "stage: pt packs by default" if packs and not (neat or packing) else ""
    conversion.set("packing", packs, *(["neat_packing"] if neat else [] if why else ["packing"]), why=why)
    if packs and not neat:
        conversion.note("packing", "differs", "documents of a pack do not see each other here, as with neat_packing")


def _template(conversion: Conversion) -> None:
    name = conversion.value("template")
    if conversion.pipeline == "pretrain" or not conversion.is_given("template"):
        return
    if name in _REASONING:
        conversion.note("template", "differs", THINKING)
    elif name in _TEMPLATES:
        conversion.note("template", "same", "the tokenizer's own chat template (Baichuan's format where it has none)")
    else:
        conversion.note("template", "differs", as_typed(TEMPLATE))


def _checkpointing(conversion: Conversion) -> None:
    key = "disable_gradient_checkpointing"
    conversion.set("activation_checkpointing", not conversion.value(key), key)
    if conversion.is_given("gradient_checkpointing"):
        conversion.note("gradient_checkpointing", "same", f"{key} decides in LLaMA-Factory")


def _quantization(conversion: Conversion) -> None:
    bits = conversion.value("quantization_bit")
    if bits == 4 and conversion.pipeline == "finetune_lora":
        conversion.set("qlora", True, "quantization_bit")
    elif bits:
        conversion.note("quantization_bit", "missing", QLORA)


def _cutoff(conversion: Conversion) -> None:
    conversion.set("max_length", conversion.value("cutoff_len"), "cutoff_len")
    if conversion.pipeline != "pretrain":
        conversion.set("overlong", "truncate", why="LLaMA-Factory cuts rows to cutoff_len")
        text = (
            "of a longer row, LLaMA-Factory cuts question and answer in proportion, and here the row loses its end; "
            "what is cut is counted before training"
        )
        conversion.note("cutoff_len", "differs", text)


def _thinking(conversion: Conversion) -> None:
    if conversion.is_given("enable_thinking"):
        conversion.note("enable_thinking", "differs", THINKING)


def _best(conversion: Conversion) -> None:
    """Its figures of answers have other names here."""
    value = conversion.value("metric_for_best_model")
    if value:
        conversion.set("metric_for_best_model", str(value).removeprefix("eval_"), "metric_for_best_model")


def _answer_length(conversion: Conversion) -> None:
    if conversion.is_given("max_length"):
        conversion.note("max_length", "same", "it bounds generated answers; cutoff_len bounds rows")


_HANDLERS = {
    **dict.fromkeys(("bf16", "fp16", "pure_bf16"), precision),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), warmup),
    **dict.fromkeys(("packing", "neat_packing"), _packing),
    **dict.fromkeys(("flash_attn", "attn"), attention(_ATTENTION)),
    **dict.fromkeys(("disable_gradient_checkpointing", "gradient_checkpointing"), _checkpointing),
    **dict.fromkeys(("report_to", "use_swanlab"), trackers),
    "cutoff_len": _cutoff,
    "max_length": _answer_length,
    "template": _template,
    "lora_target": lora_targets("lora_target", "all"),
    "lora_alpha": lambda conversion: None,  # follows from the rank
    "quantization_bit": _quantization,
    "deepspeed": deepspeed,
    "output_dir": output_dir,
    "overwrite_output_dir": overwrite,
    "resume_from_checkpoint": resume,
    "enable_thinking": _thinking,
    "metric_for_best_model": _best,
    "train_on_prompt": lambda conversion: all_tokens(conversion, "train_on_prompt"),
}
