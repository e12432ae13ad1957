"""A run folder is claimed when it is chosen: what another run is about to use, or has finished, stays its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.faults.conftest import Runs
from tests.faults.runs import Command, Started, assert_refused, complete, files_of, weights
from tests.faults.training_process import Stop

# The first forward pass is that of the estimate of memory: the folder is chosen, the rows are read, nothing is loaded.
LOADING = Stop("train", 1)


def loading(command: Command, folder: Path, logs: Path) -> Started:
    """A run that stands still before it has written anything."""
    started = Started(command, folder, logs, LOADING)
    assert started.wait(lambda: started.stopped(0)), started.output()
    return started


def test_a_folder_that_a_slower_run_has_chosen_is_not_taken(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = loading(runs.commands["lora"], folder, tmp_path / "slow")
    assert_refused(Started(runs.commands["lora"], folder, tmp_path / "fast"), "another process trains into")
    slow.signal(signal.SIGCONT)
    assert slow.statuses() == [0], slow.output()[-4000:]
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_run_that_is_replaced_stays_until_the_other_begins(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    complete(runs.commands["lora"], folder, tmp_path / "first")
    before, trained = files_of(folder), weights(folder)
    command = runs.commands["lora"]
    replacing = Command(command.pipeline, (*command.words, "--overwrite_output_dir", "--seed", "5"))
    for number in (signal.SIGTERM, signal.SIGKILL):
        started = loading(replacing, folder, tmp_path / number.name)
        started.signal(number)
        started.signal(signal.SIGCONT)
        assert started.statuses() == [128 + number if number == signal.SIGTERM else -number]
        assert files_of(folder) == before
    complete(replacing, folder, tmp_path / "second")
    assert weights(folder).keys() == trained.keys() and weights(folder) != trained
    assert not list(folder.glob("*.unfinished"))


def test_a_signal_while_it_loads_leaves_nothing_and_a_kill_nothing_that_counts(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    started = loading(runs.commands["lora"], folder, tmp_path / "stopped")
    started.signal(signal.SIGTERM)
    started.signal(signal.SIGCONT)
    assert started.statuses() == [128 + signal.SIGTERM]
    assert started.output().endswith("stopped by SIGTERM before the first step\n")
    assert not folder.parent.exists()
    loading(runs.commands["lora"], folder, tmp_path / "killed").kill()
    complete(runs.commands["lora"], folder, tmp_path / "logs")
