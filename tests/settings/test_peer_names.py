"""Names of other tools: told where they are unknown, taken where they name a model."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.peer_names import OTHER_NAMES, PEER_NAMES, TOOLS
from novelgpt.settings.runs import FinetuneRun, LoraRun, PredictRun, PretrainRun

ROOT = Path(__file__).resolve().parents[2]
RUNS = (PretrainRun, FinetuneRun, LoraRun, PredictRun)
TRAININGS = RUNS[:3]


def options_of(run: Any) -> set[str]:
    groups = [hint for hint in typing.get_type_hints(run).values() if dataclasses.is_dataclass(hint)]
    return {field.name for group in groups for field in dataclasses.fields(group)}


OURS = set().union(*map(options_of, RUNS))


def test_each_counterpart_is_an_option_of_ours_and_no_name_of_a_peer_is() -> None:
    assert {option for name in PEER_NAMES.values() for option in name.options} - OURS == set()
    assert (PEER_NAMES.keys() | set(OTHER_NAMES)) & OURS == set()
    for key, name in PEER_NAMES.items():
        assert set(name.options) <= set(re.findall(r"\w+", name.here)), f"{key} does not say its options"


@pytest.mark.parametrize("page", ["docs/coming_from.md", "docs/zh/coming_from.md"])
def test_the_pages_have_each_name_in_a_line_with_ours(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [(set(re.findall(r"`([^`]+)`", line.split("|")[1])), line) for line in lines if line.startswith("| `")]
    for key, name in PEER_NAMES.items():
        (line,) = [line for names, line in rows if key in names]
        assert set(name.options) <= set(re.findall(r"\w+", line.split("|")[3])), key
        assert all(TOOLS[letter] in line for letter in name.tools), key
    named = {key for names, line in rows for key in names if len(line.split("|")) == 5 and "There" not in line}
    assert named - PEER_NAMES.keys() - set(OTHER_NAMES) <= {"overwrite_output_dir"}


@pytest.mark.parametrize(
    ("run", "words", "told"),
    [
        (FinetuneRun, ["--cutoff_len", "2048"], "'--cutoff_len' in .*LLaMA-Factory.*: here max_length"),
        (LoraRun, ["--max-seq-length=9"], "'--max-seq-length' in the command line, .*: here max_length"),
        (LoraRun, "quantization_bit: 4", r"'quantization_bit' in .*mine\.yaml, .*: here qlora: true"),
        (LoraRun, "lora_target: all", "here lora_targets; all is all-linear"),
        (LoraRun, ["--train_type", "lora"], "ms-swift.*: here the pipeline says it: finetune_lora"),
        (PretrainRun, "warmup_ratio: 0.1", "here warmup_steps, a share where below 1: 0.1"),
        (FinetuneRun, "template: qwen", "here automatic: the tokenizer's own chat template; .*chat_template.jinja"),
        (FinetuneRun, "lora_target: all", "here lora_targets.* for another pipeline than finetune"),
        (PredictRun, ["--max_tokens", "9"], "here max_new_tokens, in predict$"),
    ],
)  # fmt: skip
def test_an_unknown_name_of_a_peer_is_answered_with_ours(run: Any, words: Any, told: str, tmp_path: Path) -> None:
    if isinstance(words, str):
        (tmp_path / "mine.yaml").write_text(f"{words}\n", encoding="utf-8")
        words = ["--config", str(tmp_path / "mine.yaml")]
    with pytest.raises(UserError) as refusal:
        parse_arguments(run, words)
    assert re.search(told, refusal.value.cause), refusal.value.cause
    assert "docs/coming_from.md" in refusal.value.remedy


def test_other_names_of_the_model_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text("model_name_or_path: someone/base\n", encoding="utf-8")
    config = ["--config", str(tmp_path / "base.yaml")]
    rows = ["--train_files", "my.jsonl"]
    for run in TRAININGS:
        assert parse_arguments(run, [*rows, *config]).model.model == "someone/base"
        for words in (["--model_name_or_path", "a/b"], ["--model-name-or-path=a/b"], ["--model", "a/b"]):
            assert parse_arguments(run, [*rows, *config, *words]).model.model == "a/b"  # the line wins over files
        with pytest.raises(UserError, match="model is a/b and model_name_or_path is a/c"):
            parse_arguments(run, ["--model", "a/b", "--model_name_or_path", "a/c", *rows])
        assert parse_arguments(run, ["--model", "a/b", "--model_name_or_path", "a/b", *rows]).model.model == "a/b"
        with pytest.raises(UserError, match="a training starts from a base") as refusal:
            parse_arguments(run, [*rows, "--adapter_name_or_path", "saves/lora"])
        assert "finetune_lora.merge" in refusal.value.remedy
    with pytest.raises(SystemExit):
        parse_arguments(LoraRun, ["--help_all"])
    assert not any(name in capsys.readouterr().out for name in OTHER_NAMES)


def test_an_adapter_and_its_base_are_told_apart_in_prediction(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("model_name_or_path: someone/base\nadapter_name_or_path: a/lora\n", "utf-8")
    named = parse_arguments(PredictRun, ["--config", str(tmp_path / "both.yaml")]).model
    assert (named.model, named.base) == ("a/lora", "someone/base")
    named = parse_arguments(PredictRun, ["--config", str(tmp_path / "both.yaml"), "--adapters", "b/lora"]).model
    assert (named.model, named.base) == ("b/lora", "someone/base")
    assert parse_arguments(PredictRun, ["--model_name_or_path=~/m"]).model.model == str(Path.home() / "m")
    named = parse_arguments(PredictRun, ["--adapter_name_or_path", "b/lora", "--base", "b/base"]).model
    assert (named.model, named.base) == ("b/lora", "b/base")
    with pytest.raises(UserError, match="model is a/b and adapter_name_or_path is b/lora"):
        parse_arguments(PredictRun, ["--model", "a/b", "--adapter_name_or_path", "b/lora"])
    with pytest.raises(UserError, match="base is x/y and model_name_or_path is a/b"):
        parse_arguments(PredictRun, ["--base", "x/y", "--model_name_or_path", "a/b", "--adapters", "b/lora"])
