"""USE_MODELSCOPE_HUB chooses the hub, in every command that looks names up; the command line and files win."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from novelgpt.checks import machine
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun, LoraRun, PredictRun, PretrainRun
from predict.chat import ChatRun
from tests.warm_python import ROOT, warm_python

OF_TRAINING = ["--model", "someone/novel"]


@pytest.mark.parametrize(("value", "hub"), [("1", "modelscope"), ("True", "modelscope"), ("0", ""), ("", "")])
def test_the_variable_is_the_default_of_every_command(
    value: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", value)
    hub = hub or "huggingface"
    (tmp_path / "mine.yaml").write_text("hub: huggingface\n", encoding="utf-8")
    runs: list[Any] = [PretrainRun, FinetuneRun, LoraRun, PredictRun, ChatRun]
    for run in runs:
        for words, expected in (
            ([], hub), (["--hub", "huggingface"], "huggingface"), (["--hub", "modelscope"], "modelscope"),
            (["--config", str(tmp_path / "mine.yaml")], "huggingface"),
        ):  # fmt: skip
            groups = vars(parse_arguments(run, [*OF_TRAINING, *words])).values()
            (named,) = [vars(group)["hub"] for group in groups if "hub" in vars(group)]
            assert ModelArguments("someone/novel", hub=named).hub == expected, (run, words)
    assert ModelArguments("someone/novel").hub == hub  # of commands without the option: merge, export, preview
    (found,) = [finding for finding in machine.check_switches(dict(os.environ)) if finding.check == "hub"]
    assert ("ModelScope" in found.text) == (hub == "modelscope")


def test_what_is_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "maybe")
    with pytest.raises(UserError, match="USE_MODELSCOPE_HUB=maybe is neither yes nor no"):
        parse_arguments(PretrainRun, OF_TRAINING)


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--model", "someone/novel", "--output_dir", "OUT"],
        ["dataset", "tokens", "a.txt", "OUT", "--model", "a/b"],
        ["dataset", "preview", "rows.jsonl", "--model", "a/b"],
        ["finetune_lora", "--model", "a/b", "--train_files", "rows.jsonl"],
    ],
)
def test_commands_ask_modelscope_for_names(words: list[str], tmp_path: Path) -> None:
    """The package is not installed here, which is said by the code that would download from it."""
    (tmp_path / "a.txt").write_text("灯塔", encoding="utf-8")
    row = {"prompt": "灯塔下有什么？", "completion": "一封信。"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "modelscope.py").write_text("raise ImportError\n", encoding="utf-8")
    environment = os.environ | {"USE_MODELSCOPE_HUB": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [warm_python(), "-m", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert (done.returncode, "needs the package modelscope" in done.stderr) == (2, True), done.stderr
