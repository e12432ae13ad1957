"""A single process on a CPU trains where SIGUSR1, fcntl and other parts of Unix do not exist, without DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from novelgpt.launch.__main__ import main as launch
from tests.launched import OF_LAUNCHERS
from tests.warm_python import start_warm

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_without_the_parts_that_windows_lacks_is_the_same(base_folder: Path, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "灯塔下有什么？", "completion": "一封没有寄出的信。"}, ensure_ascii=False) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 8, encoding="utf-8")
    words = ["finetune_lora", "--model", str(base_folder), "--max_steps", "2", "--save_steps", "1", "--stop_check", "0"]
    words += ["--train_files", str(tmp_path / "rows.jsonl"), "--valid_files", str(tmp_path / "rows.jsonl")]
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/end_to_end/without_unix.py"), *words, "--output_dir", str(elsewhere)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert start_warm(["-m", *words, "--output_dir", str(here)], {}, tmp_path / "log").wait() == 0
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (elsewhere, here)]
    assert weights[0].keys() == weights[1].keys()
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    assert json.loads((elsewhere / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert {path.name for path in elsewhere.glob("checkpoint-*")} == {path.name for path in here.glob("checkpoint-*")}


def test_several_processes_are_refused_where_they_could_not_be_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(os, "killpg")
    with pytest.raises(SystemExit) as end:
        launch(["--processes", "2", "finetune", "--model", "tiny"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: on this system, several processes")
