"""Every adapter that a run saves names the base it was trained on; runs of all weights name none."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from novelgpt.model.fingerprint import BASE_RECORD, check_base, weights_fingerprint
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.training.base_recorder import BaseRecorder
from novelgpt.training.checkpoints.trainer import CheckpointTrainer


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
def test_checkpoints_and_the_final_folder_name_the_base(adapter: bool, base_folder: Path, tmp_path: Path) -> None:
    source = ModelArguments(str(base_folder))
    model = load_model(source, load_tokenizer(source))
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if adapter else model
    recorder = BaseRecorder(trained)
    rows: Any = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    arguments = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True)
    trainer = CheckpointTrainer(
        model=trained, args=arguments, train_dataset=rows, callbacks=[recorder], complete=recorder.record
    )
    trainer.train()
    trainer.save_final(tmp_path)
    folders = [tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    if not adapter:
        assert not any((folder / BASE_RECORD).exists() for folder in folders)
        return
    for folder in folders:
        record = json.loads((folder / BASE_RECORD).read_text(encoding="utf-8"))
        assert record == {"base": str(base_folder), "fingerprint": weights_fingerprint(base_folder)}
        check_base(folder, str(base_folder))


def test_a_base_that_is_gone_costs_the_record_and_not_the_run(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ModelArguments(str(base_folder))
    model = get_peft_model(load_model(source, load_tokenizer(source)), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    BaseRecorder(model).record(tmp_path)
    assert "gets no base.json" in capsys.readouterr().err
    assert not (tmp_path / BASE_RECORD).exists()
