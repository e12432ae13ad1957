"""kill -9 at 25 random moments: the same command goes on, and ends with the weights of a run that nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.conftest import Runs
from tests.faults.kills import Aim, kill_again_and_again
from tests.faults.runs import assert_same

AIMS = {
    "pretrain": [
        Aim("start"), Aim("window"), Aim("save"), Aim("unfinished"), Aim("time"), Aim("epoch"), Aim("evaluate"),
        Aim("final"),
    ],
    "finetune": [Aim("save"), Aim("window"), Aim("unfinished"), Aim("step"), Aim("epoch"), Aim("final")],
    "lora": [Aim("unfinished"), Aim("window"), Aim("save"), Aim("time"), Aim("final")],
    "zero2": [
        Aim("start"), Aim("window", alone=True), Aim("unfinished"), Aim("save", alone=True), Aim("evaluate"),
        Aim("final", alone=True),
    ],
}  # fmt: skip
assert sum(map(len, AIMS.values())) == 25
# Of these, what the default tier tries: one that no other kill precedes, those around a save, and the end.
FEW = {
    "pretrain": [Aim("start"), Aim("unfinished"), Aim("time"), Aim("final")],
    "zero2": [Aim("window", alone=True), Aim("unfinished"), Aim("save", alone=True)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_killed_at_a_few_moments_it_ends_the_same(
    name: str, runs: Runs, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    check_killed(name, FEW[name], runs, tmp_path, pytestconfig)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", AIMS)
def test_killed_at_any_moment_it_ends_the_same(
    name: str, runs: Runs, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    check_killed(name, AIMS[name], runs, tmp_path, pytestconfig)


def check_killed(name: str, aims: list[Aim], runs: Runs, place: Path, pytestconfig: pytest.Config) -> None:
    """Kill the run at moments of these kinds, and compare each of its folders with that of the undisturbed run."""
    seed = pytestconfig.getoption("seed")
    print(f"seed of the moments: {seed}")
    undisturbed = runs.undisturbed(name)
    draw = random.Random(f"{seed} {name}")
    kills, folders = kill_again_and_again(undisturbed.command, place, aims, draw, undisturbed.seconds)
    for folder in folders:
        assert_same(folder, undisturbed.folder)
    assert [kill.aim for kill in kills] == aims
    halfway = [kill for kill in kills if any(name.startswith("checkpoint-") for name in kill.unfinished)]
    assert halfway, "no checkpoint was being written at any of the kills"
