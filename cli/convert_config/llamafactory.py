"""Settings of `llamafactory-cli train`, as llamafactory 0.9.5 reads them (hparams/*.py)."""

from __future__ import annotations

from cli.convert_config.conversion import TEMPLATE, Conversion, Peer, attention, quantization
from cli.convert_config.llamafactory_data import dataset_files
from cli.convert_config.rows import convert_file, hold_out
from novelgpt.settings.peer_names import ANSWERS_ONLY
from novelgpt.settings.remedies import as_typed, pipeline_name

# Formats that the tokenizer's own template, or Baichuan's here, writes as well; others are named with a warning.
_TEMPLATES = ("qwen", "qwen3_nothink", "qwen3_5_nothink", "baichuan", "baichuan2", "chatml")
_REASONING_TEMPLATES = ("qwen3", "qwen3_5")
THINKING = (
    "each answer decides: one with a thought is prompted with thinking on; without one, the empty thought is part of "
    "the prompt and not trained"
)


def _pipeline(conversion: Conversion) -> str:
    if conversion.value("do_train") is False:
        raise conversion.refuse("do_train", "it trains nothing", f"answer rows with {pipeline_name('predict')}")
    stage, method = str(conversion.value("stage")), str(conversion.value("finetuning_type"))
    if stage not in ("sft", "pt"):
        remedy = "train it with LLaMA-Factory or TRL; here are pretraining, full and LoRA fine-tuning on answers"
        raise conversion.refuse("stage", "there is no such training here", remedy)
    if method not in ("lora", "full"):
        raise conversion.refuse("finetuning_type", "not supported here", "finetuning_type: lora, or full")
    if (stage, method) == ("pt", "lora"):
        raise conversion.refuse("stage", "adapters are not pretrained here", "finetuning_type: full, or stage: sft")
    if conversion.is_given("adapter_name_or_path"):
        raise conversion.refuse(
            "adapter_name_or_path", "training starts from a base, and makes a new adapter",
            as_typed("merge it first: `finetune_lora.merge ADAPTER FOLDER`; then model_name_or_path: FOLDER"),
        )  # fmt: skip
    return "pretrain" if stage == "pt" else "finetune_lora" if method == "lora" else "finetune"


def _datasets(conversion: Conversion) -> None:
    folder = conversion.value("dataset_dir")
    sources = dataset_files(conversion, "dataset", folder)
    if not sources:
        raise conversion.refuse("dataset", "no dataset is named", "name one of dataset_info.json")
    columns = {source.text_column for source in sources if source.file.suffix.lower() != ".txt"} - {None}
    if len(columns) > 1:
        named = " and ".join(sorted(map(str, columns)))
        raise conversion.refuse("dataset", f"their texts are in {named}", "give the column one name")
    paths = [convert_file(conversion, source) for source in sources]
    conversion.set("train_files", paths, "dataset", why=f"by {conversion.path(folder) / 'dataset_info.json'}")
    if columns - {"text"}:
        conversion.set("text_column", columns.pop(), why="columns: prompt, in dataset_info.json")
    valid = [convert_file(conversion, source) for source in dataset_files(conversion, "eval_dataset", folder)]
    if conversion.is_given("mask_history") and conversion.pipeline != "pretrain":
        conversion.set("mask_history", bool(conversion.value("mask_history")), "mask_history")
    if conversion.pipeline == "pretrain" and any(source.file.suffix.lower() == ".txt" for source in sources):
        text = "LLaMA-Factory takes each line of a .txt as a separate text; here the file is one text"
        conversion.note("dataset", "differs", text)
    hold_out(conversion, valid, "eval_dataset", "val_size")


def _packing(conversion: Conversion, _: str) -> None:
    if "packing" in conversion.settings:
        return
    neat, packing = conversion.value("neat_packing"), conversion.value("packing")
    if conversion.pipeline == "pretrain" and not neat and conversion.given.get("packing") is None:
        conversion.set("packing", True, why="stage: pt packs by default")
    else:
        conversion.set("packing", bool(neat or packing), "neat_packing" if neat else "packing")
    if conversion.settings["packing"] and not neat:
        conversion.note(
            "packing", "differs", "documents of a pack never attend to each other here, as with neat_packing"
        )


def _template(conversion: Conversion, key: str) -> None:
    if conversion.pipeline == "pretrain" or not conversion.is_given(key):
        return
    if conversion.value(key) in _REASONING_TEMPLATES:
        conversion.note(key, "differs", THINKING)
    elif conversion.value(key) in _TEMPLATES:
        conversion.note(key, "same", "the tokenizer's own chat template (Baichuan's format where it has none)")
    else:
        conversion.note(key, "differs", as_typed(TEMPLATE))


def _cutoff(conversion: Conversion, key: str) -> None:
    conversion.set("max_length", conversion.value(key), key)
    if conversion.pipeline != "pretrain":
        conversion.set("overlong", "truncate", why="LLaMA-Factory cuts rows to cutoff_len")
        text = (
            "LLaMA-Factory truncates question and answer of a longer row in proportion, and here the row loses its "
            "end; what is cut is counted before training"
        )
        conversion.note(key, "differs", text)


def _train_on_prompt(conversion: Conversion, key: str) -> None:
    if conversion.value(key):
        conversion.note(key, "missing", ANSWERS_ONLY)


LLAMAFACTORY = Peer(
    tool="LLaMA-Factory 0.9.5",
    model_key="model_name_or_path",
    lora_targets=("lora_target", "all"),
    attention={"auto": "", "sdpa": "", "fa2": "flash_attention_2", "disabled": "eager"},
    defaults={
        "stage": "sft", "finetuning_type": "lora", "dataset_dir": "data", "cutoff_len": 2048, "lora_rank": 8,
        "lora_dropout": 0.0, "lora_target": "all", "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
        "bf16": False, "logging_steps": 500, "logging_first_step": False, "eval_strategy": "no",
        "eval_on_start": False, "save_strategy": "steps", "save_steps": 500, "disable_gradient_checkpointing": False,
        "packing": False, "val_size": 0.0, "report_to": "none", "enable_thinking": True, "mix_strategy": "concat",
        "model_revision": "main",
    },
    pipeline=_pipeline,
    datasets=_datasets,
    handlers={
        **dict.fromkeys(("packing", "neat_packing"), _packing),
        **dict.fromkeys(("flash_attn", "attn"), attention),
        "quantization_bit": quantization,
        "cutoff_len": _cutoff,
        "template": _template,
        "train_on_prompt": _train_on_prompt,
    },
    values={
        "disable_gradient_checkpointing": ("activation_checkpointing", lambda off: not off),
        "metric_for_best_model": ("metric_for_best_model", lambda name: str(name).removeprefix("eval_")),
    },
    notes={
        "do_train": ("same", "a pipeline trains"),
        "max_samples": ("same", "the files of train_files hold no more rows than that"),
        "default_system": ("same", "the rows hold it"),
        "max_length": ("same", "it bounds generated answers; cutoff_len bounds rows"),
        "gradient_checkpointing": ("same", "disable_gradient_checkpointing decides in LLaMA-Factory"),
        "enable_thinking": ("differs", THINKING),
    },
    taken=("stage", "finetuning_type", "dataset", "eval_dataset", "dataset_dir", "val_size", "mask_history"),
)  # fmt: skip
