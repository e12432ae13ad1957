"""What a user can get wrong ends in one line of cause, one of remedy, exit status 2, and nothing left behind."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.bad_inputs import CASES, FILES, FOLDERS
from tests.launched import PATIENCE
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ("pretrain", "finetune", "finetune_lora")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the user types in."""
    work = tmp_path / "work"
    work.mkdir()
    for name, content in FILES.items():
        (work / name).write_bytes(content)
    return work


def prepare(name: str, base: Path, tmp_path: Path) -> tuple[str, list[str], str]:
    """Module, complete words and expected cause of a case; makes the folders it names."""
    module, given, cause = CASES[name]
    words = [word.replace("{base}", str(base)).replace("{tmp}", str(tmp_path)) for word in given]
    for key, build in FOLDERS.items():
        if any(f"{{{key}}}" in word for word in words):
            build(base, tmp_path / key)
            words = [word.replace(f"{{{key}}}", str(tmp_path / key)) for word in words]
    pipeline = module in (*TRAININGS, "predict")
    if (pipeline or module == "predict.chat") and "--model" not in words:
        words = ["--model", str(base), *words]
    if pipeline and "--output_dir" not in words:
        words = ["--output_dir", str(tmp_path / "out"), *words]
    return module, words, cause


def state_of(*folders: Path) -> dict[Path, int | None]:
    """All that lies in the folders, with the time of each file's last change."""
    return {
        path: path.stat().st_mtime_ns if path.is_file() else None for folder in folders for path in folder.rglob("*")
    }


def run(module: str, words: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a real process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [warm_python(), "-m", module, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stderr + done.stdout


def call(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The same of `main`, in this process: starting one for each case would take minutes."""
    package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    with pytest.raises(SystemExit) as exit_information:
        main(words)
    captured = capsys.readouterr()
    return exit_information.value.code, captured.err + captured.out  # type: ignore[return-value]


def check(status: int, output: str, cause: str) -> None:
    lines = [line for line in output.splitlines() if line.startswith(("error:", "  fix:"))]
    assert status == 2, output
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  fix: "), output
    assert cause in lines[0]
    assert "Traceback" not in output


@pytest.mark.parametrize("name", CASES)
def test_cause_remedy_and_status_2(
    name: str,
    folder: Path,
    base_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    module, words, cause = prepare(name, base_folder, tmp_path)
    before = state_of(tmp_path, base_folder)
    status, output = call(module, words, capsys)
    check(status, output, cause)
    assert state_of(tmp_path, base_folder) == before


REAL = ["unknown flag", "predict: missing file", "merge: no adapter", "tokens: empty file"]


@pytest.mark.parametrize("name", REAL)
def test_the_same_from_a_real_process(
    name: str, folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    module, words, cause = prepare(name, base_folder, tmp_path)
    before = state_of(tmp_path, base_folder)
    check(*run(module, words), cause)
    assert state_of(tmp_path, base_folder) == before
