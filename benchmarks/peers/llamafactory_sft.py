"""Train with LLaMA-Factory: python llamafactory_sft.py TASK.json, run by train_throughput.py under its interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llamafactory.train.tuner import run_exp
from step_recorder import StepRecorder, training_options

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
options = training_options(task)
# Its own switch; the one of transformers is ignored.
options["disable_gradient_checkpointing"] = not options.pop("gradient_checkpointing")
run_exp(
    {
        **options,
        "stage": "sft",
        "finetuning_type": "full",
        "do_train": True,
        "model_name_or_path": task["model"],
        "flash_attn": "fa2" if task["attention"] == "flash_attention_2" else task["attention"],
        "dataset_dir": task["dataset_dir"],
        "dataset": task["dataset"],
        "template": "qwen3_nothink",  # ChatML without a system message of its own
        "cutoff_len": task["max_length"],
        "packing": task["packing"],
        "neat_packing": task["packing"],
        "overwrite_cache": True,
    },
    callbacks=[StepRecorder(Path(task["result_file"]), task["warmup_steps"])],
)
