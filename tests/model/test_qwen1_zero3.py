"""An original Qwen v1 whose weights lie in parts among processes (ZeRO-3): the same losses, the same file again.

Started as a script, this file is the one process that holds the parts.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.deepspeed_settings import disable_unused_build
from novelgpt.settings.errors import UserError
from tests.model.original_qwen1 import write_original_qwen1
from tests.ranks import ZERO_3, run_ranks
from tests.rounding import LOSS_TOLERANCE

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33], [8, 2, 30, 30, 7, 12, 51, 40]])
LEFT_OUT = "transformer.h.1.attn.c_attn.bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, one of which lacks a tensor, and what the process with weights in parts made of them."""
    path: Path = tmp_path_factory.mktemp("zero3")
    write_original_qwen1(path / "whole", shards="bin_sharded")
    tensors = write_original_qwen1(path / "lacking")
    del tensors[LEFT_OUT]
    save_file(tensors, path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    run_ranks(__file__, str(path), logs=path, processes=1)
    return path


def test_losses_are_those_of_whole_weights(folder: Path) -> None:
    model = ModelArguments(str(folder / "whole"), allow_pickles=True)
    expected = load_model(model, load_tokenizer(model))(input_ids=IDS, labels=IDS).loss.item()
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    assert losses == pytest.approx([expected] * 4, rel=LOSS_TOLERANCE)


def test_gathered_weights_are_saved_as_they_were(folder: Path) -> None:
    saved = load_file(folder / "saved" / "model.safetensors")
    original = write_original_qwen1(folder / "again")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())


def test_a_tensor_that_is_missing_is_refused(folder: Path) -> None:
    cause = (folder / "cause.txt").read_text(encoding="utf-8")
    assert "3 weights" in cause and "in none of its files: model.layers.1.self_attn.k_proj.bias" in cause


def hold_the_parts(folder: Path) -> None:
    """What the process does that holds the weights in parts."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    disable_unused_build()
    deepspeed.init_distributed(dist_backend="gloo")
    held = HfDeepSpeedConfig(ZERO_3)  # from_pretrained looks for it
    arguments = ModelArguments(str(folder / "whole"), allow_pickles=True)
    tokenizer = load_tokenizer(arguments)
    model = load_model(arguments, tokenizer)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=held.config
    )
    losses = []
    for training in (False, False, False, True):
        engine.train(training)
        with torch.no_grad():
            losses.append(engine(input_ids=IDS, labels=IDS).loss.item())
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        gathered = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(folder / "saved", state_dict=gathered)
    try:
        load_model(ModelArguments(str(folder / "lacking")), tokenizer)
    except UserError as error:
        (folder / "cause.txt").write_text(error.cause, encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads of process groups and engines do not always end in peace


if __name__ == "__main__":
    hold_the_parts(Path(sys.argv[1]))
