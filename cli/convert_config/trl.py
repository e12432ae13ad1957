"""Settings of `trl sft --config`, as TRL 1.16 reads them (trainer/sft_config.py, trainer/model_config.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cli.convert_config.conversion import Conversion, Peer, attention, quantization
from cli.convert_config.rows import RowFile, convert_file, hold_out
from dataset.records import Record, read_records
from novelgpt.settings.peer_names import ANSWERS_ONLY

PROMPTS = f"TRL trains questions, too, where it is off: {ANSWERS_ONLY}"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_BUILDERS = ("json", "csv", "parquet", "text")


def _pipeline(conversion: Conversion) -> str:
    file = next(_files(conversion, str(conversion.value("dataset_train_split"))), None)
    if file is None:
        raise conversion.refuse("dataset_name", "no dataset is named", "name a folder or files of rows")
    adapter = bool(conversion.value("use_peft"))
    if _shape(conversion, file) == "text":
        if adapter:
            raise conversion.refuse("use_peft", f"{file} holds texts, and adapters are not pretrained here",
                                    "leave use_peft out, or bring questions and answers")  # fmt: skip
        return "pretrain"
    return "finetune_lora" if adapter else "finetune"


def _shape(conversion: Conversion, file: Path) -> str:
    """The shape of the rows of a file: "text", "pairs" or "messages"."""
    if file.suffix.lower() == ".txt":
        return "text"
    _, row = next(read_records(file))
    if "messages" in row or "conversations" in row:
        return "messages"
    return "text" if conversion.value("dataset_text_field") in row else "pairs"


def _files(conversion: Conversion, split: str) -> Iterator[Path]:
    """Local files of the datasets, those of one split where folders have several.

    Raises:
        UserError: a hub name, or a file of an unknown kind.
    """
    described = conversion.value("datasets") or [{"path": conversion.value("dataset_name")}]
    key = "datasets" if conversion.is_given("datasets") else "dataset_name"
    for one in described if isinstance(described, list) else [described]:
        if not isinstance(one, dict) or not one.get("path"):
            continue
        names = one.get("data_files") or []
        if isinstance(names, dict):
            names = names.get(split, [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise conversion.refuse(key, "data_files are neither a name nor a list of names", "name files of rows")
        built = one["path"] in _BUILDERS
        folder = Path() if built else conversion.path(str(one["path"]))
        if names:
            paths = [conversion.path(str(name)) if built else folder / str(name) for name in names]
        elif folder.is_dir():
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
            paths = [path for path in found if split in path.stem.lower()] or (found if split == "train" else [])
        else:
            paths = [folder]
        for path in paths:
            if not path.is_file() or path.suffix.lower() not in SUFFIXES:
                remedy = "download it (hf download --repo-type dataset NAME --local-dir FOLDER), and name the folder"
                raise conversion.refuse(key, f"{path} is not a local file of rows, and nothing is downloaded", remedy)
            yield path


def _datasets(conversion: Conversion) -> None:
    train = list(_files(conversion, str(conversion.value("dataset_train_split"))))
    column = str(conversion.value("dataset_text_field")) if conversion.pipeline == "pretrain" else None
    read = partial(_read, column=column)
    key = "datasets" if conversion.is_given("datasets") else "dataset_name"
    sources = [RowFile(path.stem, path, read, text_column=column) for path in train]
    conversion.set("train_files", [convert_file(conversion, source) for source in sources], key)
    if column and column != "text":
        conversion.set("text_column", column, "dataset_text_field")
    sources = []
    if str(conversion.value("eval_strategy")) not in ("no", "False") and not conversion.value("test_split_size"):
        found = [path for path in _files(conversion, str(conversion.value("dataset_test_split"))) if path not in train]
        sources = [RowFile(f"test_{path.stem}", path, read, text_column=column) for path in found]
    valid = [convert_file(conversion, source) for source in sources]
    hold_out(conversion, valid, "dataset_test_split", "test_split_size")
    described = conversion.value("datasets")
    for one in described if isinstance(described, list) else [described]:
        if isinstance(one, dict) and one.get("fraction") is not None:
            conversion.note("datasets", "missing", "fraction: make files of the sizes that you want")
    # By default, TRL trains all tokens of messages, and only the completions of pairs.
    for name in ("assistant_only_loss", "completion_only_loss"):
        if conversion.value(name):
            conversion.note(name, "same", "only answers are trained")
    shape = _shape(conversion, train[0])
    if shape == "messages" and not conversion.value("assistant_only_loss"):
        conversion.note("assistant_only_loss", "missing", PROMPTS)
    if shape == "pairs" and conversion.value("completion_only_loss") is False:
        conversion.note("completion_only_loss", "missing", PROMPTS)


def _read(record: Record, column: str | None) -> Record | None:
    """The shapes of TRL are among those that are read here."""
    if column is None:
        return record
    return {column: record[column]} if record.get(column) else None


def _truncation(conversion: Conversion, key: str) -> None:
    if conversion.pipeline == "pretrain":
        conversion.note(key, "differs", "text that does not fit continues in the next block")
    elif conversion.value(key) == "keep_start":
        split = conversion.value("packing") and conversion.value("packing_strategy") in ("bfd_split", "bfd-requeue")
        conversion.set("overlong", "split" if split else "truncate", "packing_strategy" if split else key)
    else:
        conversion.set("overlong", "refuse", key)
        conversion.note(key, "differs", "rows are not cut at their start here: longer rows stop the run")


def _packing_strategy(conversion: Conversion, key: str) -> None:
    if conversion.value("packing") and conversion.given.get(key) == "wrapped":
        conversion.note(key, "differs", "rows are packed whole here, and never attend to each other")


def _dtype(conversion: Conversion, key: str) -> None:
    if conversion.value(key) not in (None, "float32", "auto"):
        conversion.note(key, "differs", "trained weights are fp32 here; precision sets the format of computations")


def _derived(conversion: Conversion) -> None:
    if conversion.pipeline == "finetune_lora" and "lora_targets" not in conversion.settings:
        # What peft adapts where nothing is named, in Llama, Qwen1.5 to Qwen3 and most models of their shape.
        why = "peft's default for Llama and Qwen; all-linear takes all"
        conversion.set("lora_targets", ["q_proj", "v_proj"], why=why)


TRL = Peer(
    tool="TRL 1.16",
    model_key="model_name_or_path",
    lora_targets=("lora_target_modules", "all-linear"),
    attention={"sdpa": "", "eager": "eager", "flash_attention_2": "flash_attention_2"},
    defaults={
        "use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "max_length": 1024, "packing": False,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
        "learning_rate": 2e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42, "logging_steps": 10, "logging_first_step": False,
        "eval_strategy": "no", "eval_on_start": False, "save_strategy": "steps", "save_steps": 500,
        "gradient_checkpointing": True, "dataset_train_split": "train", "dataset_test_split": "test",
        "dataset_text_field": "text", "report_to": "none", "truncation_mode": "keep_start",
        "packing_strategy": "bfd", "test_split_size": 0.0, "bf16": True,
    },
    pipeline=_pipeline,
    datasets=_datasets,
    handlers={
        **dict.fromkeys(("dtype", "torch_dtype"), _dtype),
        "attn_implementation": attention,
        "load_in_4bit": quantization,
        "truncation_mode": _truncation,
        "packing_strategy": _packing_strategy,
    },
    notes={"dataset_config": ("differs", "it chooses among the data of a hub; check train_files")},
    derived=_derived,
    taken=(
        "use_peft", "dataset_name", "datasets", "dataset_train_split", "dataset_test_split", "test_split_size",
        "dataset_text_field", "assistant_only_loss", "completion_only_loss",
    ),
)  # fmt: skip
