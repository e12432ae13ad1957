"""Settings of `trl sft --config`, as TRL 1.16 reads them (trainer/sft_config.py, trainer/model_config.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import (
    MARKS,
    QLORA,
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
from cli.convert_config.rows import RowFile, RowWriter
from dataset.records import Record, read_records
from novelgpt.settings.peer_names import ANSWERS_ONLY

TOOL = "TRL 1.16"
DEFAULTS: dict[str, Any] = {
    "use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "max_length": 1024, "packing": False,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 2e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_steps": 0,
    "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42, "logging_steps": 10, "logging_first_step": False,
    "eval_strategy": "no", "eval_on_start": False, "save_strategy": "steps", "save_steps": 500,
    "gradient_checkpointing": True, "dataset_train_split": "train", "dataset_test_split": "test",
    "dataset_text_field": "text", "report_to": "none", "truncation_mode": "keep_start", "packing_strategy": "bfd",
    "test_split_size": 0.0, "bf16": True,
}  # fmt: skip
# What peft adapts where nothing is named, in Llama, Qwen1.5 to Qwen3 and most models of their shape.
_PEFT_TARGETS = ["q_proj", "v_proj"]
_ATTENTION = {"sdpa": "", "eager": "eager", "flash_attention_2": "flash_attention_2"}
PROMPTS = f"TRL trains questions, too, where it is off: {ANSWERS_ONLY}"
_BUILDERS = ("json", "csv", "parquet", "text")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_TAKEN = (
    "model_name_or_path", "use_peft", "dataset_name", "datasets", "dataset_config", "dataset_train_split",
    "dataset_test_split", "test_split_size", "dataset_text_field", "assistant_only_loss", "completion_only_loss",
    "lora_alpha",
)  # fmt: skip


def convert(given: dict[str, Any], file: Path, root: Path, folder: Path | None) -> tuple[Conversion, RowWriter]:
    """What becomes of a file for `trl sft`; as `llamafactory.convert`."""
    conversion = Conversion(TOOL, file, root, given, DEFAULTS)
    train = list(_files(conversion, str(conversion.value("dataset_train_split"))))
    if not train:
        raise conversion.refuse("dataset_name", "no data set is named", "name a folder or files of rows")
    conversion.pipeline, shape = _pipeline(conversion, train[0])
    writer = RowWriter(conversion, folder)
    if not conversion.is_given("model_name_or_path"):
        raise conversion.refuse("model_name_or_path", "no model is named", "name one")
    local = conversion.path(str(given["model_name_or_path"]))
    conversion.set("model", str(local if local.is_dir() else given["model_name_or_path"]), "model_name_or_path")
    _datasets(conversion, writer, train)
    _losses(conversion, shape)
    convert_keys(conversion, _HANDLERS, _TAKEN)
    if conversion.pipeline == "finetune_lora":
        conversion.set("lora_alpha", conversion.value("lora_alpha"), "lora_alpha")
        if not conversion.is_given("lora_target_modules"):
            conversion.set("lora_targets", _PEFT_TARGETS, why="peft's default for Llama and Qwen; all-linear takes all")
        conversion.note("lora_target_modules", "differs", MARKS)
    return conversion, writer


def _files(conversion: Conversion, split: str) -> Iterator[Path]:
    """Local files of the data sets, those of one split where folders have several.

    Raises:
        UserError: a name of a hub, or a file of an unknown kind.
    """
    described = conversion.value("datasets") or [{"path": conversion.value("dataset_name")}]
    for one in described if isinstance(described, list) else [described]:
        if not isinstance(one, dict) or not one.get("path"):
            continue
        names = one.get("data_files") or []
        if isinstance(names, dict):
            names = names.get(split, [])
        key = "datasets" if conversion.is_given("datasets") else "dataset_name"
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise conversion.refuse(key, "data_files are neither a name nor a list of names", "name files of rows")
        if one.get("fraction") is not None:
            conversion.note("datasets", "missing", "fraction: make files of the sizes that you want")
        folder = Path() if one["path"] in _BUILDERS else conversion.path(str(one["path"]))
        paths = [conversion.path(str(name)) if one["path"] in _BUILDERS else folder / str(name)
                 for name in names]  # fmt: skip
        if not names and folder.is_dir():
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
            paths = [path for path in found if split in path.stem.lower()] or (found if split == "train" else [])
        elif not names:
            paths = [folder]
        for path in paths:
            if not path.is_file() or path.suffix.lower() not in SUFFIXES:
                remedy = "download it (hf download --repo-type dataset NAME --local-dir FOLDER), and name the folder"
                raise conversion.refuse(key, f"{path} is no file of rows here, and nothing is fetched", remedy)
            yield path


def _pipeline(conversion: Conversion, file: Path) -> tuple[str, str]:
    """The pipeline, and the shape of the rows: text, pairs or messages."""
    if file.suffix.lower() == ".txt":
        shape = "text"
    else:
        _, row = next(read_records(file))
        text = conversion.value("dataset_text_field")
        shape = "messages" if "messages" in row or "conversations" in row else "text" if text in row else "pairs"
    adapter = bool(conversion.value("use_peft"))
    if shape == "text" and adapter:
        raise conversion.refuse("use_peft", f"{file} holds texts, and adapters are not pretrained here",
                                "leave use_peft out, or bring questions and answers")  # fmt: skip
    return "pretrain" if shape == "text" else "finetune_lora" if adapter else "finetune", shape


def _datasets(conversion: Conversion, writer: RowWriter, train: list[Path]) -> None:
    column = str(conversion.value("dataset_text_field")) if conversion.pipeline == "pretrain" else None
    read = partial(_read, column=column)
    key = "datasets" if conversion.is_given("datasets") else "dataset_name"
    sources = [RowFile(path.stem, path, read, text_column=column) for path in train]
    conversion.set("train_files", writer.paths(sources), key)
    if column and column != "text":
        conversion.set("text_column", column, "dataset_text_field")
    valid: list[str] = []
    if str(conversion.value("eval_strategy")) not in ("no", "False") and not conversion.value("test_split_size"):
        found = [path for path in _files(conversion, str(conversion.value("dataset_test_split"))) if path not in train]
        valid = writer.paths([RowFile(f"test_{path.stem}", path, read, text_column=column) for path in found])
    hold_out(conversion, writer, valid, "dataset_test_split", "test_split_size")
    if conversion.is_given("dataset_config"):
        conversion.note("dataset_config", "differs", "it chooses among the data of a hub; check train_files")


def _read(record: Record, column: str | None) -> Record | None:
    """The shapes of TRL are among those that are read here."""
    if column is None:
        return record
    return {column: record[column]} if record.get(column) else None


def _losses(conversion: Conversion, shape: str) -> None:
    """By default, TRL trains all tokens of messages, and the completions alone of pairs."""
    for key in ("assistant_only_loss", "completion_only_loss"):
        if conversion.is_given(key) and conversion.given[key]:
            conversion.note(key, "same", "answers alone are trained")
    if shape == "messages" and not conversion.value("assistant_only_loss"):
        conversion.note("assistant_only_loss", "missing", PROMPTS)
    if shape == "pairs" and conversion.given.get("completion_only_loss") is False:
        conversion.note("completion_only_loss", "missing", PROMPTS)


def _precision(conversion: Conversion) -> None:
    """bf16 unless something else is said."""
    if conversion.value("fp16") and not conversion.is_given("bf16"):
        conversion.set("precision", "fp16", "fp16")
    else:
        precision(conversion)


def _targets(conversion: Conversion) -> None:
    if conversion.is_given("lora_target_modules"):
        lora_targets("lora_target_modules", "all-linear")(conversion)


def _quantization(conversion: Conversion) -> None:
    if conversion.value("load_in_4bit") and conversion.pipeline == "finetune_lora":
        conversion.set("qlora", True, "load_in_4bit")
    elif conversion.value("load_in_4bit"):
        conversion.note("load_in_4bit", "missing", QLORA)


def _checkpointing(conversion: Conversion) -> None:
    value = bool(conversion.value("gradient_checkpointing"))
    conversion.set("activation_checkpointing", value, "gradient_checkpointing")


def _truncation(conversion: Conversion) -> None:
    if conversion.pipeline == "pretrain":
        conversion.note("truncation_mode", "differs", "text that does not fit goes on in the next block")
    elif conversion.value("truncation_mode") == "keep_start":
        split = conversion.value("packing") and conversion.value("packing_strategy") in ("bfd_split", "bfd-requeue")
        conversion.set("overlong", "split" if split else "truncate", "packing_strategy" if split else "truncation_mode")
    else:
        conversion.set("overlong", "refuse", "truncation_mode")
        conversion.note("truncation_mode", "differs", "beginnings are not cut off here: longer rows stop the run")


def _packing(conversion: Conversion) -> None:
    """Whole rows in packs, which see nothing of each other."""
    if "packing" not in conversion.settings:
        conversion.set("packing", bool(conversion.value("packing")), "packing")
    if conversion.value("packing") and conversion.given.get("packing_strategy") == "wrapped":
        conversion.note("packing_strategy", "differs", "rows are packed whole here, and see nothing of each other")


def _dtype(conversion: Conversion) -> None:
    if conversion.is_given("dtype") and conversion.value("dtype") not in ("float32", "auto"):
        conversion.note("dtype", "differs", "weights that train are fp32 here; precision says how it is computed")


_HANDLERS = {
    **dict.fromkeys(("bf16", "fp16"), _precision),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), warmup),
    **dict.fromkeys(("packing", "packing_strategy"), _packing),
    "report_to": trackers,
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "attn_implementation": attention(_ATTENTION),
    "truncation_mode": _truncation,
    "lora_target_modules": _targets,
    "load_in_4bit": _quantization,
    "gradient_checkpointing": _checkpointing,
    "deepspeed": deepspeed,
    "output_dir": output_dir,
    "overwrite_output_dir": overwrite,
    "resume_from_checkpoint": resume,
}
