"""What a pipeline is started with, for each way in which a user or a platform says so."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from novelgpt.launch.start import plan_start
from novelgpt.settings.errors import UserError
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.third_party import process_defaults
from tests.launched import PATIENCE, ROOT
from tests.script_words import OF_SCRIPTS

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
LAUNCH = ["-m", "novelgpt.launch", "--processes"]
ZERO_2 = ["--deepspeed_by_default", str(ROOT / "scripts" / "deepspeed" / "zero2.json")]
ZERO_3 = ["--deepspeed_by_default", str(ROOT / "scripts" / "deepspeed" / "zero3_offload.json")]
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
MET = ["--port", "29500", "--address", "10.0.0.1"]
BY_HAND = [*MET, "--hosts", "2", "--host", "1"]
SLURM = {"SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}
A_RANK = MEETING | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
OPERATOR = MEETING | {"RANK": "1", "WORLD_SIZE": "2"}
ONE_RANK_A_HOST = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

# Variables, GPUs -> words in front of the pipeline, words behind it, processes that share the cores, further variables.
Row = tuple[dict[str, str], int, list[str], list[str], int | None, dict[str, str]]
TABLE: dict[str, Row] = {
    "one process": ({}, 0, ["-m"], [], 1, {}),
    "empty variables are none": (dict.fromkeys(OF_SCRIPTS, ""), 0, ["-m"], [], 1, {}),
    "a model": ({"MODEL": "a b"}, 0, ["-m"], ["--model", "a b"], 1, {}),
    "one GPU": ({}, 1, ["-m"], [], 1, {}),
    "a process a GPU": ({}, 4, [*LAUNCH, "4"], ZERO_2, 4, {}),
    "one of several GPUs": ({"NPROC": "1"}, 4, ["-m"], [], 1, {"CUDA_VISIBLE_DEVICES": "0"}),
    "one of those in sight": (
        {"NPROC": "1", "CUDA_VISIBLE_DEVICES": "5,2"}, 2, ["-m"], [], 1, {"CUDA_VISIBLE_DEVICES": "5"},
    ),
    "processes on a CPU": ({"NPROC": "2"}, 0, [*LAUNCH, "2"], ZERO_2, 2, {}),
    "their other name": ({"NPROC_PER_NODE": "2"}, 0, [*LAUNCH, "2"], ZERO_2, 2, {}),
    "both names": ({"NPROC_PER_NODE": "2", "NPROC": "2"}, 0, [*LAUNCH, "2"], ZERO_2, 2, {}),
    "no ZeRO": ({"NPROC": "2", "ZERO": "0"}, 0, [*LAUNCH, "2"], [], 2, {}),
    "ZeRO in one process": ({"ZERO": "3", "OFFLOAD": "1"}, 0, [*LAUNCH, "1"], ZERO_3, 1, {}),
    "a port": ({"NPROC": "2", "MASTER_PORT": "29500"}, 0, [*LAUNCH, "2", "--port", "29500"], ZERO_2, 2, {}),
    "a hostfile": ({"HOSTFILE": "hosts"}, 1, [*LAUNCH, "1", "--hostfile", "hosts"], ZERO_2, None, {}),
    "Slurm": (SLURM, 8, [*LAUNCH, "8", "--slurm"], ZERO_2, 8, {}),
    "Slurm on one host": (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, 0, ["-m"], [], 1, {}),
    "hosts one by one": (MEETING | {"HOSTS": "2", "HOST": "1"}, 0, [*LAUNCH, "1", *BY_HAND], ZERO_2, 1, {}),
    "their other names": (
        MEETING | {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "8"}, 0, [*LAUNCH, "8", *BY_HAND], ZERO_2, 8, {},
    ),
    "a shell that keeps the name of the machine": (
        MEETING | {"NNODES": "2", "NODE_RANK": "1", "HOST": "gpu7"}, 0, [*LAUNCH, "1", *BY_HAND], ZERO_2, 1, {},
    ),
    "one host, by its number": ({"NNODES": "1", "NODE_RANK": "0"}, 0, ["-m"], [], 1, {}),
    "a rank under torchrun": (A_RANK, 2, ["-m"], ZERO_2, 2, {}),
    "which has settled all numbers": (
        A_RANK | {"NPROC": "8", "NNODES": "9", "HOSTFILE": "x"} | SLURM, 2, ["-m"], ZERO_2, 2, {},
    ),
    "a rank without ZeRO": (A_RANK | {"ZERO": "0"}, 2, ["-m"], [], 2, {}),
    "a rank that is alone": (A_RANK | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, 4, ["-m"], [], 1, {}),
    "what something has left behind": (ALONE, 1, ["-m"], [], 1, {}),
    "processes beside it": (ALONE | {"NPROC": "2"}, 0, [*LAUNCH, "2"], ZERO_2, 2, {}),
    "a rank under DeepSpeed": (A_RANK | {"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "4"}, 4, ["-m"], ZERO_2, 4, {}),
    "a rank whose model accelerate shares out": (A_RANK | {"ACCELERATE_USE_FSDP": "true"}, 2, ["-m"], [], 2, {}),
    "an operator with a GPU a host": (OPERATOR, 1, ["-m"], ZERO_2, 1, ONE_RANK_A_HOST),
    "an operator with several": (OPERATOR, 8, [*LAUNCH, "8", *BY_HAND], ZERO_2, 8, {}),
    "an operator that counts ranks, and hosts for torchrun": (
        OPERATOR | {"WORLD_SIZE": "8", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4"},
        0, [*LAUNCH, "4", *BY_HAND], ZERO_2, 4, {},
    ),
    "an operator that leaves numbers to torchrun": (
        OPERATOR | {"PET_NNODES": "1:2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "auto"},
        0, ["-m"], ZERO_2, 1, ONE_RANK_A_HOST,
    ),
    "an operator with one host": (OPERATOR | {"WORLD_SIZE": "1", "RANK": "0"}, 0, ["-m"], [], 1, {}),
    "an operator that tells the first host to meet itself": (
        OPERATOR | {"RANK": "0", "MASTER_ADDR": "localhost"},
        8,
        [*LAUNCH, "8", "--port", "29500", "--address", socket.gethostname(), "--hosts", "2", "--host", "0"],
        ZERO_2, 8, {},
    ),
    "numbers that are none": (
        {"RANK": "０", "WORLD_SIZE": "9" * 5000, "SLURM_STEP_NUM_NODES": "²"}, 0, ["-m"], [], 1, {},
    ),
    "the user's numbers before those of an operator": (
        OPERATOR | {"HOSTS": "1"}, 2, [*LAUNCH, "2", *MET, "--hosts", "1", "--host", "0"], ZERO_2, 2, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_what_is_started(case: str) -> None:
    given, gpus, before, options, processes, further = TABLE[case]
    words = ["--learning_rate", "1e-4"]
    start = plan_start("finetune", words, given, gpus)
    assert start.args == [*before, "finetune", *options, *words]
    assert start.variables == process_defaults(given, processes, gpus) | further


def test_threads_and_devices_that_the_user_has_settled_stay() -> None:
    shared = plan_start("finetune", [], {"NPROC": "2"}, 0).variables
    assert shared["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2)) and shared["DS_ACCELERATOR"] == "cpu"
    assert "OMP_NUM_THREADS" not in plan_start("finetune", [], {"NPROC": "2", "OMP_NUM_THREADS": "3"}, 0).variables
    assert "DS_ACCELERATOR" not in plan_start("finetune", [], {}, 1).variables


def test_prediction_has_whole_weights_on_each_device() -> None:
    variables = {"NPROC": "2", "ZERO": "3", "OFFLOAD": "1", "MODEL": "m"}
    assert plan_start("predict", ["--base"], variables, 0).args == [*LAUNCH, "2", "predict", "--model", "m", "--base"]


@pytest.mark.parametrize("word", ["--help", "-h", "--help_all"])
def test_help_goes_through_whatever_the_variables_say(word: str) -> None:
    variables = A_RANK | {"NPROC": "many", "ZERO": "9", "MODEL": "m"}
    assert plan_start("pretrain", ["--model", "x", word], variables, 2).args == [
        "-m",
        "pretrain",
        "--model",
        "x",
        word,
    ]


@pytest.mark.parametrize(
    ("variables", "cause"),
    [
        ({"NPROC": "0"}, "NPROC=0 is not a number of processes"),
        ({"NPROC": "two"}, "NPROC=two is not a number of processes"),
        ({"NPROC": "10000"}, "NPROC=10000 is not a number of processes"),
        ({"NPROC": "9" * 5000}, "is not a number of processes"),
        ({"NPROC": "²"}, "NPROC=² is not a number of processes"),
        ({"NPROC_PER_NODE": "auto"}, "NPROC_PER_NODE=auto is not a number of processes"),
        ({"HOSTS": "-1"}, "HOSTS=-1 is not a number of hosts"),
        ({"NNODES": "2:4"}, "NNODES=2:4 is not a number of hosts"),
        ({"HOSTS": "2", "HOST": "first"}, "HOST=first is not a number of a host"),
        ({"NPROC": "2", "NPROC_PER_NODE": "4"}, "NPROC=2 and NPROC_PER_NODE=4 are two names of one number, and differ"),
        ({"HOSTS": "2", "NNODES": "4"}, "HOSTS=2 and NNODES=4 are two names of one number, and differ"),
        ({"HOSTS": "2", "HOST": "0", "NODE_RANK": "1"}, "HOST=0 and NODE_RANK=1 are two names of one number"),
        ({"ZERO": "4"}, "ZERO=4 is not a stage"),
        ({"ZERO": "1", "OFFLOAD": "1"}, "OFFLOAD=1 has nothing to move at ZERO=1"),
        ({"OFFLOAD": "1"}, "OFFLOAD=1 needs DeepSpeed"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "this is one of 2 hosts, but MASTER_ADDR is not set"),
    ],
)
def test_variables_that_cannot_be_are_named(variables: dict[str, str], cause: str) -> None:
    with pytest.raises(UserError) as refusal:
        plan_start("finetune", [], variables, 0)
    assert cause in refusal.value.cause


@pytest.mark.parametrize(
    ("variables", "cause"),
    [
        ({"NPROC": "3"}, "3 processes are requested, and 2 GPUs visible"),
        (ALONE | MEETING | {"NPROC": "2"}, "2 processes are requested, but by RANK and WORLD_SIZE=1 this is the only"),
    ],
)
def test_processes_that_there_cannot_be_are_refused(variables: dict[str, str], cause: str) -> None:
    with pytest.raises(UserError) as refusal:
        plan_start("finetune", [], variables, 2)
    assert cause in refusal.value.cause
    assert plan_start("finetune", [], {"HOSTFILE": "hosts", "NPROC": "3"}, 2).args  # whose slots count


@pytest.mark.parametrize("pipeline", ["", "fine", "os"])
def test_what_is_no_pipeline_is_not_started(pipeline: str) -> None:
    with pytest.raises(UserError, match="no pipeline named"):
        plan_start(pipeline, ["--help"], {}, 0)


# In place of the pipeline: tells what it was started with, and ends as it is told.
STAND_IN = """
import os, sys
print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], os.environ["PATH"].split(os.pathsep)[0])
assert not {"NOVELGPT_SECRET", "SECRET_FILE"} & os.environ.keys()
if "kill" in sys.argv: os.kill(os.getpid(), 15)
sys.exit(7)
"""


@pytest.mark.parametrize("forks", [True, False], ids=["in its place", "as its child"])
@pytest.mark.parametrize("word", ["end", "kill"])
def test_the_pipeline_ends_as_it_would_by_itself(forks: bool, word: str, tmp_path: Path) -> None:
    """Also where a process cannot take the place of another, as on Windows."""
    (tmp_path / "predict.py").write_text(STAND_IN, encoding="utf-8")
    hide = "" if forks else "import os; del os.fork\n"
    begin = f"{hide}import sys, novelgpt.launch.start as start; start.ROOT = sys.argv.pop(1); start.main()"
    environment = {name: value for name, value in os.environ.items() if name not in (*OF_SCRIPTS, "OMP_NUM_THREADS")}
    environment |= {"MODEL": "m", "PYTHONPATH": str(ROOT), "NOVELGPT_SECRET": "that the launcher alone needs"}
    command = [sys.executable, "-c", begin, str(tmp_path), "predict", word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout.split() == ["--model", "m", word, str(usable_cores()), str(Path(sys.executable).parent)]
    assert done.returncode == (7 if word == "end" else (-15 if forks else 128 + 15))
