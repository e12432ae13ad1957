"""Real torchrun, accelerate and deepspeed: two CPU ranks train, stop, resume and refuse as under our own launcher."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from novelgpt.settings.paths import SAMPLES
from tests.launched import OF_LAUNCHERS, PATIENCE, ROOT, Launched
from tests.warm_python import warm_python

PAPERS = str(SAMPLES / "papers" / "valid.jsonl")
QUICK = ["--max_length", "128", "--per_device_train_batch_size", "1", "--logging_steps", "1", "--packing", "False"]
QUICK += ["--eval_on_start", "False", "--guards", "False", "--eval_strategy", "no", "--stop_check", "0"]
FOREVER = ["--max_steps", "100000", "--lr_scheduler_type", "constant", "--save_strategy", "no"]
ENGINES = ("torchrun", "accelerate", "deepspeed")
# Statuses of an error of use: torchrun, and accelerate with it, have one of their own.
REFUSED = {"torchrun": 1, "accelerate": 1, "deepspeed": 2}
ZERO = {0: [], 2: ["--deepspeed", "zero2"]}
LAST_WORDS = r"stopped by (\w+) at step (\d+), saved as checkpoint-\2; the same command resumes from there\n"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(engine: str, warm: bool = True) -> list[str]:
    """By which an engine starts two ranks of a module."""
    programs = Path(sys.executable).parent
    if engine == "torchrun":
        return [str(programs / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m"]
    if engine == "accelerate":
        words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port()]
        return [str(programs / "accelerate"), "launch", *words, "-m"]
    words = [str(programs / "deepspeed"), "--master_port", free_port(), "--num_gpus", "2"]
    return [*words, "--no_python", "--no_local_rank", warm_python(), "-m"] if warm else [*words, "--module"]


class Started(Launched):
    """A pipeline under an engine, or under our own launcher."""

    def __init__(
        self, engine: str, *words: str, log: Path, warm: bool = True, start: Sequence[str] = (), **variables: str
    ) -> None:
        python = warm_python() if warm else sys.executable
        given = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        given |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
        # Another ninja than the environment's would build DeepSpeed's parts again.
        given["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{given['PATH']}"
        self.left: list[psutil.Process] = []
        begin = list(start) or command(engine, warm) if engine != "ours" else launcher(python)
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*begin, *words], cwd=ROOT, env=given | variables,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def until_gone(self) -> None:
        """Wait for the end of what a command has left behind."""
        psutil.wait_procs(self.left, timeout=PATIENCE)

    def below(self) -> list[psutil.Process]:
        """All processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal_all(self, number: signal.Signals) -> None:
        """As a terminal and Slurm do."""
        self.left = self.below()
        for process in [psutil.Process(self.process.pid), *self.left]:
            if "--client" not in process.cmdline():  # which hands on what it gets
                process.send_signal(number)


def launcher(python: str) -> list[str]:
    return [python, "-m", "novelgpt.launch", "--processes", "2"]


def losses(folder: Path) -> dict[int, float]:
    """By step, as they were logged."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def check_same_weights(one: Path, other: Path, name: str = "model.safetensors") -> None:
    first, second = (load_file(folder / name) for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def words_for(model: Path, folder: Path, zero: int) -> list[str]:
    data = ["--train_files", PAPERS, "--valid_files", PAPERS]
    return ["finetune", "--model", str(model), *data, "--output_dir", str(folder), *QUICK, *ZERO[zero]]


def stop_after(run: Started, step: int, engine: str) -> int:
    """Stop a run at whatever step it has come to, from this one on. Its words are those of rank 0 alone."""
    run.until(rf"step +{step}/")
    if engine == "deepspeed":  # whose command hands nothing on
        run.signal_all(signal.SIGTERM)
    else:
        run.process.send_signal(signal.SIGTERM)
    status = run.ends()
    if engine == "deepspeed":  # and does not wait
        run.until_gone()
    text = run.text()
    found = re.findall(LAST_WORDS, text)
    assert len(found) == 1 and found[0][0] == "SIGTERM", text[-3000:]
    assert status == {"ours": 128 + signal.SIGTERM, "deepspeed": 128 + signal.SIGTERM}.get(engine, 1)
    assert text.count("Data  ") == 1, text[-3000:]
    assert "finetune/__main__.py" not in text  # no traceback of ours; torchrun and accelerate have one of their own
    return int(found[0][1])


def check_stop_and_resumption(engines: Sequence[str], zero: int, model: Path, folder: Path) -> None:
    """Under the first engine, a run is stopped; the others go on with it; our launcher alone comes to the same."""
    last = 0
    for number, engine in enumerate(engines):
        words = [*words_for(model, folder / "run", zero), *FOREVER]
        with Started(engine, *words, log=folder / f"{number}.log", warm=number > 0) as run:
            before, last = last, stop_after(run, last + 2, engine)
            assert (f"resuming from {folder / 'run' / f'checkpoint-{before}'}" in run.text()) == bool(number)
    words = [*words_for(model, folder / "whole", zero), *FOREVER, "--save_strategy", "steps", "--save_steps", str(last)]
    with Started("ours", *words, log=folder / "whole.log") as run:
        stop_after(run, last + 1, "ours")
    reference = losses(folder / "whole")
    assert losses(folder / "run") == {step: reference[step] for step in range(1, last + 1)}
    check_same_weights(folder / "run" / f"checkpoint-{last}", folder / "whole" / f"checkpoint-{last}")


@pytest.mark.slow
def test_what_torchrun_trains_our_launcher_trains_again_from_a_checkpoint_on_the_way(
    base_folder: Path, tmp_path: Path
) -> None:
    """To the last bit. All processes are warm, the one of torchrun as well."""
    words = [*words_for(base_folder, tmp_path / "run", 2), *FOREVER, "--save_strategy", "steps", "--save_steps"]
    start = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    with Started("torchrun", *words, "1", log=tmp_path / "torchrun.log", start=start) as run:
        last = stop_after(run, 2, "torchrun")
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "metrics.jsonl"))
    (whole / "checkpoint-1").rename(tmp_path / "run" / "checkpoint-1")
    with Started("ours", *words, str(last), log=tmp_path / "ours.log") as run:
        stop_after(run, last + 1, "ours")
        assert f"resuming from {tmp_path / 'run' / 'checkpoint-1'}" in run.text()
    reference, again = losses(whole), losses(tmp_path / "run")  # from step 2 on, of steps that were done again
    assert {step: again[step] for step in range(1, last + 1)} == reference
    assert last > 1
    check_same_weights(tmp_path / "run" / f"checkpoint-{last}", whole / f"checkpoint-{last}")


@pytest.mark.long
@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize(
    "engines",
    [["torchrun", "ours"], ["accelerate", "deepspeed"], ["deepspeed", "torchrun"], ["ours", "accelerate"]],
    ids="-".join,
)
def test_a_run_under_one_engine_is_resumed_by_another(
    engines: list[str], zero: int, base_folder: Path, tmp_path: Path
) -> None:
    check_stop_and_resumption(engines, zero, base_folder, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("zero", ZERO)
def test_all_engines_come_to_the_same_weights(zero: int, base_folder: Path, tmp_path: Path) -> None:
    for engine in ("ours", *ENGINES):
        words = [*words_for(base_folder, tmp_path / engine, zero), "--max_steps", "3"]
        with Started(engine, *words, log=tmp_path / f"{engine}.log", warm=engine == "ours") as run:
            assert run.ends() == 0, run.text()[-3000:]
            assert run.text().count("Done. eval loss") == 1
            assert run.text().count("Loading weights: 100%") <= 1
            assert "Traceback" not in run.text()
        assert losses(tmp_path / engine) == losses(tmp_path / "ours")
        check_same_weights(tmp_path / engine, tmp_path / "ours")


def check_refusal(engine: str, folder: Path, *words: str, warm: bool = True, start: Sequence[str] = ()) -> None:
    with Started(engine, *words, log=folder / f"{engine}.log", warm=warm, start=start) as run:
        assert run.ends() == REFUSED[engine]
        assert run.text().count("error: none.jsonl does not exist\n  fix: check the path") == 1, run.text()[-3000:]
        assert "finetune/__main__.py" not in run.text()


def test_an_error_of_use_is_printed_once_by_rank_0(tmp_path: Path) -> None:
    """With the interpreter of the user's environment."""
    check_refusal("torchrun", tmp_path, "finetune", "--model", "tiny", "--train_files", "none.jsonl", warm=False)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_an_error_of_use_is_printed_once_under_each_engine(engine: str, tmp_path: Path) -> None:
    words = ["finetune", "--model", "tiny", "--train_files", "none.jsonl"]
    check_refusal(engine, tmp_path, *words, warm=False)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_use_of_one_rank_is_printed(rank: int, base_folder: Path, tmp_path: Path) -> None:
    """The other one, which has met it already, fails for lack of it, and says nothing."""
    (tmp_path / "one.sh").write_text(
        f'if [ "$RANK" = {rank} ]; then set -- "$@" --train_files none.jsonl; fi\nexec "{sys.executable}" -m "$@"\n'
    )
    start = [*command("torchrun")[:-1], "--no-python", "bash", str(tmp_path / "one.sh")]
    check_refusal("torchrun", tmp_path, *words_for(base_folder, tmp_path / "run", 0), start=start, warm=False)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_save_when_their_agent_is_gone(number: signal.Signals, base_folder: Path, tmp_path: Path) -> None:
    words = [*words_for(base_folder, tmp_path / "run", 0), *FOREVER]
    with Started("torchrun", *words, log=tmp_path / "log", warm=False) as run:
        run.until(r"step +2/")
        ranks = run.below()
        run.process.send_signal(number)
        assert run.ends() == 128 + number
        psutil.wait_procs(ranks, timeout=PATIENCE)
        step = re.findall(LAST_WORDS, run.text())
        assert len(step) == 1 and step[0][0] == "SIGTERM", run.text()[-3000:]
        assert (tmp_path / "run" / f"checkpoint-{step[0][1]}" / "trainer_state.json").is_file()


@pytest.mark.long
def test_a_killed_rank_leaves_one_line_of_the_other(base_folder: Path, tmp_path: Path) -> None:
    with Started("torchrun", *words_for(base_folder, tmp_path / "run", 0), *FOREVER, log=tmp_path / "log") as run:
        run.until(r"step +2/")
        [rank] = [one for one in run.below() if one.environ().get("RANK") == "1"]
        rank.kill()
        assert run.ends() == 1
        assert "error: another rank has ended, or cannot be reached: " in run.text()
        assert "finetune/__main__.py" not in run.text()


@pytest.mark.long
def test_two_processes_that_an_operator_numbers_are_ranks(base_folder: Path, tmp_path: Path) -> None:
    """As Kubernetes' PyTorchJob does, in a container each: without LOCAL_RANK."""
    port = free_port()
    words = [*words_for(base_folder, tmp_path / "run", 2), "--max_steps", "2"]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = [sys.executable, "-m"]
    with (
        Started("", *words, log=tmp_path / "0.log", start=start, warm=False, RANK="0", **meeting) as first,
        Started("", *words, log=tmp_path / "1.log", start=start, warm=False, RANK="1", **meeting) as second,
    ):
        assert (first.ends(), second.ends()) == (0, 0), first.text()[-3000:] + second.text()[-3000:]
        assert "Done. eval loss" in first.text()
        assert second.text() == ""
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["status"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_prediction_is_shared_out(engine: str, base_folder: Path, tmp_path: Path) -> None:
    words = ["predict", "--model", str(base_folder), "--data_files", PAPERS, "--max_rows", "6", "--max_new_tokens", "4"]
    for name in ("ours", engine):
        with Started(
            name, *words, "--output_dir", str(tmp_path / name), log=tmp_path / f"{name}.log", warm=name == "ours"
        ) as run:
            assert run.ends() == 0, run.text()[-3000:]
            assert run.text().count("6 rows for") == 1
    first, second = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("ours", engine))
    assert first == second


@pytest.mark.long
def test_the_command_of_many_names_trains_as_a_rank(base_folder: Path, tmp_path: Path) -> None:
    """`torchrun --no-python novelgpt lora` starts the same module; several ranks take ZeRO 2, as by scripts."""
    words = [*words_for(base_folder, tmp_path / "torchrun", 0)[1:], "--max_steps", "2"]
    with Started("torchrun", "cli", "lora", *words, log=tmp_path / "log", warm=False) as run:
        assert run.ends() == 0, run.text()[-3000:]
        assert run.text().count("Done. eval loss") == 1
    words = [*words_for(base_folder, tmp_path / "ours", 2)[1:], "--max_steps", "2"]
    with Started("ours", "finetune_lora", *words, log=tmp_path / "ours.log") as run:
        assert run.ends() == 0, run.text()[-3000:]
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "ours")
    check_same_weights(tmp_path / "torchrun", tmp_path / "ours", "adapter_model.safetensors")
