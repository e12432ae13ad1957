"""What the doctor finds: broken models, wrong versions, a full disk, a taken port; and nothing in a sound run."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from novelgpt.budget.disk import forecast_disk
from novelgpt.checks import machine
from novelgpt.checks.devices import check_toolchain, find_nvcc, nvcc_release
from novelgpt.checks.findings import Finding, any_problem, run_check
from novelgpt.checks.longest_batch import check_trial, try_longest_batch
from novelgpt.checks.machine import MINIMUM, REQUIREMENTS, check_packages
from novelgpt.checks.run import check_checkpoints, check_memory, estimate_run, parse_run
from novelgpt.doctor import check_run
from novelgpt.settings.errors import UserError
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--max_length", "64"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def marks(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.mark for finding in findings}


def problems(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.mark == "problem"]


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny-random base, to break."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of sys.path, for `install`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(packages: Path, name: str, version: str, *needs: str) -> None:
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(metadata + "".join(f"Requires-Dist: {need}\n" for need in needs), encoding="utf-8")


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes them out."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def looked_at(folder: Path, *words: str, pipeline: str = "finetune") -> list[Finding]:
    given = ["--model", str(folder), *SHORT, *words]
    return run_check("run", partial(check_run, pipeline, given, 0.5))  # the trial has tests of its own


def test_a_check_that_fails_is_a_finding_and_what_it_found_before_stays() -> None:
    first = Finding("a", "ok", "good")

    def check(error: BaseException) -> Iterator[Finding]:
        yield first
        raise error

    kept, failed = run_check("b", partial(check, ZeroDivisionError("no\nlines")))
    assert kept == first
    assert (failed.check, failed.mark, "\n" in failed.text) == ("b", "problem", False)
    assert run_check("b", partial(check, UserError("cause", "remedy"))) == [
        first,
        Finding("b", "problem", "cause", "remedy"),
    ]


@pytest.mark.parametrize(("mark", "remedy"), [("ok", "do"), ("note", ""), ("problem", "")])
def test_a_remedy_goes_with_notes_and_problems_only(mark: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match="remedy"):
        Finding("a", mark, "text", remedy)


def test_minimum_versions_are_those_that_the_requirements_promise() -> None:
    promise = REQUIREMENTS.read_text(encoding="utf-8").splitlines()[0]
    for name, version in MINIMUM.items():
        assert f"{name} >= {version}" in promise


def test_versions_that_are_old_new_or_missing(packages: Path) -> None:
    requirements = packages / "requirements.txt"
    requirements.write_text(
        "torch==2.13.0\nrich==15.0.0  # tables\njieba==0.42.1\nno-such-package>=1\n", encoding="utf-8"
    )
    install(packages, "torch", "2.5.1+cu121")
    install(packages, "rich", "99.0")
    install(packages, "jieba", "0.1")
    found = {finding.check: finding for finding in check_packages(requirements)}
    expected = {"torch": "problem", "rich": "note", "jieba": "note", "no-such-package": "problem"}
    assert {name: finding.mark for name, finding in found.items()} == expected
    assert "newer" in found["rich"].text
    assert "older" in found["jieba"].text
    assert "torch==2.13.0" in found["torch"].remedy


def test_packages_that_do_not_fit_each_other(packages: Path) -> None:
    requirements = packages / "requirements.txt"
    requirements.write_text("alpha==1\nbeta==1\n", encoding="utf-8")
    install(packages, "alpha", "1", "beta>=1", 'gamma; extra == "more"')
    install(packages, "beta", "1")
    assert problems(list(check_packages(requirements))) == []
    install(packages, "delta", "1", "beta>=2")
    requirements.write_text("alpha==1\nbeta==1\ndelta==1\n", encoding="utf-8")
    assert problems(list(check_packages(requirements))) == ["delta"]


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        (taken,) = machine.check_port()
    assert taken.mark == "problem"
    monkeypatch.setenv("MASTER_PORT", taken.remedy.rpartition("=")[2])
    assert [finding.mark for finding in machine.check_port()] == ["ok"]
    for wrong in ("abc", "70000"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        assert [finding.mark for finding in machine.check_port()] == ["problem"]


def test_a_full_disk(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = parse_run("finetune", ["--model", str(base_folder), *SHORT, "--output_dir", str(tmp_path / "a" / "b")])
    plan, size = estimate_run(run), 0
    assert marks(list(check_memory(plan)))["memory"] == "ok"
    assert plan.model is not None
    need = forecast_disk(plan.model, plan.training, size).need
    for free, mark in ((need, "ok"), (need - 1, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10**15, 0, free))
        assert [finding.mark for finding in check_checkpoints(plan, size)] == [mark]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 0))
    assert [finding.mark for finding in machine.check_disk_space(tmp_path / "new")] == ["problem"]
    assert [finding.mark for finding in machine.check_shared_memory(tmp_path)] == ["note"]


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["㊀", "㊁"])
    tokenizer.save_pretrained(folder)
    found = looked_at(folder)
    assert problems(found) == ["vocabulary"]
    assert found[-1].mark == "note"
    assert "fix the problems" in found[-1].remedy


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    found = looked_at(folder)
    assert problems(found) == ["tokenizer"]
    assert "end token" in next(finding.text for finding in found if finding.check == "tokenizer")


def test_a_folder_without_a_template_names_the_one_that_is_used(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", novelgpt_chat_template=None, chat_template=None)
    found = {finding.check: finding for finding in looked_at(folder)}
    assert found["chat template"].mark == "ok"
    assert found["chat template"].text.startswith("chatml")


def test_an_end_that_the_base_does_not_know(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=0)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert marks(looked_at(folder, pipeline="finetune_lora"))["end of answers"] == "note"


def test_damaged_or_missing_weights_and_unknown_models(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert problems(looked_at(folder)) == ["model files"]
    weights.unlink()
    assert problems(looked_at(folder)) == ["model files"]
    assert "download" in looked_at(Path("nobody/no-such-model"))[0].text
    assert any_problem(looked_at(tmp_path / "nothing"))


def test_code_that_lies_with_a_model_never_runs(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n", encoding="utf-8")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", model_type="evil", auto_map=names)
    for words in ([], ["--trust_remote_code", "True"]):
        assert any_problem(looked_at(folder, *words))
    assert not (folder / "ran").exists()


def test_settings_that_a_run_would_refuse(base_folder: Path, tmp_path: Path) -> None:
    assert "settings" in problems(looked_at(base_folder, "--max_length", "1000000"))
    assert "settings" in problems(looked_at(base_folder, "--train_files", str(tmp_path / "none.jsonl")))
    assert problems(looked_at(base_folder, "--learning_rat", "1")) == ["run"]
    (tmp_path / "empty.jsonl").touch()
    assert "data" in problems(looked_at(base_folder, "--train_files", str(tmp_path / "empty.jsonl")))


def test_a_model_that_does_not_fit_is_not_loaded(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=2**15, num_hidden_layers=20, layer_types=["full_attention"] * 20)
    words = ["--model", str(folder), *SHORT]
    plan = estimate_run(parse_run("finetune", words))
    assert marks(list(check_memory(plan))) == {"memory": "problem"}
    assert marks(list(check_trial(plan.run, plan, "finetune", words, 60))) == {"longest batch": "note"}


def test_the_longest_batch_is_tried_on_the_weights_themselves(folder: Path) -> None:
    words = ["--model", str(folder), *SHORT, "--per_device_train_batch_size", "1"]
    sound = run_check("model", partial(try_longest_batch, parse_run("finetune_lora", words)))
    assert marks(sound) == {"model": "ok", "longest batch": "ok"}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = run_check("run", partial(try_longest_batch, parse_run("finetune", words)))
    assert [finding.mark for finding in found] == ["ok", "problem"]
    assert "model.norm" in found[1].text


def test_a_trial_that_takes_too_long_is_ended(base_folder: Path) -> None:
    words = ["--model", str(base_folder), *SHORT]
    found = list(check_trial(parse_run("finetune", words), None, "finetune", words, 0.2))
    assert marks(found) == {"longest batch": "note"}


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "CUDA_HOME" in next(finding.text for finding in check_toolchain() if finding.mark != "ok")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n", encoding="utf-8")
    nvcc.chmod(0o755)
    assert find_nvcc() == nvcc
    assert nvcc_release(nvcc) == (12, 8)


def test_secrets_of_the_environment_are_not_shown() -> None:
    environment = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://me:secret@mirror.example/a", "HF_HUB_OFFLINE": "1"}
    found = list(machine.check_switches(environment))
    text = " ".join(finding.text for finding in found)
    assert "secret" not in text
    assert "mirror.example" in text
    assert "offline" in text


def test_the_command_line(base_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [warm_python(), "-m", "novelgpt.doctor", "--model", str(base_folder), "--pipeline", "pretrain"]
    command += [*SHORT, "--output_dir", str(tmp_path / "run"), "--json", str(report), "--time_limit", "300"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "HF_HUB_OFFLINE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    written = json.loads(report.read_text(encoding="utf-8"))
    findings = [Finding(**finding) for finding in written["findings"]]
    assert (done.returncode, done.stderr) == (0 if written["ok"] else 2, "")
    assert written["ok"] == (problems(findings) == [])
    assert all(f"{finding.check}: {finding.text}" in done.stdout for finding in findings)
    of_run = findings[[finding.check for finding in findings].index("settings") :]
    assert {finding.mark for finding in of_run} == {"ok"}
    assert of_run[-1].check == "longest batch"
    assert not (tmp_path / "run").exists()


def test_words_that_need_a_model() -> None:
    command = [sys.executable, "-m", "novelgpt.doctor", "--learning_rate", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 2)


def test_libraries_that_cannot_be_imported_are_findings(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "rich"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('libcudart.so.99: no such file')\n", encoding="utf-8")
    command = [sys.executable, "-m", "novelgpt.doctor", "--model", "anything", "--json", str(tmp_path / "report.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (2, "")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["findings"]
    failed = {finding["check"] for finding in written if "libcudart.so.99" in finding["text"]}
    assert failed == {"torch", "run"}
