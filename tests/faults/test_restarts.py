"""A launcher that starts a run again after a fault: it ends as if undisturbed, in its own folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.faults.conftest import Runs
from tests.faults.runs import Command, assert_same, interrupted, weights
from tests.faults.training_process import Stop
from tests.launched import PATIENCE, Launched
from tests.warm_python import start_warm


def launch(
    command: Command, folder: Path, place: Path, deaths: dict[str, list[int]], further: tuple[str, ...] = ()
) -> tuple[int | None, str]:
    """The command under the launcher with MAX_RESTARTS; its ranks die as planned. Status, and what was printed."""
    place.mkdir(exist_ok=True)
    (place / "plan.json").write_text(json.dumps(deaths), encoding="utf-8")
    options = ["--max_restarts", "3", *(["--single"] if command.ranks == 1 else ["--processes", str(command.ranks)])]
    words = ["tests.faults.dying_process", str(place / "plan.json"), command.pipeline, *command.full(folder), *further]
    launcher = start_warm(["-m", "novelgpt.launch", *options, *words], command.variables, place / "log")
    try:
        status = launcher.wait(PATIENCE)
    finally:
        launcher.signal(signal.SIGKILL)
    return status, (place / "log").read_text(encoding="utf-8")


def restarts(folder: Path) -> list[tuple[str, str, int, str | None]]:
    """Of run.json: who, what, the step that was reached, and what was resumed from."""
    entries = json.loads((folder / "run.json").read_text(encoding="utf-8"))["restarts"]
    return [(entry["who"], entry["signal"], entry["step"], entry["checkpoint"]) for entry in entries]


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_is_killed_twice_under_zero_2(runs: Runs, tmp_path: Path) -> None:
    """Before the first checkpoint and after it; what the run replaces goes once, not what it has made itself."""
    undisturbed, folder = runs.undisturbed("zero2"), tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    replacing = ("--overwrite_output_dir",)
    status, printed = launch(undisturbed.command, folder, tmp_path / "log", {"1": [1, 3]}, replacing)
    assert status == 0, printed[-4000:]
    assert_same(folder, undisturbed.folder)
    killed = (f"rank 1 ({socket.gethostname()})", "SIGKILL")
    assert restarts(folder) == [(*killed, 0, None), (*killed, 2, "checkpoint-2")]
    assert f"{killed[0]} was killed by SIGKILL after step 2; restart 2 of 3 from checkpoint-2, in 2 s\n" in printed


@pytest.mark.long
def test_a_run_from_a_named_checkpoint_resumes_from_its_own_as_soon_as_it_has_one(runs: Runs, tmp_path: Path) -> None:
    """A single process: once killed before it has saved, once after it."""
    undisturbed = runs.undisturbed("lora")
    before = interrupted(undisturbed.command, tmp_path / "before", "checkpoint-4", Stop("step", 6))
    (before / "checkpoint-9").mkdir()  # nothing that the run has made
    named = ("--resume_from_checkpoint", str(before / "checkpoint-2"), "--save_total_limit", "9")
    folder = tmp_path / "run"
    status, printed = launch(undisturbed.command, folder, tmp_path / "log", {"0": [1, 4]}, named)
    assert status == 0, printed[-4000:]
    assert weights(folder) == weights(undisturbed.folder)
    assert [entry[2:] for entry in restarts(folder)] == [(2, "checkpoint-2"), (5, "checkpoint-4")], printed


@pytest.mark.long
def test_a_fault_of_the_data_is_not_tried_three_times(runs: Runs, tmp_path: Path) -> None:
    """The same step again: the run ends, and run.json says why."""
    command, folder = runs.commands["lora"], tmp_path / "run"
    status, printed = launch(command, folder, tmp_path / "log", {"0": [4, 2, 2]})
    assert status == 137, printed[-4000:]
    assert "not restarted: the same fault as before, after step 3: it would recur\n" in printed
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert len(described["restarts"]) == 1
    assert (described["gave_up"]["step"], described["gave_up"]["signal"]) == (3, "SIGKILL")


@pytest.mark.long
def test_a_prediction_answers_no_row_twice(runs: Runs, tmp_path: Path) -> None:
    words = ("--model", str(runs.undisturbed("finetune").folder), "--data_files", str(runs.questions))
    command = Command("predict", (*words, "--max_rows", "8", "--max_new_tokens", "4", "--batch_size", "2"))
    status, printed = launch(command, tmp_path / "undisturbed", tmp_path / "first", {})
    assert status == 0, printed[-4000:]
    status, printed = launch(command, tmp_path / "killed", tmp_path / "second", {"0": [6, 6]})
    assert status == 0, printed[-4000:]
    assert printed.count("; restart ") == 2 and "was killed by SIGKILL after 2 rows; restart 1 of 3, in 1 s" in printed
    answers = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("undisturbed", "killed")]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_the_script_heals_a_single_process(runs: Runs, tmp_path: Path) -> None:
    command, folder = runs.commands["finetune"], tmp_path / "run"
    variables = {"MAX_RESTARTS": "1", "ZERO": "0", "NPROC": "1", "MARK": str(tmp_path)}
    words = [command.pipeline, *command.full(folder), "--num_train_epochs", "40"]
    with Launched(*words, log=tmp_path / "log", variables=variables, warm=True) as run:
        run.until("step +2/")
        os.kill(supervised(f"MARK={tmp_path}"), signal.SIGKILL)
        run.until("restart 1 of 1 from checkpoint-")
        run.until(r"(?s)resuming from .*checkpoint-.*step +\d+/")
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == 128 + signal.SIGTERM, run.text()[-3000:]
    assert [entry[:2] for entry in restarts(folder)] == [(f"rank 0 ({socket.gethostname()})", "SIGKILL")]


def supervised(mark: str) -> int:
    """The process with this variable that a launcher watches."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in variables and any(variable.startswith(b"NOVELGPT_ATTEMPT=") for variable in variables):
            return int(path.parent.name)
    raise AssertionError("no such process")
