"""Train with this toolkit: python novelgpt_finetune.py TASK.json, run by train_throughput.py.

Runs what `python -m finetune WORDS…` runs, with the words that the task holds, and watches it with the instrument that
watches the peers.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import transformers.trainer
from step_recorder import StepRecorder

task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
transformers.trainer.DEFAULT_CALLBACKS.append(StepRecorder(Path(task["result_file"]), task["warmup_steps"]))
sys.argv = ["finetune", *task["words"]]
runpy.run_module("finetune", run_name="__main__", alter_sys=True)
