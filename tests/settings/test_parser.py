"""What stands in YAML files and on command lines: homes, mappings, lists, words that YAML reads as something else."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import dataset.preview
from finetune_lora import merge
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import check_folder_can_be_made
from novelgpt.settings.remedies import pip_install, python_module
from novelgpt.settings.runs import FinetuneRun, LoraRun, PredictRun, PretrainRun, TrainingRun
from novelgpt.settings.terminal import counted

MODEL = ["--model", "someone/novel"]


def from_yaml(folder: Path, text: str, run: type[TrainingRun] = FinetuneRun) -> Any:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return parse_arguments(run, [*MODEL, "--config", str(folder / "mine.yaml")])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the user's, and another folder to be in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("run_type", [PretrainRun, FinetuneRun, LoraRun])
def test_a_tilde_is_the_home_in_every_path(run_type: type[TrainingRun], home: Path) -> None:
    (home / "zero.json").write_text("{}", encoding="utf-8")
    paths = {"train_files": ["~/a.jsonl", "b~.jsonl"], "valid_files": ["~/v.jsonl"], "output_dir": "~/run"}
    paths |= {"model": "~/base", "resume_from_checkpoint": "~/run/checkpoint-3"}
    if run_type is not PretrainRun:
        paths |= {"instruction_templates": ["~/t.yaml"]}
    expected = {
        name: [word.replace("~/", f"{home}/") for word in value] if isinstance(value, list) else f"{home}{value[1:]}"
        for name, value in paths.items()
    }
    (home / "mine.yaml").write_text(json.dumps(paths), encoding="utf-8")
    words = [word for name, value in paths.items() for word in _words(name, value)]
    for given in (["--config", "~/mine.yaml"], ["--config=~/mine.yaml"], words):
        run = parse_arguments(run_type, given)
        told = {name: value for group in vars(run).values() for name, value in vars(group).items() if name in paths}
        assert told == expected, given
    assert list((home.parent / "here").iterdir()) == []


def _words(name: str, value: str | list[str]) -> list[str]:
    """As a shell hands on what stands behind an equals sign: it expands no `~` there."""
    return [f"--{name}={value}"] if isinstance(value, str) else [f"--{name}", *value]


def test_a_tilde_is_the_home_for_prediction_and_small_commands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = parse_arguments(PredictRun, ["--model=~/m", "--data_files=~/d.jsonl", "--output_dir=~/o"])
    assert (run.model.model, run.data.data_files) == (f"{home}/m", [f"{home}/d.jsonl"])
    assert run.data.output_dir == f"{home}/o"
    (home / "rows.jsonl").write_text('{"prompt": "灯塔下有什么？", "completion": "一封信。"}\n', encoding="utf-8")
    dataset.preview.main(["~/rows.jsonl", "--html=~/page.html"])
    assert (home / "page.html").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        merge.main(["~/adapter", "~/merged"])
    assert str(home / "adapter") in capsys.readouterr().err
    parser = CommandParser(prog="any")
    parser.add_argument("--file", type=Path, nargs="+")
    assert parser.parse_args(["--file", "~/a", "./b"]).file == [home / "a", Path("b")]


MAPPINGS: dict[str, tuple[str, Any]] = {
    "lr_scheduler_kwargs": ("{num_cycles: 2}", {"num_cycles": 2}),
    "activation_checkpointing_kwargs": ("{use_reentrant: false}", {"use_reentrant": False}),
    "gradient_checkpointing_kwargs": ("{use_reentrant: true}", {"use_reentrant": True}),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_are_taken_from_yaml_and_as_json(name: str, tmp_path: Path) -> None:
    text, expected = MAPPINGS[name]
    assert vars(from_yaml(tmp_path, f"{name}: {text}\n").training)[name] == expected
    indented = "".join(f"\n  {key}: {str(value).lower()}" for key, value in expected.items())
    assert vars(from_yaml(tmp_path, f"{name}:{indented}\n").training)[name] == expected
    as_text = json.dumps(expected)
    assert vars(from_yaml(tmp_path, f"{name}: '{as_text}'\n").training)[name] == expected
    run = parse_arguments(FinetuneRun, [*MODEL, f"--{name}", as_text])
    assert vars(run.training)[name] == expected


def test_further_mappings(tmp_path: Path) -> None:
    training = from_yaml(tmp_path, "accelerator_config: {even_batches: false}\n").training
    assert training.accelerator_config.even_batches is False
    training = from_yaml(tmp_path, "optim: sgd\noptim_args: {momentum: 0.9, nesterov: true}\n").training
    assert training.optim_args == "momentum=0.9,nesterov=True"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("learning_rate: {a: 1}", "learning_rate takes one value, not a dict"),
        ("learning_rate: [1]", "learning_rate takes one value, not a list"),
        ("train_files: [{a: 1}]", "train_files holds {'a': 1} in place of a single value"),
        ("lr_scheduler_kwargs: two", "lr_scheduler_kwargs: 'two' does not fit: 'two' is not a mapping in JSON"),
        ("lr_scheduler_kwargs: '[1]'", "is not a mapping in JSON"),
        ("num_train_epochs:", "num_train_epochs has no value"),
        ("model:", "model has no value"),
        ("valid_files:", "valid_files has no value"),
        ("seed: [", "is not YAML"),
    ],
)
def test_other_shapes_are_refused_by_file_and_key(text: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        from_yaml(tmp_path, f"{text}\n")
    assert "mine.yaml" in refusal.value.cause and cause in refusal.value.cause


def test_words_of_yaml_are_the_options_own(tmp_path: Path) -> None:
    training = from_yaml(tmp_path, "eval_strategy: no\nresume_from_checkpoint: true\nsave_total_limit:\n").training
    assert (training.eval_strategy.value, training.resume_from_checkpoint) == ("no", "true")
    assert training.save_total_limit is None
    assert from_yaml(tmp_path, "packing: false\n").data.packing is False


def test_remedies_name_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my env/bin/python")
    assert pip_install("datatrove[ray]") == "'/opt/my env/bin/python' -m pip install 'datatrove[ray]'"
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert python_module("dataset novels IN OUT") == ".venv/bin/python -m dataset novels IN OUT"
    with pytest.raises(UserError) as refusal:
        CommandParser(prog="python -m dataset tokens").parse_args(["--nothing"])
    assert refusal.value.remedy == "see `.venv/bin/python -m dataset tokens --help`"


def test_one_is_no_several() -> None:
    told = [counted(number, "problem") for number in (0, 1, 2, 1000)]
    assert told == ["0 problems", "1 problem", "2 problems", "1,000 problems"]
    assert [counted(number, "pair of books") for number in (1, 2)] == ["1 pair of books", "2 pairs of books"]
    assert [counted(number, "process") for number in (1, 2)] == ["1 process", "2 processes"]


def test_numbers_in_mappings_are_read_as_numbers(tmp_path: Path) -> None:
    text = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    assert from_yaml(tmp_path, text).training.lr_scheduler_kwargs == {"min_lr": 1e-6}
    text = "deepspeed: {zero_optimization: {stage: 2, reduce_bucket_size: 5e8, offload_optimizer: {device: cpu}}}\n"
    stage = from_yaml(tmp_path, text).training.deepspeed["zero_optimization"]
    assert stage == {"stage": 2, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu"}}
    assert from_yaml(tmp_path, "output_dir: 1e5\n").training.output_dir == "1e5"  # a name stays as it is written


@pytest.mark.parametrize("number", [".nan", "-.inf", "1e999"])
def test_numbers_in_mappings_that_are_none_are_refused(number: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: lr_scheduler_kwargs\.min_lr"):
        from_yaml(tmp_path, f"lr_scheduler_kwargs: {{min_lr: {number}}}\n")
    with pytest.raises(UserError, match="NaN is not a number"):
        parse_arguments(FinetuneRun, [*MODEL, "--lr_scheduler_kwargs", '{"min_lr": NaN}'])


def test_no_tracker_may_be_written_as_none(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "report_to: null\n").training.report_to == []


def test_what_only_a_launcher_passes_is_no_key(tmp_path: Path) -> None:
    for key in ("deepspeed_by_default", "_deepspeed_by_default", "config"):
        with pytest.raises(UserError, match=f"unknown option '{key}'"):
            from_yaml(tmp_path, f"{key}: zero.json\n")


@pytest.mark.parametrize("option", ["--output_dir", "--train_files", "--model", "--config"])
def test_names_that_are_no_utf8_are_refused(option: str, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xe4")
    with pytest.raises(UserError, match="is not UTF-8"):
        parse_arguments(FinetuneRun, [*MODEL, option, name])
    with pytest.raises(UserError, match="is not UTF-8"):  # as where a relative name is meant from such a folder
        check_folder_can_be_made(tmp_path / name / "run", "--output_dir run")


def test_settings_in_a_folder_that_is_replaced_are_not_lost(tmp_path: Path) -> None:
    text = f"output_dir: {tmp_path}\noverwrite_output_dir: true\n"
    with pytest.raises(UserError, match=r"would delete .*mine\.yaml, which --config names"):
        from_yaml(tmp_path, text)
    assert from_yaml(tmp_path, text.replace("true", "false")).training.output_dir == str(tmp_path)


def test_the_former_name_of_an_option_is_taken_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("train_mark_tokens: always\n", encoding="utf-8")
    for args in (["--train_mark_tokens", "always"], ["--train-special-tokens=always"], ["--config", str(settings)]):
        assert parse_arguments(LoraRun, [*args, "--output_dir", str(tmp_path)]).lora.train_special_tokens == "always"
    settings.write_text("train_mark_tokens: always\ntrain_special_tokens: never\n", encoding="utf-8")
    with pytest.raises(UserError, match="train_special_tokens is set by two names"):
        parse_arguments(LoraRun, ["--config", str(settings)])
    settings.write_text("train_mark_tokens: sometimes\n", encoding="utf-8")
    with pytest.raises(UserError, match="train_special_tokens: 'sometimes' is not one of"):
        parse_arguments(LoraRun, ["--config", str(settings)])
