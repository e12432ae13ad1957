"""What engines and platforms tell the ranks that they start: completed, obeyed, or refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from novelgpt.settings.errors import UserError
from novelgpt.settings.external_ranks import (
    LAUNCHED,
    is_external_rank,
    is_loss_of_a_rank,
    missing_variables,
    remove_leftovers,
)
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun, PredictRun
from tests.launched import OF_LAUNCHERS, PATIENCE, ROOT

MEETING = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK = MEETING | {"RANK": "1", "LOCAL_RANK": "1"}
OF_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
PATH = {"PATH": "/usr/bin:/bin"}
# Of a pipeline that tells what it was started with; of a site that counts the starts, and takes variables away.
STAND_IN = "import json, os, sys; print(json.dumps([sys.orig_argv[1:], dict(os.environ)]))"
SITE = """
import os
open("starts", "a").write("|")
for name in filter(None, os.environ.get("TAKEN", "").split()): os.environ.pop(name, None)
"""


def start(folder: Path, *words: str, **variables: str) -> tuple[list[str], dict[str, str], int]:
    """The words of the last Python that `python …` became, its variables, and how many there were."""
    (folder / "finetune").mkdir(exist_ok=True)
    (folder / "finetune" / "__init__.py").write_text("import novelgpt", encoding="utf-8")
    (folder / "finetune" / "__main__.py").write_text(STAND_IN, encoding="utf-8")
    (folder / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    (folder / "starts").unlink(missing_ok=True)
    own = {name: value for name, value in os.environ.items() if name not in (*OF_LAUNCHERS, "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=own | {"PYTHONPATH": f"{folder}:{ROOT}"} | variables,
        capture_output=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    told, environment = json.loads(done.stdout)
    return told, environment, len((folder / "starts").read_text("utf-8"))


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
    assert is_external_rank()
    monkeypatch.setenv(LAUNCHED, "1")
    assert not is_external_rank()


@pytest.mark.parametrize(
    ("variables", "cause"),
    [
        ({"MASTER_PORT": ""}, "by RANK=1, this is one of several ranks, but MASTER_PORT is not set"),
        ({"RANK": "", "LOCAL_RANK": "1"}, "by LOCAL_RANK=1, this is one of several ranks, but RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({"RANK": "00"}, "RANK=00 is not a number"),
        ({"RANK": "０"}, "RANK=０ is not a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is not a number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9+ is not a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2"),
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
    with pytest.raises(UserError, match="fp8 is unknown here"):
        parse_arguments(FinetuneRun, ["--model", "tiny"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not parse_arguments(FinetuneRun, ["--model", "tiny"]).training.bf16


def test_the_number_that_deepspeed_hands_to_every_program_is_taken() -> None:
    for run in (FinetuneRun, PredictRun):
        parse_arguments(run, ["--local_rank=1", "--model", "tiny"])


@pytest.mark.parametrize("words", ["-m finetune", "-mfinetune", "-X utf8 -u -m finetune", "-W ignore -Bum finetune"])
def test_a_rank_starts_over_once_with_the_same_words(words: str, tmp_path: Path) -> None:
    command = [*words.split(), "--run_name", "-m 甲 乙", "-m", ""]
    told, environment, starts = start(tmp_path, *command, **MEETING, RANK="1", LOCAL_SIZE="2")
    assert (told, starts) == (command, 2)
    assert environment["LOCAL_RANK"] == "0" and environment["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))
    assert start(tmp_path, *command, **{**environment, "PYTHONPATH": f"{tmp_path}:{ROOT}"}) == (command, environment, 1)


def test_a_rank_whose_variables_are_taken_away_starts_over_no_more(tmp_path: Path) -> None:
    taken = "OMP_NUM_THREADS LOCAL_RANK PATH"
    told, environment, starts = start(tmp_path, "-m", "finetune", **MEETING, RANK="1", LOCAL_SIZE="2", TAKEN=taken)
    assert (told, starts) == (["-m", "finetune"], 2)
    assert set(taken.split()) <= environment.keys()


@pytest.mark.parametrize(
    "left",
    [{"RANK": "0"}, {"LOCAL_RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, dict.fromkeys(RANK, "")]
    + [{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}],
    ids=" ".join,
)
def test_what_something_has_left_behind_makes_no_rank(left: dict[str, str], tmp_path: Path) -> None:
    """As images of containers have it: libraries would wait to meet others, or fail."""
    _, environment, starts = start(tmp_path, "-m", "finetune", **left)
    assert starts == 1
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & environment.keys()


def test_a_rank_of_one_that_has_a_place_to_meet_stays_one() -> None:
    rank = MEETING | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    variables = dict(rank)
    remove_leftovers(variables)
    assert variables == rank


def test_a_rank_that_is_alone_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (RANK | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    error = RuntimeError("Connection reset by peer")
    assert is_loss_of_a_rank(error)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_loss_of_a_rank(error)
