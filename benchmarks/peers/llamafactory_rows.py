"""Prepare rows with LLaMA-Factory: python llamafactory_rows.py TASK.json, run by rows_at_scale.py under its Python."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
model_args, data_args, training_args, _, _ = get_train_args(
    {
        "stage": "sft",
        "finetuning_type": "full",
        "do_train": True,
        "output_dir": task["output_dir"],
        "model_name_or_path": task["model"],
        "dataset_dir": task["dataset_dir"],
        "dataset": task["dataset"],
        "template": "qwen3_nothink",  # ChatML without a system message of its own
        "cutoff_len": task["max_length"],
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": task["workers"],
        "report_to": "none",
        "use_cpu": True,
    }
)
start = time.perf_counter()
tokenizer = load_tokenizer(model_args)["tokenizer"]
template = get_template_and_fix_tokenizer(tokenizer, data_args)
prepared = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)
seconds = time.perf_counter() - start
result = {"seconds": seconds, "packs": len(prepared["train_dataset"]), "tool": "LLaMA-Factory"}
Path(task["result_file"]).write_text(json.dumps(result), encoding="utf-8")
