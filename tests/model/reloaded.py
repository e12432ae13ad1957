"""A process without this toolkit: what transformers alone makes of a folder.

    python reloaded.py FOLDER …

Prints {folder: [sha256 of the weights as transformers loads them, generated ids]} in JSON.
"""

import hashlib
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "海上"
NEW_TOKENS = 8


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Of names and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def weights_hash(model: torch.nn.Module) -> str:
    """Of all weights of a model."""
    return tensors_hash(model.state_dict())


def answer(folder: str) -> tuple[str, list[int]]:
    """The weights' hash, and what the model writes behind the prompt."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return weights_hash(model), written[0].tolist()


if __name__ == "__main__":
    found = {folder: answer(folder) for folder in sys.argv[1:]}
    assert not any(name.split(".")[0] in ("novelgpt", "dataset", "pretrain") for name in sys.modules)
    print(json.dumps(found))
