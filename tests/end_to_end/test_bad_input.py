"""What a user can get wrong ends in one line of cause, one of remedy, exit status 2, and nothing left behind."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD_ROW = json.dumps({"prompt": "问", "completion": "答"}, ensure_ascii=False) + "\n"


def run(module: str, words: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a real process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    return done.returncode, done.stderr + done.stdout


def call(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The same of `main`, in this process: starting one for each case would take minutes."""
    main = importlib.import_module(module if "." in module else f"{module}.__main__").main
    with pytest.raises(SystemExit) as exit_information:
        main(words)
    captured = capsys.readouterr()
    return exit_information.value.code, captured.err + captured.out  # type: ignore[return-value]


def without_tokenizer(base: Path, folder: Path) -> str:
    shutil.copytree(base, folder / "bare")
    for file in (folder / "bare").glob("*token*"):
        file.unlink()
    return str(folder / "bare")


def other_run(folder: Path) -> str:
    (folder / "taken").mkdir()
    (folder / "taken" / "run.json").write_text('{"pipeline": "pretrain", "status": "finished", "started": "2026"}')
    return str(folder / "taken")


# name: (module, words, words of the cause). FILES are made below; {base} and {tmp} are filled in.
CASES = {
    "missing file": ("pretrain", ["--train_files", "nowhere.txt"], "nowhere.txt"),
    "empty file": ("pretrain", ["--train_files", "empty.txt"], "empty.txt is empty"),
    "blank file": ("finetune", ["--train_files", "blank.jsonl"], "blank.jsonl is empty"),
    "row without the text field": (
        "pretrain",
        ["--train_files", "no_text.jsonl"],
        "no_text.jsonl:2: no text in field 'text'",
    ),
    "row of no shape": (
        "finetune",
        ["--train_files", "no_shape.jsonl"],
        "no_shape.jsonl:2: the row has the fields foo",
    ),
    "role nobody knows": (
        "finetune_lora",
        ["--train_files", "role.jsonl"],
        "role.jsonl:1: field messages[0].role is 'robot'",
    ),
    "invalid JSON": ("finetune", ["--train_files", "broken.jsonl"], "broken.jsonl:3: invalid JSON"),
    "undecodable bytes": ("pretrain", ["--train_files", "bytes.txt"], "bytes.txt: byte 0xff at offset 12"),
    "unknown suffix": ("finetune", ["--train_files", "rows.docx"], "rows.docx: no reader for .docx"),
    "folder that does not exist": ("pretrain", ["--model", "./nowhere"], "model folder ./nowhere does not exist"),
    "model without tokenizer": ("finetune_lora", ["--model", "{bare}"], "holds no tokenizer"),
    "unknown flag": ("finetune_lora", ["--learnin_rate", "1"], "unknown option '--learnin_rate'"),
    "wrong type": ("pretrain", ["--learning_rate", "fast"], "invalid float value: 'fast'"),
    "wrong choice": ("finetune", ["--overlong", "eat"], "invalid choice: 'eat'"),
    "unknown key in YAML": ("pretrain", ["--config", "typo.yaml"], "unknown option 'learning_rats' in typo.yaml"),
    "broken YAML": ("pretrain", ["--config", "broken.yaml"], "broken.yaml is not YAML"),
    "no trainable token": (
        "finetune",
        ["--train_files", "rows.jsonl", "--valid_files", "rows.jsonl", "--max_length", "3"],
        "no trainable token is left",
    ),
    "row above the length": (
        "finetune",
        ["--train_files", "rows.jsonl", "--max_length", "5", "--overlong", "refuse", "--valid_fraction", "0.5"],
        "tokens, above --max_length 5",
    ),
    "a negative number of sample predictions": (
        "finetune",
        ["--predict_during_eval", "-1"],
        "--predict_during_eval -1 is too small",
    ),
    "folder of another run": ("finetune", ["--output_dir", "{taken}"], "holds another run (pretrain, finished"),
    "overwrite and resume at once": (
        "finetune",
        ["--output_dir", "{taken}", "--overwrite_output_dir", "--resume_from_checkpoint", "true"],
        "--overwrite_output_dir would delete",
    ),
    "folder with other files": ("finetune", ["--output_dir", "."], "holds files that are no run's"),
    "no LoRA target": ("finetune_lora", ["--lora_targets", "w_pack"], "--lora_targets w_pack"),
    "QLoRA without a GPU": ("finetune_lora", ["--qlora", "True"], "--qlora needs a CUDA device"),
    "predict: missing file": ("predict", ["--data_files", "nowhere.jsonl", "--output_dir", "{tmp}/p"], "nowhere.jsonl"),
    "predict: unknown flag": ("predict", ["--max_tokens", "3"], "unknown option '--max_tokens'"),
    "score: row without the field": ("predict.score", ["rows.jsonl"], "rows.jsonl:1: field prediction is missing"),
    "merge: no adapter": ("finetune_lora.merge", ["{base}", "{tmp}/m"], "holds no adapter_config.json"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    files = {
        "empty.txt": b"",
        "blank.jsonl": b"\n \n",
        "no_text.jsonl": '{"text": "好"}\n{"body": "坏"}\n'.encode(),
        "no_shape.jsonl": (GOOD_ROW + '{"foo": 1}\n').encode(),
        "role.jsonl": b'{"messages": [{"role": "robot", "content": "hi"}]}\n',
        "broken.jsonl": (GOOD_ROW + GOOD_ROW + '{"prompt": "x", \n').encode(),
        "bytes.txt": "一二三四".encode() + b"\xff\xfe\xff and more",
        "rows.docx": b"rows",
        "rows.jsonl": (GOOD_ROW * 4).encode(),
        "typo.yaml": b"learning_rats: 1\n",
        "broken.yaml": b"a: [1\n",
    }
    for name, content in files.items():
        (work / name).write_bytes(content)
    return work


def prepare(name: str, base_folder: Path, tmp_path: Path) -> tuple[str, list[str], str]:
    """Module, complete words and expected cause of a case."""
    module, words, cause = CASES[name]
    values = {"{base}": str(base_folder), "{tmp}": str(tmp_path)}
    if "{bare}" in words:
        values["{bare}"] = without_tokenizer(base_folder, tmp_path)
    if "{taken}" in words:
        values["{taken}"] = other_run(tmp_path)
    for key, value in values.items():
        words = [word.replace(key, value) for word in words]
    if module in ("pretrain", "finetune", "finetune_lora", "predict") and "--model" not in words:
        words = ["--model", str(base_folder), *words]
    if module in ("pretrain", "finetune", "finetune_lora") and "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    return module, words, cause


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
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    status, output = call(module, words, capsys)
    check(status, output, cause)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["invalid JSON", "unknown flag", "predict: missing file", "merge: no adapter"])
def test_the_same_from_a_real_process(
    name: str, folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    module, words, cause = prepare(name, base_folder, tmp_path)
    check(*run(module, words), cause)
