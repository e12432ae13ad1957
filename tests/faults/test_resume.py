"""Stopped after a step and gone on with: the same rows, figures and weights, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import Runs
from tests.faults.runs import ROOT, Command, Started, assert_same, complete, figures, interrupted

# An epoch has 5 steps on one rank and 3 on two, the last of them of fewer micro-batches.
STOPS = {"finetune": [2, 5, 6], "data parallel": [2, 3], "zero3": [1, 3, 5]}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_stopped_and_gone_on_with_is_the_same(name: str, runs: Runs, tmp_path: Path) -> None:
    undisturbed = runs.undisturbed(name)
    folder = tmp_path / "run"
    for step in STOPS[name]:
        interrupted(undisturbed.command, folder, f"checkpoint-{step}")
    complete(undisturbed.command, folder, tmp_path / "logs")
    assert_same(folder, undisturbed.folder)


@pytest.mark.slow
def test_from_two_ranks_to_one_and_back(runs: Runs, tmp_path: Path) -> None:
    """The rows of a step are the same, so its loss is but for the order of sums."""
    both, alone = runs.on_two, runs.on_one
    complete(alone, tmp_path / "alone", tmp_path / "logs")
    expected = figures(tmp_path / "alone")
    folder = tmp_path / "run"
    interrupted(both, folder, "checkpoint-1")
    interrupted(alone, folder, "checkpoint-3")
    complete(both, folder, tmp_path / "logs")
    found = figures(folder)
    assert found.keys() == expected.keys()
    for (step, name), values in expected.items():
        if name in ("loss", "eval_loss", "learning_rate"):
            assert max(found[step, name]) == pytest.approx(max(values), abs=1e-5), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["finetune", "finetune_lora"])
def test_weights_that_would_be_empty_fail_the_save(pipeline: str, runs: Runs, tmp_path: Path) -> None:
    """ZeRO-3 that is told not to gather what it saves."""
    zero3 = json.loads((ROOT / "scripts" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    zero3["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(zero3), encoding="utf-8")
    command = runs.commands["zero3"]
    words = (*command.words, "--deepspeed", str(tmp_path / "zero3.json"))
    started = Started(
        Command(pipeline, words, ranks=2, variables=command.variables), tmp_path / "run", tmp_path / "logs"
    )
    assert started.statuses() == [2, 2], started.output()[-4000:]
    output = started.output()
    said = [line for line in output.splitlines() if line.startswith(("error:", "  fix:"))]
    assert len(said) == 2 and "stage3_gather_16bit_weights_on_model_save" in "".join(said), output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not list((tmp_path / "run").glob("*.safetensors"))
