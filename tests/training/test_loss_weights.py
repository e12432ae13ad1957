"""Weights that rows give their answers, from a file to the losses and the evaluation of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from finetune.__main__ import main as finetune
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation

# (question, answer, weight of the answer, weight of the row).
ROWS = [
    ("春天在哪里？", "在山坡上。", 0.25, 1.0), ("谁来了？", "一位老人，带着一封信。", 1.0, 3.0),
    ("几点了？", "天快黑了。", 0.0, 1.0), ("下雨了吗？", "下了一夜。", 1.0, 1.0), ("去哪里？", "去江边。", 2.0, 0.5),
]  # fmt: skip
FIRST = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，我在听。"}]


def conversations() -> list[tuple[dict[str, Any], list[float]]]:
    """Rows of two answers each, with the weights of both."""
    made = []
    for question, answer, weight, of_row in ROWS:
        last = {"role": "assistant", "content": answer, "weight": weight}
        messages = [*FIRST, {"role": "user", "content": question}, last]
        made.append(({"messages": messages, "loss_weight": of_row}, [of_row, weight * of_row]))
    return made


def write(path: Path) -> list[str]:
    rows = [row for row, _ in conversations()]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return ["--train_files", str(path), "--valid_files", str(path)]


def losses_by_hand(base: Path, tokenizer: PreTrainedTokenizerBase, last_only: bool) -> tuple[float, float]:
    """sum(weight x loss) / sum(weight), and the mean loss of all tokens whose weight is not 0."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    losses, weights = [], []
    for row, of_answers in conversations():
        messages = [{name: one[name] for name in ("role", "content")} for one in row["messages"]]
        (encoded,) = encode_conversation(messages, tokenizer)
        labels = torch.tensor(encoded.labels[1:])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1]
        trained = labels != IGNORE_INDEX
        losses.append(functional.cross_entropy(logits, labels, reduction="none")[trained])
        end = labels[trained].tolist().index(labels[trained][-1]) + 1  # of the first answer
        first, second = of_answers
        weights.append(torch.tensor([0.0 if last_only else first] * end + [second] * (int(trained.sum()) - end)))
    loss, weight = torch.cat(losses).double(), torch.cat(weights).double()
    return float((loss * weight).sum() / weight.sum()), float(loss[weight > 0].mean())


@pytest.mark.parametrize(
    ("packing", "mask_history"), [(True, False), pytest.param(False, True, marks=pytest.mark.long)]
)
def test_the_first_loss_of_a_run_is_the_weighted_mean(
    packing: bool, mask_history: bool, base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    words = ["--model", str(base_folder), *write(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run")]
    words += ["--max_steps", "1", "--precision", "fp32", "--stop_check", "0", "--max_length", "128"]
    words += ["--packing", str(packing), "--mask_history", str(mask_history), "--save_strategy", "no"]
    # Windows of more rows than there are: the only one of the epoch is not filled.
    finetune([*words, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    weighted, plain = losses_by_hand(base_folder, tokenizer, mask_history)
    assert abs(weighted - plain) > 1e-3  # else nothing is told
    assert next(entry["loss"] for entry in entries if "loss" in entry) == pytest.approx(weighted, abs=2e-4)
    assert next(entry["eval_loss"] for entry in entries if "eval_loss" in entry) == pytest.approx(plain, abs=2e-4)
