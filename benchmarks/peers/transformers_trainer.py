"""Train with the plain Trainer: python transformers_trainer.py TASK.json, run by train_throughput.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from step_recorder import IGNORE_INDEX, StepRecorder, training_options
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)


def encode(row: dict[str, list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """{"input_ids", "labels"} of a question and its answer, trained on the answer."""
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    context, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :])
    )
    return {"input_ids": context + answer, "labels": [IGNORE_INDEX] * len(context) + answer}


task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(task["model"])
rows = [json.loads(line) for line in Path(task["rows_file"]).read_bytes().splitlines()]
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=torch.float32, attn_implementation=task["attention"]
    ),
    args=TrainingArguments(**training_options(task)),
    train_dataset=[encode(row, tokenizer) for row in rows],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[StepRecorder(Path(task["result_file"]), task["warmup_steps"])],
)
trainer.train()
