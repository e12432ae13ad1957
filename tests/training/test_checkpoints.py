"""Order, randomness, folders and weights of checkpoints, each on its own; whole runs are in tests/faults."""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import save_file

from novelgpt.settings.errors import UserError
from novelgpt.training.checkpoints.folders import (
    checkpoints,
    damage,
    delete_old,
    describe_files,
    files_in,
    finish,
    unfinished_folder,
)
from novelgpt.training.checkpoints.sampling import EpochRows, ShuffledRows, seed_step
from novelgpt.training.checkpoints.weights import check_weights
from novelgpt.training.run_identity import changes


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_rows_come_in_the_order_of_the_stock_trainer(rows: int, epoch: int) -> None:
    stock = SeedableRandomSampler(range(rows), data_seed=42, generator=torch.Generator())
    stock.set_epoch(epoch)
    order = ShuffledRows(rows, 42)
    order.epoch = epoch
    assert list(order) == list(stock)


@pytest.mark.parametrize("skipped", [0, 1, 65_535, 65_536, 65_537, 150_000, 200_000])
def test_what_is_skipped_leaves_the_rest_of_the_epoch_in_its_place(skipped: int) -> None:
    whole = ShuffledRows(200_000, 1)
    rest = ShuffledRows(200_000, 1)
    rest.skipped = skipped
    found = list(rest)
    assert found[skipped:] == list(whole)[skipped:]
    assert len(found) == len(whole)
    assert found[:1000] == list(whole)[:1000]  # accelerate fills the last batch up with the first rows


def test_rows_without_an_end_go_on_from_one_epoch_to_the_next() -> None:
    order = EpochRows(5)
    taken = list(order)
    order.epoch = 1
    assert taken + list(order) == list(range(10))
    order.skipped = 2
    assert list(order)[2:] == [7, 8, 9]


def test_a_steps_draws_follow_from_seed_rank_and_step() -> None:
    def draws(seed: int, rank: int, step: int) -> tuple[Any, ...]:
        torch.rand(step + 3)  # what was drawn before makes no difference
        seed_step(seed, rank, step)
        return torch.rand(4).tolist(), numpy.random.rand(2).tolist(), random.random()

    assert draws(1, 0, 5) == draws(1, 0, 5)
    others = [draws(1, 0, 6), draws(1, 1, 5), draws(2, 0, 5)]
    assert draws(1, 0, 5) not in others
    assert len({json.dumps(one) for one in others}) == 3


def write_checkpoint(run_folder: Path, step: int) -> Path:
    folder = run_folder / f"checkpoint-{step}"
    unfinished = unfinished_folder(folder)
    unfinished.mkdir(parents=True)
    (unfinished / "weights").write_text(str(step))
    finish(folder, describe_files(unfinished, files_in(unfinished)), step)
    return folder


def test_the_last_and_the_best_checkpoint_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        newest = write_checkpoint(tmp_path, step)
        delete_old(tmp_path, newest, str(tmp_path / "checkpoint-2") if step > 1 else None, 2)
        assert damage(newest) is None
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    delete_old(tmp_path, newest, str(tmp_path / "checkpoint-2"), 1)
    assert len(checkpoints(tmp_path)) == 2


def test_a_checkpoint_of_the_same_step_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 4) / "weights").write_text("changed")
    folder = write_checkpoint(tmp_path, 4)
    assert damage(folder) is None
    assert (folder / "weights").read_text() == "4"


HALVES = {"model.q.lora_A.weight": torch.ones(2, 3), "model.q.lora_B.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("tensors", "moved", "cause"),
    [
        ({}, True, "no tensor was written"),
        (HALVES | {"model.q.lora_B.weight": torch.zeros(0, 2)}, True, "are empty: model.q.lora_B.weight"),
        ({"model.q.lora_A.weight": torch.ones(2, 3)}, True, "lack 1 of 2 tensors: model.q.lora_B.weight"),
        (HALVES | {"model.q.lora_A.weight": torch.tensor([[1.0, float("nan")]])}, True, "not finite: model.q.lora_A"),
        (HALVES | {"model.q.lora_B.weight": torch.zeros(3, 2)}, True, "an adapter that does nothing"),
        (HALVES | {"model.q.lora_B.weight": torch.zeros(3, 2)}, False, None),
        (HALVES, True, None),
    ],
)
def test_weights_are_looked_at_after_they_are_written(
    tensors: dict[str, torch.Tensor], moved: bool, cause: str | None, tmp_path: Path
) -> None:
    if tensors:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    expected = dict.fromkeys(HALVES, 0)
    if cause is None:
        check_weights(tmp_path, expected, moved)
        return
    with pytest.raises(UserError, match=cause.replace("(", r"\(")):
        check_weights(tmp_path, expected, moved)


def test_a_model_stored_under_other_names_is_whole_when_its_elements_add_up(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(6)}, tmp_path / "model.safetensors")
    check_weights(tmp_path, {"joined": 10}, True)
    with pytest.raises(UserError, match="lack 1 of 1 tensors: joined"):
        check_weights(tmp_path, {"joined": 11}, True)


def description(**training: Any) -> dict[str, Any]:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "seed": 1}
    return {
        "pipeline": "finetune",
        "model": "base",
        "model_identity": {"config.json": "1"},
        "processes": 1,
        "arguments": {"training": settings | training, "data": {"max_length": 64, "train_files": ["a.jsonl"]}},
        "data_sha256": {"a.jsonl": "00"},
    }


def test_what_changed_between_two_runs_is_named() -> None:
    before = description()
    assert changes(before, description()) == []
    # As many rows per step, on two processes; files elsewhere with the same content; other places to log and save.
    moved = description(per_device_train_batch_size=2, logging_steps=7) | {"processes": 2, "data_sha256": {"b": "00"}}
    assert changes(before, moved) == []
    assert changes(before, description(seed=2)) == ["seed (1, now 2)"]
    assert changes(before, description(per_device_train_batch_size=2)) == ["rows per step (8, now 4)"]
    assert changes(before, description() | {"data_sha256": {"data/a.jsonl": "01"}}) == ["the content of a.jsonl"]
    assert changes(before, description() | {"model_identity": {"config.json": "2"}})[0].startswith("the model (base,")
    longer = description()
    longer["arguments"]["data"]["max_length"] = 128
    assert changes(before, longer) == ["max_length (64, now 128)"]
    assert changes(before, description() | {"pipeline": "pretrain"}) == ["the pipeline was finetune"]
    short = {name: value for name, value in before.items() if name not in ("model", "processes")}
    assert changes(short, description()) == ["its run.json lacks model, processes"]
