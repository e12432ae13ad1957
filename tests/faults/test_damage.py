"""Damaged checkpoints are recognised, named in one line, and passed over for the newest whole one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from novelgpt.training.run_choice import newest_intact_checkpoint
from tests.faults.conftest import Runs
from tests.faults.runs import Command, Started, assert_refused, assert_same, complete, files_of, interrupted
from tests.faults.training_process import Stop

OPTIMIZER = "optimizer-0-of-1.safetensors"
NEWEST, BEFORE = "checkpoint-6", "checkpoint-5"  # of the run that was killed after its 6th step


def cut(name: str) -> Callable[[Path], None]:
    """The second half of a file is lost."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def flip(name: str) -> Callable[[Path], None]:
    """One bit in the middle of a file, whose size stays."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def lose(name: str) -> Callable[[Path], None]:
    """A file is gone."""
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    """A file holds something else."""
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def wrong_hash(folder: Path) -> None:
    """The manifest tells of other weights."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest), encoding="utf-8")


def leave_nothing(folder: Path) -> None:
    """The folder is there and holds nothing."""
    shutil.rmtree(folder)
    folder.mkdir()


def other_config(folder: Path) -> None:
    """A model of other sizes."""
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": 9}), encoding="utf-8"
    )


# What is done to the newest checkpoint, and what the line about it has to name.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut": (cut("model.safetensors"), "model.safetensors"),
    "a bit of the weights": (flip("model.safetensors"), "model.safetensors"),
    "weights lost": (lose("model.safetensors"), "model.safetensors"),
    "optimizer cut": (cut(OPTIMIZER), OPTIMIZER),
    "a bit of the optimizer": (flip(OPTIMIZER), OPTIMIZER),
    "optimizer lost": (lose(OPTIMIZER), OPTIMIZER),
    "trainer state cut": (cut("trainer_state.json"), "trainer_state.json"),
    "trainer state lost": (lose("trainer_state.json"), "trainer_state.json"),
    "states changed": (flip("states.json"), "states.json"),
    "manifest lost": (lose("manifest.json"), "manifest.json"),
    "manifest no JSON": (cut("manifest.json"), "manifest.json"),
    "manifest of another shape": (write("manifest.json", '["model.safetensors"]'), "manifest.json"),
    "a wrong hash": (wrong_hash, "model.safetensors"),
    "an empty folder": (leave_nothing, "manifest.json"),
    "an empty file": (write("model.safetensors", ""), "model.safetensors"),
    "an empty manifest": (write("manifest.json", ""), "manifest.json"),
    "another configuration": (other_config, "config.json"),
}


@pytest.fixture(scope="module")
def killed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after its 6th step."""
    return interrupted(runs.commands["finetune"], tmp_path_factory.mktemp("killed") / "run", NEWEST, Stop("step", 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_recognised_and_passed_over(
    name: str, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, what = DAMAGES[name]
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    assert newest_intact_checkpoint(folder) == folder / NEWEST
    assert capsys.readouterr().out == ""
    damage(folder / NEWEST)
    before = files_of(folder)
    assert newest_intact_checkpoint(folder) == folder / BEFORE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and NEWEST in lines[0] and what in lines[0], lines
    assert files_of(folder) == before


@pytest.mark.slow
def test_a_folder_left_unfinished_is_no_checkpoint(
    killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    shutil.copytree(killed / NEWEST, tmp_path / "run" / "checkpoint-9.unfinished")
    assert newest_intact_checkpoint(tmp_path / "run") == tmp_path / "run" / NEWEST


@pytest.mark.slow
def test_the_run_goes_on_from_the_one_before(killed: Path, runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    flip("model.safetensors")(folder / NEWEST)
    shutil.copytree(killed / NEWEST, folder / "checkpoint-7.unfinished")
    undisturbed = runs.undisturbed("finetune")
    output = complete(undisturbed.command, folder, tmp_path / "logs").output()
    assert [line for line in output.splitlines() if f"{NEWEST} is not used" in line]
    assert f"resuming from {folder / BEFORE}" in output
    assert_same(folder, undisturbed.folder)


@pytest.mark.slow
def test_a_shard_of_another_rank_is_missed(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(runs.commands["zero2"], tmp_path / "run", "checkpoint-2")
    lose("optimizer-1-of-2.safetensors")(folder / "checkpoint-2")
    assert newest_intact_checkpoint(folder) == folder / "checkpoint-1"
    assert "checkpoint-2 is not used: optimizer-1-of-2.safetensors is missing" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_go_on_from_the_one_before(runs: Runs, tmp_path: Path) -> None:
    undisturbed = runs.undisturbed("zero2")
    folder = interrupted(undisturbed.command, tmp_path / "run", "checkpoint-4")
    lose("optimizer-1-of-2.safetensors")(folder / "checkpoint-4")
    output = complete(undisturbed.command, folder, tmp_path / "logs").output()
    assert "checkpoint-4 is not used: optimizer-1-of-2.safetensors is missing" in output
    assert_same(folder, undisturbed.folder)


@pytest.mark.slow
def test_where_none_is_whole_nothing_is_deleted(killed: Path, runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        flip("model.safetensors")(checkpoint)
    before = files_of(folder)
    assert_refused(Started(runs.commands["finetune"], folder, tmp_path / "logs"), "is intact")
    assert files_of(folder) == before


# What a person may change between two starts, and the word that tells of it.
CHANGES: dict[str, tuple[Callable[[Runs, Path], tuple[str, ...]], str]] = {
    "rows": (lambda runs, place: ("--train_files", str(shorter(runs.questions, place))), "other.jsonl"),
    "model": (lambda runs, place: ("--model", str(runs.other_base)), "model"),
    "micro-batch": (lambda runs, place: ("--per_device_train_batch_size", "4"), "rows per step"),
    "accumulation": (lambda runs, place: ("--gradient_accumulation_steps", "2"), "rows per step"),
    "seed": (lambda runs, place: ("--seed", "7"), "seed"),
    "length": (lambda runs, place: ("--max_length", "40"), "max_length"),
    "epochs": (lambda runs, place: ("--num_train_epochs", "3"), "num_train_epochs"),
    "packing": (lambda runs, place: ("--packing", "True"), "packing"),
}


def shorter(path: Path, place: Path) -> Path:
    """The same rows without the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "other.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    return place / "other.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_is_refused(name: str, killed: Path, runs: Runs, tmp_path: Path) -> None:
    words, what = CHANGES[name]
    command = runs.commands["finetune"]
    before = files_of(killed)
    changed = Command("finetune", (*command.words, *words(runs, tmp_path)))
    assert_refused(Started(changed, killed, tmp_path / "logs"), what)
    assert files_of(killed) == before
