"""Make what all contenders train: python prepare.py REQUEST.json RESULT.json, run by train_throughput.py.

Writes into the request's folder: model/ (random weights, with the tokenizer), rows.jsonl (messages), pairs.jsonl (the
same as prompt and completion), valid.jsonl (one row) and dataset_info.json (LLaMA-Factory's note of rows.jsonl).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from dataset.readers import read_conversation_rows
from novelgpt.model.tiny_random import build_tiny_random
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation
from novelgpt.text.templates import CHATML_TEMPLATE, use_template

SEED = 42


def main() -> None:
    """Write everything, and what it is as the result."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(request["folder"])
    tokenizer = shared_tokenizer(request["tokenizer"], folder)
    rows, left_out = shared_rows(Path(request["rows"]), tokenizer, request["max_length"])
    write_rows(folder, [messages for messages, _ in rows])
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**request["config"])
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    layers = sum(
        weights.numel() for name, weights in model.named_parameters() if ".layers." in name and weights.ndim > 1
    )
    encoded = [row for _, row in rows]
    facts = {
        "weights": model.num_parameters(),
        "layer_weights": layers,
        "head_weights": model.get_output_embeddings().weight.numel(),
        "rows": len(rows),
        "left_out": left_out,
        "tokens_per_row": sum(len(row.input_ids) for row in encoded) / len(rows),
        "trained_per_row": sum(label != IGNORE_INDEX for row in encoded for label in row.labels) / len(rows),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    Path(sys.argv[2]).write_text(json.dumps(facts), encoding="utf-8")


def shared_tokenizer(name: str | None, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with plain ChatML and padding on the right, which all contenders can render alike."""
    if name is None:
        build_tiny_random(folder / "tiny-random")
        name = str(folder / "tiny-random")
    tokenizer = load_tokenizer(ModelArguments(name))
    if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        sys.exit(f"{name} has no ChatML marks, and LLaMA-Factory renders fixed templates only")
    use_template(tokenizer, "chatml", CHATML_TEMPLATE)
    tokenizer.padding_side = "right"
    return tokenizer


def shared_rows(
    file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[tuple[list[dict[str, str]], EncodedRow]], int]:
    """Rows of one answer and at most `max_length` tokens, which no contender cuts; and the number of the others."""
    rows = []
    read = 0
    for row in read_conversation_rows(file):
        read += 1
        messages = row["messages"]
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            continue
        if len(messages) == 2 or (len(messages) == 3 and messages[0]["role"] == "system"):
            encoded = encode_conversation(messages, tokenizer)[0]
            if len(encoded.input_ids) <= max_length:
                rows.append((messages, encoded))
    if not rows:
        sys.exit(f"{file} holds no row of one question and one answer within {max_length} tokens")
    return rows, read - len(rows)


def write_rows(folder: Path, rows: list[list[dict[str, str]]]) -> None:
    """The rows in the form that each contender reads."""
    whole = [{"messages": messages} for messages in rows]
    pairs = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows]
    for name, records in (("rows", whole), ("pairs", pairs), ("valid", whole[:1])):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {f"{role}_tag": role for role in ("user", "assistant", "system")}
    columns = {"messages": "messages"}
    info: dict[str, Any] = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": info}), encoding="utf-8")


if __name__ == "__main__":
    main()
