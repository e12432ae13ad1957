"""Real signals to real runs through scripts/launch.sh: they save their step and end; a dead rank ends all."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launched import Launched

NOVEL = "第一章 海\n" + "他站在船头，看着远处的灯塔慢慢亮了起来。" * 400
QUICK = ["--max_length", "64", "--per_device_train_batch_size", "1", "--logging_steps", "1", "--max_steps", "100000"]
QUICK += ["--eval_on_start", "False", "--guards", "False", "--save_strategy", "no", "--eval_strategy", "no"]
# One process, and two ranks that share optimizer states and gradients.
RUNS = [pytest.param(1, 0, id="one"), pytest.param(2, 2, id="zero2", marks=pytest.mark.slow)]


@pytest.fixture
def words(base_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "novel.txt").write_text(NOVEL, encoding="utf-8")
    words = ["pretrain", "--model", str(base_folder), "--train_files", str(tmp_path / "novel.txt")]
    return [*words, "--output_dir", str(tmp_path / "run"), *QUICK]


def launched(words: list[str], folder: Path, processes: int, zero: int) -> Launched:
    return Launched(*words, log=folder / "log", variables={"NPROC": str(processes), "ZERO": str(zero)})


def check_saved(run: Launched, folder: Path, name: str) -> int:
    """The step in its last line is the newest checkpoint's, which is whole; nothing pretends to be the final model."""
    last = run.text().strip().splitlines()[-1]
    found = re.fullmatch(
        rf"stopped by {name} at step (\d+), saved as checkpoint-(\d+); the same command goes on from there", last
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


@pytest.mark.parametrize(("processes", "zero"), RUNS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
        step = check_saved(run, tmp_path, number.name)
        assert step > before - 1
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
