"""Real signals to real runs through scripts/launch.sh: they save their step and end; a dead rank ends all."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launched import PATIENCE, Launched

NOVEL = "第一章 海\n" + "他站在船头，看着远处的灯塔慢慢亮了起来。" * 400
QUICK = ["--max_length", "64", "--per_device_train_batch_size", "1", "--logging_steps", "1", "--max_steps", "100000"]
QUICK += ["--eval_on_start", "False", "--guards", "False", "--save_strategy", "no", "--eval_strategy", "no"]
# One process, and two ranks that share optimizer states and gradients.
RUNS = [pytest.param(1, 0, id="one"), pytest.param(2, 2, id="zero2", marks=[pytest.mark.slow, pytest.mark.long])]


@pytest.fixture
def words(base_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "novel.txt").write_text(NOVEL, encoding="utf-8")
    words = ["pretrain", "--model", str(base_folder), "--train_files", str(tmp_path / "novel.txt")]
    return [*words, "--output_dir", str(tmp_path / "run"), *QUICK]


def launched(words: list[str], folder: Path, processes: int, zero: int, warm: bool = False) -> Launched:
    return Launched(*words, log=folder / "log", variables={"NPROC": str(processes), "ZERO": str(zero)}, warm=warm)


def check_saved(run: Launched, folder: Path, name: str) -> int:
    """The step in its last line is the newest checkpoint's, which is whole; nothing pretends to be the final model."""
    last = run.text().strip().splitlines()[-1]
    found = re.fullmatch(
        rf"stopped by {name} at step (\d+), saved as checkpoint-(\d+); the same command resumes from there", last
    )
    assert found is not None, run.text()[-3000:]
    step = int(found[1])
    logged = [int(number) for number in re.findall(r"step +(\d+)/", run.text())]
    assert int(found[2]) == step == max(logged)
    checkpoint = folder / "run" / f"checkpoint-{step}"
    assert json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["global_step"] == step
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(checkpoint / "model.safetensors").values())
    assert not (folder / "run" / "model.safetensors").exists()
    assert json.loads((folder / "run" / "run.json").read_text("utf-8"))["status"] != "finished"
    assert "Traceback" not in run.text()
    return step


@pytest.mark.parametrize(
    ("number", "processes", "zero"),
    [
        pytest.param(signal.SIGTERM, 1, 0, id="SIGTERM-one", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 1, 0, id="SIGINT-one"),
        pytest.param(signal.SIGINT, 2, 2, id="SIGINT-zero2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_step_and_ends(
    number: signal.Signals, processes: int, zero: int, words: list[str], tmp_path: Path
) -> None:
    with launched(words, tmp_path, processes, zero) as run:
        run.until(r"step +2/")
        ranks = run.ranks()
        assert len(ranks) == (0 if processes == 1 else processes)
        before = max(int(step) for step in re.findall(r"step +(\d+)/", run.text()))
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)  # as the terminal does
        else:
            run.process.send_signal(number)  # as a scheduler does
        assert run.ends() == 128 + number
        assert check_saved(run, tmp_path, number.name) >= before
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
        assert not list(Path("/dev/shm").glob("deepspeed_*"))  # its buffers would stay in memory for good


@pytest.mark.parametrize(("processes", "zero"), RUNS)
def test_an_evaluation_ends_between_two_batches_and_is_made_up_for(
    processes: int, zero: int, words: list[str], tmp_path: Path
) -> None:
    """Of the last step, so that the same command has nothing left to train."""
    (tmp_path / "valid.txt").write_text(NOVEL, encoding="utf-8")
    words += ["--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "2", "--per_device_eval_batch_size", "1"]
    with launched([*words, "--valid_files", str(tmp_path / "valid.txt")], tmp_path, processes, zero, warm=True) as run:
        run.until(r"step +2/2 ")
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == 128 + signal.SIGTERM
        assert check_saved(run, tmp_path, "SIGTERM") == 2
        assert "eval loss" not in run.text()
    with launched([*words, "--valid_files", str(tmp_path / "valid.txt")], tmp_path, processes, zero, warm=True) as run:
        assert run.ends() == 0, run.text()[-3000:]
        assert f"resuming from {tmp_path / 'run' / 'checkpoint-2'}" in run.text()
        assert "step     2/2  eval loss" in run.text()
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "finished"


def test_a_signal_before_the_first_step_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text(NOVEL * 3, encoding="utf-8")
    words += ["--valid_files", str(tmp_path / "valid.txt"), "--eval_on_start", "True"]
    with launched(words, tmp_path, 1, 0, warm=True) as run:
        while not (tmp_path / "run" / "run.json").exists():
            assert run.process.poll() is None, run.text()[-3000:]
            time.sleep(0.01)
        run.process.send_signal(signal.SIGINT)
        assert run.ends() == 128 + signal.SIGINT
        assert run.text().endswith("stopped by SIGINT before the first step\n")
        assert not (tmp_path / "run").exists()


def test_a_second_signal_does_not_wait_for_the_step(words: list[str], tmp_path: Path) -> None:
    with launched([*words, "--gradient_accumulation_steps", "100"], tmp_path, 1, 0) as run:
        run.until(r"step +1/")
        # All three wait for it while it is halted, so that no step ends in between, however busy the machine is. Of
        # them SIGUSR1, a warning ahead of time, does not count. Python handles by number those that have come, but
        # another thread may take the first and be scheduled late: either of the two others can be the second one.
        run.process.send_signal(signal.SIGSTOP)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT):
            run.process.send_signal(number)
        # By the signal itself: a run that waits for its step exits.
        assert -run.process.wait(PATIENCE) in (signal.SIGINT, signal.SIGTERM)
        assert "stopped by" not in run.text()
        assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_rank_ends_the_run_with_the_cause(words: list[str], tmp_path: Path) -> None:
    with launched(words, tmp_path, 2, 2) as run:
        run.until(r"step +2/")
        ranks = run.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        assert run.ends() == 128 + signal.SIGKILL
        assert f"\nerror: rank 1 ({socket.gethostname()}) was killed by SIGKILL\n  fix: most likely" in run.text()
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_an_error_of_use_of_two_ranks_is_printed_once(words: list[str], tmp_path: Path) -> None:
    with launched([*words, "--train_files", str(tmp_path / "none.txt")], tmp_path, 2, 0, warm=True) as run:
        assert run.ends() == 2
        assert run.text().count("none.txt") == 1
        assert "Traceback" not in run.text()
