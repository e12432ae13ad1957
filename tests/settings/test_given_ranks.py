"""What engines and platforms tell the ranks that they start: completed, obeyed, or refused by name."""

import sys
from pathlib import Path

import pytest

from novelgpt.settings.cores import usable_cores
from novelgpt.settings.errors import UserError
from novelgpt.settings.given_ranks import LAUNCHED, is_given, missing_variables
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun, PredictRun

MEETING = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK = MEETING | {"RANK": "1", "LOCAL_RANK": "1"}
OF_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
PATH = {"PATH": "/usr/bin:/bin"}


def test_a_rank_gets_what_its_engine_has_not_told_it() -> None:
    torchrun = {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    deepspeed = {"LOCAL_SIZE": "2"}
    shared = str(max(1, usable_cores() // 2))
    assert "OMP_NUM_THREADS" not in missing_variables(RANK | PATH | torchrun)
    told = missing_variables(RANK | PATH | deepspeed)
    assert (told["OMP_NUM_THREADS"], told["DS_ACCELERATOR"], "LOCAL_RANK" in told) == (shared, "cpu", False)
    assert told["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    assert missing_variables(RANK | PATH | deepspeed | told) == {}  # so that Python starts over once


def test_a_rank_without_a_local_number_is_the_only_one_of_its_host_unless_slurm_says_otherwise() -> None:
    given = MEETING | PATH | {"RANK": "1"}
    assert missing_variables(given)["LOCAL_RANK"] == "0"
    assert missing_variables(given | {"SLURM_PROCID": "1", "SLURM_LOCALID": "3"})["LOCAL_RANK"] == "3"
    assert missing_variables(given | {"SLURM_PROCID": "0", "SLURM_LOCALID": "3"})["LOCAL_RANK"] == "0"


def test_ranks_of_our_launcher_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    assert is_given()
    monkeypatch.setenv(LAUNCHED, "1")
    assert not is_given()


@pytest.mark.parametrize(
    ("variables", "cause"),
    [
        ({"MASTER_PORT": ""}, "RANK=1 says that this is a rank of several, and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
        ({"RANK": "2"}, "RANK=2 is none of WORLD_SIZE=2"),
        (OF_ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate's own settings of DeepSpeed"),
        (OF_ACCELERATE | {"ACCELERATE_USE_FSDP": "true"}, r"accelerate's FSDP \(true\)"),
        (OF_ACCELERATE | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"accelerate's dynamo_backend \(INDUCTOR\)"),
    ],
)
def test_what_is_said_by_halves_is_refused(
    variables: dict[str, str], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (RANK | variables).items():
        monkeypatch.setenv(name, value)
    for run in (FinetuneRun, PredictRun):
        with pytest.raises(UserError, match=cause):
            parse_arguments(run, ["--model", "tiny"])


def test_the_precision_that_accelerate_says_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse_arguments(FinetuneRun, ["--model", "tiny"]).training.bf16
    assert parse_arguments(FinetuneRun, ["--model", "tiny", "--precision", "bf16"]).training.bf16
    for word in ("fp32", "fp16"):
        with pytest.raises(UserError, match=f"accelerate's mixed_precision is bf16, and --precision {word}"):
            parse_arguments(FinetuneRun, ["--model", "tiny", "--precision", word])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8 is not known here"):
        parse_arguments(FinetuneRun, ["--model", "tiny"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not parse_arguments(FinetuneRun, ["--model", "tiny"]).training.bf16


def test_the_number_that_deepspeed_hands_to_every_program_is_taken() -> None:
    for run in (FinetuneRun, PredictRun):
        parse_arguments(run, ["--local_rank=1", "--model", "tiny"])
