"""Weights in parts among processes (ZeRO-3) give the losses of whole ones, in training and in every evaluation.

Started as a script, this file is the one process that holds the parts.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from novelgpt.model.baichuan import BaichuanForCausalLM, NormHead
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.deepspeed_settings import disable_unused_build
from tests.model.original_checkpoints import Position, write_original_baichuan
from tests.ranks import ZERO_3, run_ranks
from tests.rounding import LOSS_TOLERANCE

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33], [8, 2, 30, 30, 7, 12, 51, 40]])
STEPS = 2
TRAINED, ITEMS = 14, 16
POSITIONS: list[Position] = ["rope", "alibi"]
LOSSES = ["own", "chunked"]


def events(model: Any, engine: Any) -> list[float]:
    """Losses of evaluation, training and evaluation again, with steps between; `engine` is what trains the model."""
    losses = []
    for _ in range(STEPS):
        engine.eval()
        with torch.no_grad():
            losses += [engine(input_ids=IDS, labels=IDS).loss.item() for _ in range(3)]
        engine.train()
        loss = engine(input_ids=IDS, labels=IDS, num_items_in_batch=ITEMS).loss
        losses.append(loss.item())
        model.backward(loss)
        model.step()
    return losses


class OneProcess:
    """What DeepSpeed's engine does, for whole weights."""

    def __init__(self, model: BaichuanForCausalLM) -> None:
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def load(folder: Path) -> BaichuanForCausalLM:
    return BaichuanForCausalLM.from_pretrained(folder, attn_implementation="packed", dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a base for each kind of positions, and what the process with weights in parts made of them."""
    path: Path = tmp_path_factory.mktemp("zero3")
    for position in POSITIONS:
        write_original_baichuan(path / position, position, norm_head=True, golden=True, vocab_size=64)
    run_ranks(__file__, str(path), logs=path, processes=1)
    return path


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_those_of_whole_weights(position: Position, kind: str, folder: Path) -> None:
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))[f"{position}, {kind}"]
    model = load(folder / position)
    expected = events(OneProcess(model), model)
    assert losses[:4] == pytest.approx(expected[:4], rel=LOSS_TOLERANCE)
    # AdamW's first step goes by signs of gradients, of which the smallest are rounding.
    assert losses[4:] == pytest.approx(expected[4:], abs=1e-4)
    for begin in (0, 4):
        before, *_, training = losses[begin : begin + 4]
        assert losses[begin : begin + 3] == [before] * 3
        assert training == pytest.approx(before * TRAINED / ITEMS, rel=LOSS_TOLERANCE)
    assert losses[4] < losses[0] - 0.1


def test_resizing_keeps_the_head(folder: Path) -> None:
    made = json.loads((folder / "resized.json").read_text(encoding="utf-8"))
    assert made["head"] == "NormHead" and made["logits"] == 70
    assert made["rows"] == load(folder / POSITIONS[0]).lm_head.weight.tolist()


def main(folder: Path) -> None:
    """Load into parts, train, and resize."""
    import deepspeed  # slow to import, and for this process alone
    from transformers.integrations import HfDeepSpeedConfig

    disable_unused_build()
    deepspeed.init_distributed("gloo")
    held = HfDeepSpeedConfig(copy.deepcopy(ZERO_3))
    losses = {}
    for position in POSITIONS:
        for kind in LOSSES:
            model = load(folder / position)
            assert isinstance(model.lm_head, NormHead) and model.lm_head.weight.numel() == 0  # in parts, from the start
            if kind == "chunked":
                attach_chunked_loss(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(ZERO_3))
            losses[f"{position}, {kind}"] = events(engine, engine)
            engine.destroy()
    (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    resized = load(folder / POSITIONS[0])
    resized.resize_token_embeddings(70, mean_resizing=False)
    head = resized.lm_head
    made = {"head": type(head).__name__, "logits": head.out_features, "rows": head.weight[:64].tolist()}
    (folder / "resized.json").write_text(json.dumps(made), encoding="utf-8")
    del held
    sys.stdout.flush()
    os._exit(0)  # threads of process groups and engines do not always end in peace


if __name__ == "__main__":
    main(Path(sys.argv[1]))
