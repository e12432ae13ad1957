"""Prepare rows with TRL: python trl_rows.py TASK.json, run by rows_at_scale.py under TRL's Python."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import datasets
from trl import SFTConfig, SFTTrainer

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
config = SFTConfig(
    output_dir=task["output_dir"],
    packing=True,
    packing_strategy="bfd",
    max_length=task["max_length"],
    dataset_num_proc=task["workers"],
    report_to="none",
    use_cpu=True,
    bf16=False,
)
start = time.perf_counter()
trainer = SFTTrainer(
    model=task["model"],
    args=config,
    train_dataset=datasets.load_dataset("json", data_files=task["pairs_file"], split="train"),
)
seconds = time.perf_counter() - start
result = {"seconds": seconds, "packs": len(trainer.train_dataset), "tool": "TRL"}
Path(task["result_file"]).write_text(json.dumps(result), encoding="utf-8")
