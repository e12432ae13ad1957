"""Trackers of --report_to: what they are told, and that a training does without them where they fail.

Each run is a process of its own, as `wandb` reads its variables and settings when it is first used.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tests.faults.runs import write_base, write_rows
from tests.launched import PATIENCE
from tests.warm_python import start_warm

QUICK = """
    --max_length 48 --max_steps 2 --logging_steps 1 --save_strategy steps --save_steps 1 --stop_check 0
    --preflight False --guards False --eval_on_start False
"""
# A tracker as transformers finds it by its package, which breaks during training.
BROKEN = """
runs = []
class Client: pass
def init(*arguments, **keywords):
    raise RuntimeError("no\\n  network")
"""


@pytest.fixture(scope="module")
def words(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("tracked")
    base = write_base(base_folder, place / "base")
    _, questions = write_rows(place / "rows", 8)
    return ["--model", str(base), "--train_files", str(questions), *QUICK.split()]


def train(words: list[str], folder: Path, log: Path, **variables: str) -> str:
    process = start_warm(["-m", "finetune", *words, "--output_dir", str(folder)], variables, log)
    assert process.wait(PATIENCE) == 0, log.read_text(encoding="utf-8")[-3000:]
    return log.read_text(encoding="utf-8")


def test_a_tracker_that_fails_ends_no_training(words: list[str], tmp_path: Path) -> None:
    package = tmp_path / "packages" / "trackio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN, encoding="utf-8")
    (package.parent / "trackio-1.0.dist-info").mkdir()
    (package.parent / "trackio-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: trackio\nVersion: 1.0\n"
    )
    printed = train(
        [*words, "--report_to", "trackio"], tmp_path / "run", tmp_path / "log",
        PYTHONPATH=f"{package.parent}:{Path(__file__).resolve().parents[2]}",
    )  # fmt: skip
    lines = [line for line in printed.splitlines() if "trackio" in line]
    assert lines == ["--report_to trackio fails and is left out; training continues: no network"]
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_that_goes_on_is_one_run_of_wandb_named_as_its_folder(words: list[str], tmp_path: Path) -> None:
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    folder = tmp_path / "我的小说"
    train([*words, "--report_to", "wandb"], folder, tmp_path / "log", **variables)
    description = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(description | {"status": "stopped"}), encoding="utf-8")
    shutil.rmtree(folder / "checkpoint-2")
    train([*words, "--report_to", "wandb"], folder, tmp_path / "log", **variables)
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(runs) == 2 and {run.name.rpartition("-")[2] for run in runs} == {description["id"]}
    for run in runs:
        (content,) = run.glob("*.wandb")
        stored = content.read_bytes()
        assert folder.name.encode() in stored and b"train/loss" in stored and b"eval/loss" in stored
