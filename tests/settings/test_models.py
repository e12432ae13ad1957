"""Which model a command takes and which settings go with it: settled once, whatever names the model."""

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import dataset.preview
import dataset.tokens_command
import predict.__main__
import predict.chat
from finetune_lora import merge
from novelgpt.checks.run import parse_run
from novelgpt.model.hub import locate
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun, LoraRun, PredictRun, PretrainRun, TrainingRun
from novelgpt.settings.small_bases import SMALL_BASES, TINY, TINY_RANDOM
from tests import script_words

ROOT = Path(__file__).resolve().parents[2]
TRAININGS: dict[str, type[TrainingRun]] = {run.pipeline: run for run in (PretrainRun, FinetuneRun, LoraRun)}
SCRIPTS = {"pretrain": "run_pretrain.sh", "finetune": "run_finetune.sh", "finetune_lora": "run_lora.sh"}


def words_of(folder: Path, script: str, *words: str, **variables: str) -> list[str]:
    """The words that a script hands to its pipeline."""
    return script_words.words_of(folder, script, *words, **variables)[1:]


def settings_of(run: Any) -> dict[str, Any]:
    """All that a run was told, without what it chooses by itself."""
    groups = {name: vars(group) for name, group in vars(run).items()}
    plain = (str, int, float, bool, list, type(None))
    return {
        group: {name: value for name, value in values.items() if isinstance(value, plain)}
        for group, values in groups.items()
    }


def flat(run: TrainingRun) -> dict[str, Any]:
    return {name: value for group in settings_of(run).values() for name, value in group.items()}


def small_base_settings(pipeline: str, name: str) -> dict[str, Any]:
    path = ROOT / pipeline / "configs" / f"{name}.yaml"
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings


@pytest.mark.parametrize("name", SMALL_BASES)
@pytest.mark.parametrize("pipeline", TRAININGS)
def test_a_small_base_has_its_settings_however_it_is_named(pipeline: str, name: str, tmp_path: Path) -> None:
    run_type = TRAININGS[pipeline]
    (tmp_path / "mine.yaml").write_text(f"model: {name}\n", encoding="utf-8")
    expected = parse_arguments(run_type, ["--model", name])
    assert expected.model.model == str(SMALL_BASES[name])
    assert small_base_settings(pipeline, name).items() <= flat(expected).items()
    config = str(tmp_path / "mine.yaml")
    ways = [[f"--model={name}"], ["--config", config], ["--model", str(SMALL_BASES[name])]]
    scripts = [
        words_of(tmp_path, SCRIPTS[pipeline], MODEL=name),
        words_of(tmp_path, SCRIPTS[pipeline], "--config", config),
        words_of(tmp_path, SCRIPTS[pipeline], "--model", name, MODEL="another"),
    ]
    unnamed = [[], words_of(tmp_path, SCRIPTS[pipeline])] if name == TINY else []
    for words in (*ways, *scripts, *unnamed):
        assert settings_of(parse_arguments(run_type, words)) == settings_of(expected), words


@pytest.mark.parametrize("pipeline", TRAININGS)
def test_another_model_has_the_defaults_of_the_toolkit(pipeline: str, tmp_path: Path) -> None:
    run_type = TRAININGS[pipeline]
    config = tmp_path / "mine.yaml"
    config.write_text("model: someone/novel\ntrain_files: [rows.jsonl]\n", encoding="utf-8")
    data = ["--train_files", "rows.jsonl"]
    expected = settings_of(parse_arguments(run_type, ["--model", "someone/novel", *data]))
    defaults = run_type.__annotations__
    assert defaults  # the groups
    learning_rate = 1e-4 if pipeline == "finetune_lora" else 2e-5
    assert expected["training"]["learning_rate"] == learning_rate
    assert expected["training"]["save_strategy"] == "epoch"
    for words in (
        words_of(tmp_path, SCRIPTS[pipeline], "--config", str(config)),
        words_of(tmp_path, SCRIPTS[pipeline], *data, MODEL="someone/novel"),
        words_of(tmp_path, SCRIPTS[pipeline], "--model", "someone/novel", *data),
    ):
        assert settings_of(parse_arguments(run_type, words)) == expected, words


def test_what_the_user_sets_counts_more_than_the_settings_of_the_small_base(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: tiny\nlearning_rate: 3.0e-4\nlora_rank: 8\n", encoding="utf-8")
    run = parse_arguments(LoraRun, ["--config", str(config), "--lora_rank", "4"])
    assert (run.training.learning_rate, run.lora.lora_rank, run.lora.lora_alpha) == (3e-4, 4, 128)


@pytest.mark.parametrize("pipeline", TRAININGS)
def test_settings_of_deepspeed_that_are_named_take_the_place_of_the_launchers(pipeline: str, tmp_path: Path) -> None:
    shipped, mine, config = ROOT / "scripts" / "deepspeed", tmp_path / "zero.json", tmp_path / "mine.yaml"
    mine.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    config.write_text(f"deepspeed: {mine}\n", encoding="utf-8")
    sharded = tmp_path / "fsdp.yaml"
    sharded.write_text("fsdp: full_shard\n", encoding="utf-8")
    ways: list[tuple[list[str], dict[str, str], Path | None]] = [
        ([], {"NPROC": "2"}, shipped / "zero2.json"),
        ([], {"ZERO": "3", "OFFLOAD": "1"}, shipped / "zero3_offload.json"),
        ([], {"NPROC": "2", "ZERO": "0"}, None),
        (["--config", str(config)], {"NPROC": "2"}, mine),
        (["--config", str(config)], {"ZERO": "2"}, mine),
        (["--config", str(config)], {}, mine),
        (["--deepspeed", str(mine)], {"NPROC": "2"}, mine),
        (["--config", str(config), "--deepspeed", str(shipped / "zero3.json")], {"NPROC": "2"}, shipped / "zero3.json"),
        (["--config", str(sharded)], {"NPROC": "2"}, None),
    ]
    for words, variables, expected in ways:
        handed = words_of(tmp_path, SCRIPTS[pipeline], *words, MODEL="someone/novel", **variables)
        given = handed[handed.index(pipeline) + 1 :] if pipeline in handed else handed
        named = parse_arguments(TRAININGS[pipeline], given).training.deepspeed
        assert named == (None if expected is None else str(expected)), (words, variables)


@pytest.mark.parametrize("option", ["train_files", "valid_files"])
@pytest.mark.parametrize("pipeline", TRAININGS)
def test_files_of_ones_own_need_a_model(pipeline: str, option: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"{option}: [mine.jsonl]\n", encoding="utf-8")
    words = (
        [f"--{option}", "mine.jsonl"],
        ["--config", str(config)],
        words_of(tmp_path, SCRIPTS[pipeline], "--config", str(config)),
        words_of(tmp_path, SCRIPTS[pipeline], f"--{option}", "mine.jsonl"),
    )
    for given in words:
        with pytest.raises(UserError, match=f"--{option} names files of your own") as refusal:
            parse_arguments(TRAININGS[pipeline], given)
        assert all(way in refusal.value.remedy for way in ("MODEL=", "--model NAME", "--model tiny"))
    parse_arguments(TRAININGS[pipeline], [f"--{option}", "mine.jsonl", "--model", "tiny"])


def test_rows_of_ones_own_to_answer_need_a_model_or_a_finetuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if any((ROOT / "output").glob("**/run.json")):
        pytest.skip("there is a finished training to take")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        predict.__main__.main(["--data_files", "mine.jsonl"])
    assert "--data_files names rows of your own" in capsys.readouterr().err
    assert parse_arguments(PredictRun, []).model.model == ""


def test_tiny_is_a_small_base_and_dot_tiny_a_folder(base_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(base_folder)
    for name in SMALL_BASES:
        assert locate(ModelArguments(name)) == str(SMALL_BASES[name])
    assert (SMALL_BASES[TINY_RANDOM] / "config.json").is_file()  # built where it was not
    run = parse_arguments(FinetuneRun, ["--model", "./tiny"])
    assert locate(run.model) == str(tmp_path / "tiny")
    assert run.training.learning_rate == 2e-5


def test_each_command_knows_tiny(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "灯塔下有什么？", "completion": "一封信。"}\n', encoding="utf-8")
    (tmp_path / "book.txt").write_text("潮水退下去了。\n" * 9, encoding="utf-8")
    dataset.preview.main([str(rows), "--model", "tiny"])
    assert "一封信。" in capsys.readouterr().out
    dataset.preview.main([str(rows)])
    assert "no --model" in capsys.readouterr().out
    dataset.tokens_command.main([str(tmp_path / "book.txt"), str(tmp_path / "tokens"), "--model", "tiny"])
    assert "tokens of" in capsys.readouterr().out
    few = ["--max_new_tokens", "1"]
    data = ["--data_files", str(rows), "--output_dir", str(tmp_path / "answers")]
    predict.__main__.main(["--model", "tiny", *data, *few])
    assert (tmp_path / "answers" / "scores.json").is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO("/exit\n"))
    predict.chat.main(["--model", "tiny", *few])
    assert "raw text" in capsys.readouterr().out  # it has seen no conversation
    assert parse_run("finetune_lora", ["--model", "tiny"]).model.model == str(SMALL_BASES[TINY])
    with pytest.raises(SystemExit):
        merge.main([str(tmp_path), str(tmp_path / "merged"), "--base", "tiny"])
    assert f"{tmp_path} holds no adapter_config.json" in capsys.readouterr().err


def test_an_unfinished_run_is_no_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-9").mkdir(parents=True)
    (run / "checkpoint-12").mkdir()
    (run / "run.json").write_text('{"status": "stopped"}', encoding="utf-8")
    with pytest.raises(UserError, match="has not finished") as refusal:
        locate(ModelArguments(str(run)))
    assert str(run / "checkpoint-12") in refusal.value.remedy


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("./nowhere", "model folder ./nowhere does not exist"),
        ("runs/nowhere", "model folder runs/nowhere does not exist"),
        ("someone/novel", "someone/novel is not a folder that results could be written into"),
        ("unfinished", "the training run in unfinished has not finished"),
        ("empty", "model folder empty is empty"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "lm_eval"])
def test_a_missing_model_is_told_as_that(
    command: str, name: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from predict import lm_eval_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        (predict.__main__.main if command == "predict" else lm_eval_run.main)(["--model", name])
    assert cause in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_asdict_of_model_arguments_names_the_folder() -> None:
    assert asdict(ModelArguments())["model"] == str(SMALL_BASES[TINY])


@pytest.mark.parametrize("how", ["command line", "file"])
def test_settings_of_deepspeed_have_names(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which come before files of the folder that the user is in, as the name of the small base does."""
    monkeypatch.chdir(tmp_path)

    def settings(name: str) -> Any:
        words = ["--deepspeed", name]
        if how == "file":
            (tmp_path / "mine.yaml").write_text(f"deepspeed: {name}\n", encoding="utf-8")
            words = ["--config", str(tmp_path / "mine.yaml")]
        return json.loads(Path(str(parse_arguments(FinetuneRun, words).training.deepspeed)).read_text("utf-8"))

    mine = {"zero_optimization": {"stage": 1}}
    (tmp_path / "zero2").write_text(json.dumps(mine), encoding="utf-8")
    for path in (ROOT / "scripts" / "deepspeed").iterdir():
        assert settings(path.stem) == json.loads(path.read_text("utf-8"))
    assert settings("./zero2") == mine
    with pytest.raises(UserError) as refused:
        settings("zero5")
    assert "zero1, zero2, zero2_offload, zero3, zero3_offload" in refused.value.remedy
