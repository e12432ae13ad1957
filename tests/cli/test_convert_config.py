"""Settings of LLaMA-Factory, ms-swift and TRL, converted: they start a run here, and nothing of them is passed over."""

import dataclasses
import datetime
import json
import os
import re
import resource
import shlex
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.convert_config import conversion
from cli.convert_config.__main__ import main
from dataset.readers import read_conversation_rows
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.peer_names import PEER_NAMES
from novelgpt.settings.remedies import TYPED, this_python
from novelgpt.settings.runs import FinetuneRun, LoraRun, PretrainRun
from tests.warm_python import warm_environment

RUNS: dict[str, Any] = {"pretrain": PretrainRun, "finetune": FinetuneRun, "finetune_lora": LoraRun}
LLAMAFACTORY = {
    "model_name_or_path": "tiny", "trust_remote_code": False, "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "dataset": "papers,talk",
    "template": "qwen3_nothink", "cutoff_len": 512, "max_samples": 1000, "preprocessing_num_workers": 16,
    "overwrite_cache": True, "output_dir": "saves/lora", "logging_steps": 10, "save_steps": 500, "plot_loss": True,
    "overwrite_output_dir": True, "save_only_model": False, "report_to": "none", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip
FULL = {key: value for key, value in LLAMAFACTORY.items() if not key.startswith("lora")} | {
    "finetuning_type": "full", "output_dir": "saves/full", "learning_rate": 1e-5, "val_size": 4,
    "eval_strategy": "steps", "eval_steps": 500,
}  # fmt: skip
TALK = [["题目？", "夜雨"], ["再短", "雨"]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as LLaMA-Factory has it, to be in."""
    data = tmp_path / "data"
    data.mkdir()
    alpaca = [{"instruction": f"第{n}个问题", "input": "灯塔" * (n % 2), "output": f"第{n}个回答"} for n in range(9)]
    turns = [{"from": who, "value": text} for pair in TALK for who, text in zip(("human", "gpt"), pair, strict=True)]
    talk = [{"conversations": turns, "system": "你是作者"}] * 3
    for name, rows in (("papers", alpaca), ("talk", talk), ("odd", [*talk, {"conversations": turns[:3]}])):
        (data / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (data / "pairs.jsonl").write_text('{"content": "问", "summary": "答", "label": 1}\n' * 4, encoding="utf-8")
    (data / "text.jsonl").write_text('{"content": "灯塔下的信。"}\n' * 4, encoding="utf-8")
    sharegpt = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}}
    info = {
        "papers": {"file_name": "papers.json"}, "talk": {"file_name": "talk.json"} | sharegpt,
        "unnamed": {"file_name": "talk.json", "formatting": "sharegpt"}, "odd": {"file_name": "odd.json"} | sharegpt,
        "pairs": {"file_name": "pairs.jsonl", "columns": {"prompt": "content", "response": "summary"}},
        "novel": {"file_name": "text.jsonl", "columns": {"prompt": "content"}},
        "liked": {"file_name": "papers.json", "ranking": True}, "far": {"hf_hub_url": "some/rows"},
        "made": {"script_url": "rows.py"}, "seen": {"file_name": "talk.json", "columns": {"images": "images"}},
    }  # fmt: skip
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(place: Path, given: dict[str, Any], *words: str, name: str = "theirs.yaml") -> tuple[str, dict[str, Any]]:
    """The pipeline and our settings, which its parser takes; each key of the tool stands in the file."""
    (place / name).write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    return of_file(place, name, list(given), *words)


def of_file(place: Path, name: str, keys: list[str], *words: str) -> tuple[str, dict[str, Any]]:
    (place / "ours.yaml").unlink(missing_ok=True)
    main([name, "-o", "ours.yaml", *words])
    text = (place / "ours.yaml").read_text(encoding="utf-8")
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []
    pipeline = text.split()[1].rstrip(",")
    parse_arguments(RUNS[pipeline], ["--config", "ours.yaml"])
    return pipeline, yaml.safe_load(text)


def refused(place: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of settings that are not converted; nothing is written."""
    (place / "theirs.yaml").write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    before = set(place.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["theirs.yaml", "-o", "ours.yaml", *words])
    assert (end.value.code, set(place.rglob("*"))) == (2, before)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [pytest.param(LLAMAFACTORY, id="lora"), pytest.param(FULL, id="full", marks=pytest.mark.long)]
)
def test_a_file_of_llamafactory_starts_a_run(
    given: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "theirs.yaml").write_text(yaml.safe_dump(given | {"neat_packing": False, "odd_key": 1}), encoding="utf-8")
    main(["theirs.yaml", "-o", "ours.yaml"])
    said, wrong = capsys.readouterr()
    assert wrong == ""
    text = (place / "ours.yaml").read_text(encoding="utf-8")
    assert [key for key in given if key not in text] == []
    missing = said.split("no counterpart")[1]
    assert re.findall(r"^  (\w+): ", missing, flags=re.MULTILINE) == ["odd_key"]
    start = shlex.split(said.rpartition("train with it: ")[2])
    further = ["--max_steps", "1", "--stop_check", "0", "--preflight", "False", "--guards", "False"]
    environment = os.environ | warm_environment()
    trained = subprocess.run([*start, *further], env=environment, capture_output=True, encoding="utf-8")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    run = json.loads((place / given["output_dir"] / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished"
    told = {name: value for group in run["arguments"].values() for name, value in group.items()}
    expected = {
        "learning_rate": given["learning_rate"], "warmup_steps": 0.1, "gradient_accumulation_steps": 8,
        "weight_decay": 0.0, "max_length": 512, "packing": False, "bf16": True, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    if given is LLAMAFACTORY:
        expected |= {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_targets": ["all-linear"]}
    assert {name: told[name] for name in expected} == expected


def test_a_stream_is_one_here_too(place: Path) -> None:
    stream = {"streaming": True, "buffer_size": 500, "max_steps": 9, "val_size": 0.0, "eval_dataset": "papers"}
    ours = converted(place, LLAMAFACTORY | stream)[1]
    assert (ours["streaming"], ours["buffer_rows"], ours["max_steps"]) == (True, 500, 9)
    assert "buffer_rows" not in converted(place, LLAMAFACTORY | {"buffer_size": 500})[1]


def test_what_is_passed_on_is_an_option_of_ours() -> None:
    groups = [group for run in RUNS.values() for group in typing.get_type_hints(run).values()]
    ours = {field.name for group in groups if dataclasses.is_dataclass(group) for field in dataclasses.fields(group)}
    assert set(conversion.SHARED) - ours == set()
    assert {*conversion.RENAMED, *conversion.CHANGES_TRAINING} - PEER_NAMES.keys() == set()


def test_defaults_of_llamafactory_are_written_out(place: Path) -> None:
    given = {"model_name_or_path": "a/b", "stage": "sft", "finetuning_type": "full", "dataset": "papers"}
    pipeline, ours = converted(place, given)
    assert pipeline == "finetune"
    expected = {
        "model": "a/b", "train_files": ["data/papers.json"], "learning_rate": 5e-5, "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "warmup_steps": 0, "precision": "fp32",
        "max_length": 2048, "packing": False, "eval_strategy": "no", "save_steps": 500, "max_eval_share": 0,
        "activation_checkpointing": True, "seed": 42,
    }  # fmt: skip
    assert {
        key: float(ours[key]) if isinstance(value, float) else ours[key] for key, value in expected.items()
    } == expected
    assert 0 < float(ours["valid_fraction"]) < 1e-3 and "lora_rank" not in ours


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"val_size": 0.1}, {"valid_fraction": 0.1}),
        ({"val_size": 4}, {"valid_fraction": round(3.5 / 9, 9)}),
        ({"eval_dataset": "talk"}, {"valid_files": ["data/talk.json"]}),
        ({"val_size": 1}, {"valid_fraction": round(0.5 / 9, 9)}),
        ({"val_size": "2e-1", "learning_rate": "3e-6"}, {"valid_fraction": 0.2, "learning_rate": 3e-6}),
        ({"max_length": 99, "eval_strategy": False, "packing": "false"},
         {"max_length": 2048, "eval_strategy": "no", "packing": False}),
        ({"packing": True}, {"packing": True}),
        ({"quantization_bit": 4, "lora_alpha": 8, "lora_target": "q_proj, v_proj"},
         {"qlora": True, "lora_alpha": 8, "lora_targets": ["q_proj", "v_proj"]}),
        ({"warmup_steps": 20, "warmup_ratio": 0.1}, {"warmup_steps": 20}),
        ({"fp16": True, "disable_gradient_checkpointing": True},
         {"precision": "fp16", "activation_checkpointing": False}),
        ({"deepspeed": "examples/deepspeed/ds_z2_config.json"}, {"deepspeed": "zero2"}),
        ({"deepspeed": "ds_z3_offload_config.json"}, {"deepspeed": "zero3_offload"}),
        ({"deepspeed": "examples/deepspeed/ds_z0_config.json"}, {"deepspeed": None}),
        ({"stage": "pt", "finetuning_type": "full", "dataset": "novel"},
         {"train_files": ["data/text.jsonl"], "text_column": "content", "packing": True}),
        ({"dataset": "talk", "mask_history": True}, {"train_files": ["data/talk.json"], "mask_history": True}),
    ],
)  # fmt: skip
def test_meanings_and_not_names_alone(more: dict[str, Any], expected: dict[str, Any], place: Path) -> None:
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "papers"} | more
    _, ours = converted(place, given)
    found = {key: ours.get(key) for key in expected}
    assert {
        key: float(value) if isinstance(expected[key], float) else value for key, value in found.items()
    } == expected


@pytest.mark.parametrize(
    ("more", "systems"),
    [
        ({"dataset": "unnamed"}, []),
        ({"dataset": "odd", "default_system": "别的"}, ["你是作者"] * 3),
        ({"dataset": "unnamed", "default_system": "别的", "max_samples": 2}, ["别的"] * 2),
        ({"dataset": "pairs"}, []),
    ],
)  # fmt: skip
def test_rows_are_written_where_they_are_read_otherwise(
    more: dict[str, Any], systems: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora"} | more
    assert "name a folder for them: --output_data FOLDER" in refused(place, given, capsys)
    _, ours = converted(place, given, "--output_data", "rows")
    (file,) = ours["train_files"]
    rows = [row["messages"] for row in read_conversation_rows(place / file)]
    assert len(rows) == {"pairs": 4}.get(more["dataset"], more.get("max_samples", 3))
    assert [message["content"] for row in rows for message in row if message["role"] == "system"] == systems
    for row in rows:
        assert row[-1]["content"] == ("答" if more["dataset"] == "pairs" else "雨")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"stage": "dpo"}, "theirs.yaml: stage: dpo: there is no such training here"),
        ({"finetuning_type": "freeze"}, "finetuning_type: freeze: not supported here"),
        ({"dataset": "liked"}, "dataset_info.json: liked holds preferences"),
        ({"dataset": "far"}, "hf download --repo-type dataset some/rows"),
        ({"dataset": "made"}, "is made by code, rows.py"),
        ({"dataset": "seen"}, "seen names images"),
        ({"dataset": "nobody"}, "describes no dataset 'nobody'"),
        ({"dataset_dir": "elsewhere"}, "elsewhere/dataset_info.json"),
        ({"adapter_name_or_path": "saves/lora"}, "training starts from a base"),
        ({"model_name_or_path": None}, "no model is named"),
        ({"do_train": False}, "it trains nothing"),
    ],
)
def test_what_is_not_here_is_refused_by_name(
    more: dict[str, Any], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "papers"} | more
    assert told in refused(place, given, capsys)


def test_what_has_no_counterpart_is_told_by_kind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = LLAMAFACTORY | {"pissa_init": True, "train_on_prompt": True, "use_galore": False, "template": "default"}
    converted(place, given | {"quantization_bit": 8, "odd_key": 1, "resume_from_checkpoint": "saves/checkpoint-9"})
    told = capsys.readouterr().out
    kinds = {}
    for line in told.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            kind = line.split()[0]
        elif found := re.match(r"  (\w+): ", line):
            kinds[found[1]] = kind
    missing = ("pissa_init", "train_on_prompt", "quantization_bit", "odd_key", "resume_from_checkpoint")
    expected = dict.fromkeys(missing, "Has") | {"template": "Is", "overwrite_output_dir": "Is", "cutoff_len": "Is"}
    expected |= dict.fromkeys(("use_galore", "plot_loss", "overwrite_cache", "stage", "do_train"), "Needs")
    assert {key: kinds.get(key) for key in expected} == expected
    text = (place / "ours.yaml").read_text(encoding="utf-8")
    assert [line.strip() for line in told.splitlines() if line.startswith("  ")] == re.findall(
        r"^#   (.+)$", text, flags=re.MULTILINE
    )


def test_values_of_another_kind_are_refused_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: dict[str, list[Any]] = {
        "val_size": ["x", [1], -1, 9, float("nan"), True], "cutoff_len": [{"a": 1}], "lora_rank": ["x"],
        "lora_target": [5, [1]], "dataset": [5, {"a": "b"}, [["papers"]]], "dataset_dir": [5, "a\0b"],
        "max_samples": ["x", 1.5, 0, [3]], "report_to": [5, {"a": "b"}], "learning_rate": [datetime.date(2020, 1, 1)],
        "bf16": ["perhaps"], "deepspeed": [5], "output_dir": ["saves/${oc.env:NAME}"], "model_name_or_path": [["a"]],
    }  # fmt: skip
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "papers"}
    for key, values in wrong.items():
        for value in values:
            told = refused(place, given | {key: value}, capsys, "--output_data", "rows")
            assert key in told.splitlines()[0], (key, value, told)
    swift = {"model": "a/b", "tuner_type": "lora", "dataset": "data/talk.json"}
    hostile: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 0}, {"torch_dtype": ["x"]}, {"split_dataset_ratio": 1},
        {"dataset": "data/talk.json#99999999999"},
    ]  # fmt: skip
    for more in hostile:
        assert next(iter(more)) in refused(place, swift | more, capsys).splitlines()[0]
    trl = {"model_name_or_path": "a/b", "use_peft": True, "datasets": [{"path": "json", "data_files": 5}]}
    assert "data_files are neither" in refused(place, trl, capsys)


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ({"columns": ["a"]}, "papers: columns: input should be a valid dictionary"),
        ({"columns": {"prompt": {"a": 1}}}, "papers: columns.prompt: input should be a valid string"),
        ({"tags": ["a"]}, "papers: tags: input should be a valid dictionary"),
        ({"num_samples": 10**12}, "papers: num_samples: input should be less than"),
        ({"num_samples": "x"}, "papers: num_samples: input should be a valid integer"),
        ({"formatting": 5}, "papers: formatting: "),
        ({"split": "test"}, "a file has no split 'test'"),
        ({"file_name": "../data"}, "max_samples of several files"),
        ({"file_name": "a" * 300}, "File name too long"),
        ({"file_name": "turns.json", "formatting": "sharegpt"}, "row 0: a turn of conversations is not a mapping"),
        (
            {"file_name": "pairs.json", "columns": {"history": "old", "prompt": "q", "response": "a"}},
            "not a list of pairs",
        ),
    ],
)
def test_descriptions_of_data_that_fit_nothing(
    described: dict[str, Any], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "data" / "turns.json").write_text('[{"conversations": ["a", "b"]}]', encoding="utf-8")
    (place / "data" / "pairs.json").write_text('[{"q": "a", "a": "b", "old": [["c"]]}]', encoding="utf-8")
    info = {"papers": {"file_name": "papers.json"} | described}
    (place / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "papers", "max_samples": 3}
    assert told in refused(place, given, capsys)


def test_rows_are_drawn_before_the_first_are_taken(place: Path) -> None:
    info = {"papers": {"file_name": "papers.json", "num_samples": 7}, "odd": {"file_name": "mixed.jsonl"}}
    (place / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    rows = ['{"instruction": "问", "output": 5}', *['{"instruction": "问", "output": "答"}'] * 4]
    (place / "data" / "mixed.jsonl").write_text("\n".join(rows), encoding="utf-8")
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "papers,odd", "max_samples": 3}
    _, ours = converted(place, given, "--output_data", "rows")
    # Of the first three rows of the other file, LLaMA-Factory leaves one out.
    assert [len(list(read_conversation_rows(place / file))) for file in ours["train_files"]] == [3, 2]


def test_a_full_disk_leaves_nothing_half_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "odd"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (place / "theirs.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    content = set(place.rglob("*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # the rows have room, and the settings have none
    try:
        with pytest.raises(SystemExit) as end:
            main(["theirs.yaml", "-o", "new/ours.yaml", "--output_data", "new/rows"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (end.value.code, set(place.rglob("*"))) == (2, content)
    assert "new/ours.yaml" in capsys.readouterr().err


def test_rows_with_tools_are_read_alike(place: Path) -> None:
    call = '{"name": "weather", "arguments": {"city": "北京"}}'
    told = [("human", "天气？"), ("function_call", call), ("observation", "晴"), ("gpt", "晴天。")]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    row = {"conversations": [{"from": who, "value": text} for who, text in told], "tools": json.dumps([tool])}
    (place / "data" / "calls.json").write_text(json.dumps([row] * 2, ensure_ascii=False), encoding="utf-8")
    info = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
    (place / "data" / "dataset_info.json").write_text(
        json.dumps({"calls": {"file_name": "calls.json"} | info}), "utf-8"
    )
    _, ours = converted(place, LLAMAFACTORY | {"dataset": "calls"})
    assert ours["train_files"] == ["data/calls.json"]
    del info["columns"]["tools"]  # type: ignore[attr-defined]
    (place / "data" / "dataset_info.json").write_text(
        json.dumps({"calls": {"file_name": "calls.json"} | info}), "utf-8"
    )
    _, ours = converted(place, LLAMAFACTORY | {"dataset": "calls"}, "--output_data", "rows")
    assert "tools" not in next(iter(read_conversation_rows(place / ours["train_files"][0])))


def test_remedies_name_what_the_user_types(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model_name_or_path": "a/b", "finetuning_type": "lora", "dataset": "papers"}
    python = f"`{this_python()} -m finetune_lora.merge ADAPTER FOLDER`"
    for typed, merge in ((None, python), ("novelgpt", "`novelgpt merge ADAPTER FOLDER`")):
        if typed:
            monkeypatch.setenv(TYPED, typed)
        assert merge in refused(place, given | {"adapter_name_or_path": "x"}, capsys)
        converted(place, given | {"export_dir": "x"})
        assert f"export_dir: {merge}" in capsys.readouterr().out
        (place / "ours.yaml").unlink()


def test_nothing_is_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "ours.yaml").write_text("mine", encoding="utf-8")
    assert "ours.yaml already exists" in refused(place, LLAMAFACTORY, capsys)
    assert (place / "ours.yaml").read_text(encoding="utf-8") == "mine"
    (place / "ours.yaml").unlink()
    for words, told in (
        (["--output_data", "theirs.yaml"], "theirs.yaml is not a folder"),
        (["--root", "no"], "--root no"),
    ):
        assert told in refused(place, LLAMAFACTORY, capsys, *words)
    main(["theirs.yaml"])
    assert "lora_alpha: 16" in capsys.readouterr().out


def test_settings_of_ms_swift(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "model": "Qwen/Qwen3-0.6B", "train_type": "lora", "dataset": ["data/papers.json#5", "data/talk.json"],
        "torch_dtype": "bfloat16", "max_length": 512, "loss_scale": "last_round", "deepspeed": "zero2",
        "warmup_ratio": 0.05, "attn_impl": "flash_attn", "target_modules": ["all-linear"], "system": "别的",
        "ENV": {"CUDA_VISIBLE_DEVICES": "0"},
    }  # fmt: skip
    assert "--output_data" in refused(place, given, capsys)
    pipeline, ours = converted(place, given, "--output_data", "rows")
    assert pipeline == "finetune_lora"
    expected = {
        "hub": "modelscope", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "weight_decay": 0.1,
        "adam_beta2": 0.95, "gradient_accumulation_steps": 16, "learning_rate": 1e-4, "precision": "bf16",
        "overlong": "drop", "deepspeed": "zero2", "warmup_steps": 0.05, "eval_strategy": "no",
        "attention": "flash_attention_2",
    }  # fmt: skip
    assert {key: ours[key] for key in expected} == expected
    files = [list(read_conversation_rows(place / file)) for file in ours["train_files"]]
    assert list(map(len, files)) == [5, 3]
    assert {row["messages"][0]["content"] for row in files[0]} == {"别的"}
    for row in files[1]:
        assert [message.get("weight", 1) for message in row["messages"]] == [1, 1, 0, 1, 1]
    (place / "ours.yaml").unlink()
    assert "rlhf_type: dpo: there is no such training" in refused(place, given | {"rlhf_type": "dpo"}, capsys)


def test_a_script_that_calls_a_tool(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = place / "train.sh"
    text = "#!/bin/bash\nexport A=1\nCUDA_VISIBLE_DEVICES=0 swift sft \\\n  --model tiny --tuner_type full \\\n"
    script.write_text(text + "  --dataset data/papers.json --val_dataset data/talk.json --max_length 99\n", "utf-8")
    pipeline, ours = of_file(place, "train.sh", ["tuner_type", "val_dataset"])
    assert (pipeline, ours["model"], ours["max_length"], ours["learning_rate"]) == ("finetune", "tiny", 99, "1e-05")
    assert (ours["valid_files"], ours["eval_strategy"], ours["eval_steps"]) == (["data/talk.json"], "steps", 500)
    (place / "ours.yaml").unlink()
    script.write_text(text + "  --dataset $DATA\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["train.sh"])
    assert "$DATA must be expanded by the shell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "pipeline", "expected"),
    [
        ({"dataset_name": "data", "dataset_train_split": "talk"}, "finetune",
         {"max_length": 1024, "precision": "bf16"}),
        ({"datasets": [{"path": "json", "data_files": "data/papers.json"}], "use_peft": True, "lora_r": 4},
         "finetune_lora", {"lora_rank": 4, "lora_alpha": 32, "lora_targets": ["q_proj", "v_proj"]}),
        ({"dataset_name": "data/text.jsonl", "dataset_text_field": "content", "packing": True}, "pretrain",
         {"text_column": "content", "packing": True, "train_files": ["data/text.jsonl"]}),
    ],
)  # fmt: skip
def test_settings_of_trl(more: dict[str, Any], pipeline: str, expected: dict[str, Any], place: Path) -> None:
    told, ours = converted(place, {"model_name_or_path": "a/b", "output_dir": "out", "dtype": "bfloat16"} | more)
    assert told == pipeline
    expected = expected | {"learning_rate": "2e-05", "logging_steps": 10, "activation_checkpointing": True}
    assert {key: ours[key] for key in expected} == expected
    text = (place / "ours.yaml").read_text(encoding="utf-8")
    assert ("TRL trains questions, too" in text) == (pipeline == "finetune")


def test_whose_settings_they_are_must_be_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--from llamafactory|ms-swift|trl" in refused(place, {"learning_rate": 1e-4}, capsys)
    assert "no model is named" in refused(place, {"dataset": "papers"}, capsys, "--from", "llamafactory")
