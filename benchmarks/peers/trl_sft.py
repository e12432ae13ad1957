"""Train with TRL's SFTTrainer: python trl_sft.py TASK.json, run by train_throughput.py under TRL's interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
from step_recorder import StepRecorder, training_options
from trl import SFTConfig, SFTTrainer

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
rows = [json.loads(line) for line in Path(task["pairs_file"]).read_bytes().splitlines()]
config = SFTConfig(
    **training_options(task),
    packing=task["packing"],
    packing_strategy="bfd",
    max_length=task["max_length"],
    model_init_kwargs={"dtype": "float32", "attn_implementation": task["attention"]},
)
trainer = SFTTrainer(
    model=task["model"],
    args=config,
    train_dataset=datasets.Dataset.from_list(rows),
    callbacks=[StepRecorder(Path(task["result_file"]), task["warmup_steps"])],
)
trainer.train()
