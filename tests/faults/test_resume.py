"""Stopped after a step and gone on with: the same rows, figures and weights, on one rank and on two."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.conftest import Runs
from tests.faults.runs import ROOT, Command, Started, assert_refused, assert_same, complete, figures, interrupted
from tests.faults.training_process import Stop
from tests.rounding import LOSS_TOLERANCE

# An epoch has 5 steps on one rank and 3 on two, the last of them of fewer micro-batches.
STOPS = {
    "finetune": [2, 5], "data parallel": [2, 3], "zero3": [3], "zero3 twice": [3, 4],
    "mix": [2, 8], "mix on two": [2, 4], "stream": [2, 4], "stream on two": [2, 4],
}  # fmt: skip
LONG = ("finetune", "data parallel", "zero3 twice", "mix", "mix on two", "stream", "stream on two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in STOPS]
)
def test_stopped_and_gone_on_with_is_the_same(name: str, runs: Runs, tmp_path: Path) -> None:
    undisturbed = runs.undisturbed(name.removesuffix(" twice"))
    folder = tmp_path / "run"
    for step in STOPS[name]:
        interrupted(undisturbed.command, folder, f"checkpoint-{step}")
    complete(undisturbed.command, folder, tmp_path / "logs")
    assert_same(folder, undisturbed.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", *(pytest.param(name, marks=pytest.mark.long) for name in ("mix", "stream"))])
def test_from_two_ranks_to_one_and_back(name: str, runs: Runs, tmp_path: Path) -> None:
    """The rows of a step are the same, so its loss is but for the order of sums."""
    both, alone = runs.on_two[name], runs.on_one[name]
    complete(alone, tmp_path / "alone", tmp_path / "logs")
    expected = figures(tmp_path / "alone")
    folder = tmp_path / "run"
    interrupted(both, folder, "checkpoint-1")
    interrupted(alone, folder, "checkpoint-3")
    complete(both, folder, tmp_path / "logs")
    found = figures(folder)
    assert found.keys() == expected.keys()
    for (step, figure), values in expected.items():
        if figure in ("loss", "eval_loss", "learning_rate"):
            assert max(found[step, figure]) == pytest.approx(max(values), rel=LOSS_TOLERANCE), (step, figure)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_signal_while_the_run_folder_is_made_leaves_nothing(count: int, runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = Started(runs.commands["lora"], folder, tmp_path / "logs", Stop("begin", count))
    assert started.wait(lambda: started.stopped(0)), started.output()
    started.signal(signal.SIGINT)
    started.signal(signal.SIGCONT)
    assert started.statuses() == [128 + signal.SIGINT]
    assert started.output().endswith("stopped by SIGINT before the first step\n")
    assert not folder.exists()


def without_gathering(runs: Runs, pipeline: str, place: Path) -> Started:
    """Training under ZeRO-3 that is told not to gather what it saves."""
    zero3 = json.loads((ROOT / "scripts" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    zero3["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (place / "zero3.json").write_text(json.dumps(zero3), encoding="utf-8")
    command = runs.commands["zero3"]
    words = (*command.words, "--deepspeed", str(place / "zero3.json"), "--max_steps", "2")
    return Started(Command(pipeline, words, ranks=2, variables=command.variables), place / "run", place / "logs")


@pytest.mark.slow
def test_weights_that_would_be_empty_fail_the_save(runs: Runs, tmp_path: Path) -> None:
    assert_refused(without_gathering(runs, "finetune", tmp_path), "stage3_gather_16bit_weights_on_model_save")
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.slow
def test_an_adapter_is_gathered_all_the_same(runs: Runs, tmp_path: Path) -> None:
    started = without_gathering(runs, "finetune_lora", tmp_path)
    assert started.statuses() == [0, 0], started.output()[-4000:]
    for folder in (tmp_path / "run", *(tmp_path / "run").glob("checkpoint-*")):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert tensors and all(tensor.numel() for tensor in tensors.values())
        if folder.name != "checkpoint-1":  # whose learning rate was still zero
            assert all(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
