"""Nothing runs that came with a model or with data, and nothing goes to the network that nobody asked for."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dataset.__main__ import main as dataset
from finetune.__main__ import main as finetune
from finetune_lora.merge import main as merge
from novelgpt.export.to_safetensors import main as to_safetensors
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.loading import load_model
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.third_party import DECIDED_BY, SINGLE, disable_telemetry
from tests.launched import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
NOVEL = "第一章 灯塔\n" + "潮水退下去的时候，灯塔的影子正好落在那封没有寄出的信上。\n" * 60
# Notes and refuses every connection that leaves this machine, in any Python process started with it.
GUARD = """
import os, socket
def note(address):
    host = address[0] if isinstance(address, tuple) else None
    if host is None or host in ("", "::", "::1", "0.0.0.0", "localhost", socket.gethostname()) or host[:4] == "127.":
        return
    with open(os.environ["CONNECTIONS"], "a") as file:
        file.write(f"{host}\\n")
    raise OSError("no network here")
def guarded(function, place):
    def call(*words, **named):
        note(words[place] if isinstance(words[place], tuple) else (words[place] or "",))
        return function(*words, **named)
    return call
socket.socket.connect = guarded(socket.socket.connect, 1)
socket.socket.connect_ex = guarded(socket.socket.connect_ex, 1)
socket.getaddrinfo = guarded(socket.getaddrinfo, 0)
with open(os.environ["CONNECTIONS"], "a"):
    pass
"""


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.fixture
def copy(base_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(base_folder, tmp_path / "base")
    return tmp_path / "base"


def pickle_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Put the weights of a model or an adapter into a pickle, and return them."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = "pytorch_model.bin" if file.stem == "model" else "adapter_model.bin"
    torch.save(weights, folder / name)
    file.unlink()
    return weights


def adapter_on(base: Path, folder: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    return folder


def test_pickles_load_only_where_they_are_allowed(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    weights = pickle_weights(copy)
    with pytest.raises(UserError, match="reading a pickle can run code"):
        load_model(ModelArguments(str(copy)), tokenizer)
    loaded = load_model(ModelArguments(str(copy), allow_pickles=True), tokenizer).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_an_adapter_in_a_pickle_loads_only_where_that_is_allowed(
    copy: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_on(copy, tmp_path / "adapter")
    pickle_weights(adapter)
    with pytest.raises(UserError, match=r"adapter_model\.bin"):
        load_for_inference(ModelArguments(str(adapter)), tokenizer)
    with pytest.raises(SystemExit):
        merge([str(adapter), str(tmp_path / "merged")])
    assert "adapter_model.bin" in capsys.readouterr().err
    load_for_inference(ModelArguments(str(adapter), allow_pickles=True), tokenizer)
    pickle_weights(copy)  # and so for the base beneath it
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        to_safetensors([str(adapter), str(tmp_path / "safe")])
        load_for_inference(ModelArguments(str(tmp_path / "safe")), tokenizer)


@pytest.mark.parametrize("allowed", [False, True])
def test_code_in_a_pickle_never_runs(
    allowed: bool, copy: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_model(ModelArguments(str(copy), allow_pickles=allowed), tokenizer)
    with pytest.raises(SystemExit):
        to_safetensors([str(copy), str(tmp_path / "safe")])
    assert "nothing else is read from a pickle" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "safe").exists()


def test_pickles_of_a_run_are_never_opened_to_go_on_from(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint without a manifest is none, whatever pickles lie in it."""
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "灯塔下有什么？", "completion": "一封信。"}\n' * 4, encoding="utf-8")
    words = ["--model", str(copy), "--train_files", str(rows), "--valid_files", str(rows), "--output_dir", str(run)]
    words += ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--stop_check", "0"]
    finetune(words)
    description = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(description | {"status": "running"}), encoding="utf-8")
    checkpoint = run / "checkpoint-1"
    for file in (checkpoint / "manifest.json", *checkpoint.glob("*.safetensors")):
        file.unlink()
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Code(tmp_path / "ran"), checkpoint / name)
    with pytest.raises(SystemExit) as ended:
        finetune([*words, "--resume", "True"])
    assert ended.value.code == 2, capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_converted_weights_are_the_same_and_code_stays_behind(copy: Path, tmp_path: Path) -> None:
    weights = pickle_weights(copy)
    (copy / "modeling.py").write_text("raise SystemExit", encoding="utf-8")
    to_safetensors([str(copy), str(tmp_path / "safe")])
    safe = load_file(tmp_path / "safe" / "model.safetensors")
    assert safe.keys() == weights.keys() and all(torch.equal(safe[name], weights[name]) for name in weights)
    expected = {path.name for path in copy.iterdir()} - {"modeling.py", "pytorch_model.bin"} | {"model.safetensors"}
    assert {path.name for path in (tmp_path / "safe").iterdir()} == expected


def started(module: str, *words: str, connections: Path) -> subprocess.CompletedProcess[str]:
    """A real process that is not told to be offline, and whose connections are noted."""
    guard = connections.with_suffix(".guard")
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    silenced = {*DECIDED_BY, *SINGLE, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in silenced}
    environment |= {
        "PYTHONPATH": f"{guard}{os.pathsep}{ROOT}",
        "CONNECTIONS": str(connections),
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.slow
def test_training_and_prediction_call_nobody(copy: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "灯塔下有什么？", "completion": "一封没有寄出的信。"}
    rows.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 8, encoding="utf-8")
    connections = tmp_path / "connections"
    short = ["--max_steps", "1", "--max_length", "64", "--stop_check", "0", "--save_strategy", "steps"]
    adapter = str(tmp_path / "lora")
    runs = [
        ("finetune_lora", "--model", str(copy), "--train_files", str(rows), *short, "--output_dir", adapter),
        ("predict", "--model", adapter, "--data_files", str(rows), "--max_new_tokens", "2"),
    ]  # fmt: skip
    for words in runs:
        done = started(*words, connections=connections)
        assert done.returncode == 0, done.stderr[-2000:]
    assert connections.read_text(encoding="utf-8") == ""  # there, so the guard was at work


def test_the_guard_notes_a_connection(tmp_path: Path) -> None:
    """Or the test above would say nothing."""
    connections = tmp_path / "connections"
    assert started("http.server", "--help", connections=connections).returncode == 0
    code = "import urllib.request as r; r.urlopen('http://example.com')"
    environment = os.environ | {"PYTHONPATH": str(connections.with_suffix(".guard")), "CONNECTIONS": str(connections)}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert connections.read_text(encoding="utf-8").split() == ["example.com"]


def test_what_the_user_decided_about_telemetry_stays() -> None:
    environment: dict[str, str] = {}
    disable_telemetry(environment)
    assert environment.keys() == {"HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", *SINGLE}
    decided = {"DO_NOT_TRACK": "0", "RAY_USAGE_STATS_ENABLED": "1"}
    environment = dict(decided)
    disable_telemetry(environment)
    assert decided.items() <= environment.items()
    assert "HF_HUB_DISABLE_TELEMETRY" not in environment


@pytest.mark.parametrize("module", ["pretrain", "finetune", "finetune_lora", "predict", "dataset", "novelgpt"])
def test_telemetry_is_off_before_any_library_is_imported(module: str) -> None:
    code = (
        f"import {module}, sys, os; "
        "assert not {'torch', 'transformers', 'huggingface_hub', 'peft', 'datasets'} & sys.modules.keys(); "
        "assert os.environ['DO_NOT_TRACK'] == '1'"
    )
    environment = {name: value for name, value in os.environ.items() if name not in DECIDED_BY}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_members_of_archives_stay_in_memory(tmp_path: Path) -> None:
    """Whatever their names: nothing is written but the output."""
    novels, output = tmp_path / "deep" / "novels", tmp_path / "deep" / "out"
    novels.mkdir(parents=True)
    outside = tmp_path / "absolute.txt"
    link = zipfile.ZipInfo("link.txt")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(novels / "novels.zip", "w") as archive:
        for name in ("../../up.txt", str(outside), "sub/../../beside.txt"):
            archive.writestr(name, NOVEL + name)
        archive.writestr(link, str(outside))
    before = {path for path in tmp_path.rglob("*") if output not in (path, *path.parents)}
    dataset(["novels", str(novels), str(output), "--workers", "1"])
    after = {path for path in tmp_path.rglob("*") if output not in (path, *path.parents)}
    assert after == before
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert (output / "manifest.json").is_file()
