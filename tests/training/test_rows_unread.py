"""Between a start and the end of its first steps, a run reads the rows of these steps, and a fixed number of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, Trainer

from novelgpt.checks.before_training import check
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.origins import TracedRows
from novelgpt.training import evaluations
from novelgpt.training.fit import fit
from novelgpt.training.run_folder import claim_run_folder
from novelgpt.training.sample_predictions import choose_samples
from novelgpt.training.trainer import NovelTrainer
from tests.faults.runs import write_base

STRATEGIES = ["random", "group_by_length", "batch_rebalance"]


class NotedRows(TracedRows):
    """Rows of unlike lengths that note the number of each one that is read, and may end the run at some read."""

    def __init__(self, rows: int, last: int | None = None) -> None:
        self.lengths = numpy.resize([4, 9, 6, 11, 5, 7, 8, 10, 5, 6], rows)
        self.last = last
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """A row whose prompt has two tokens."""
        if len(self.read) == self.last:
            raise KeyboardInterrupt
        self.read.append(index)
        ids = numpy.random.default_rng(index).integers(0, 900, int(self.lengths[index])).tolist()
        return {"input_ids": ids, "labels": [IGNORE_INDEX, IGNORE_INDEX, *ids[2:]]}

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """None."""
        return []


@pytest.fixture(scope="module")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small base."""
    return write_base(base_folder, tmp_path_factory.mktemp("small") / "base", dropout=0.0)


def run(base: Path, folder: Path, train: NotedRows, valid: NotedRows, *more: str) -> None:
    words = f"""
        --model {base} --output_dir {folder} --max_length 16 --packing False --precision fp32 --logging_steps 1
        --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --save_strategy no --predict_during_eval 2
        --predict_max_new_tokens 2 --stop_check 1 --disable_tqdm True
    """
    with claim_run_folder(parse_arguments(FinetuneRun, [*words.split(), *more])) as claimed:
        tokenizer = load_tokenizer(claimed.run.model)
        plan = check(claimed, tokenizer, train)
        fit(load_model(claimed.run.model, tokenizer), tokenizer, train, valid, plan)


def test_as_many_rows_are_read_of_many_as_of_few(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "MIN_TOKENS", 100)
    reads = []
    for rows in (100, 1000):
        train, valid = NotedRows(rows), NotedRows(rows)
        run(base, tmp_path / str(rows), train, valid, "--max_steps", "2")
        reads.append((len(train.read), len(set(valid.read))))
    assert reads[0] == reads[1] and max(map(max, reads)) < 100


def test_only_the_samples_are_read_to_choose_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = NotedRows(1000)
    assert len(choose_samples(rows, tokenizer, 3, 8)) == 3
    assert rows.read == [0, 333, 666]


@pytest.mark.long
def test_a_resumed_run_does_not_read_what_it_skips(base: Path, tmp_path: Path) -> None:
    steps = ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "20", "--max_steps", "24"]
    whole, stopped, resumed = NotedRows(200), NotedRows(200, 145), NotedRows(200)
    run(base, tmp_path / "whole", whole, NotedRows(9), *steps)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "stopped", stopped, NotedRows(9), *steps)
    run(base, tmp_path / "stopped", resumed, NotedRows(9), *steps)
    assert len(resumed.read) == len(whole.read) - 20 * 4
    assert resumed.read[-36:] == whole.read[-36:]  # of 4 steps, and of the stop check


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [3, 500])
def test_rows_come_in_the_order_of_the_stock_trainer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, strategy: str, rows: int
) -> None:
    config = Qwen3Config(
        vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    arguments = TrainArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        train_sampling_strategy=strategy, data_seed=5,
    )  # fmt: skip
    given: dict[str, Any] = {
        "args": arguments, "processing_class": tokenizer, "data_collator": lambda numbers: numbers,
    }  # fmt: skip
    orders = []
    for kind, train, valid in (
        (Trainer, NotedRows(rows), NotedRows(rows)),
        (NovelTrainer, NotedRows(rows), NotedRows(rows)),
    ):
        trainer = kind(model=Qwen3ForCausalLM(config), train_dataset=train, eval_dataset=valid, **given)
        train.read.clear()
        torch.manual_seed(7)
        order = [list(trainer.get_train_dataloader().batch_sampler) for _ in range(2)]
        orders.append((order, list(trainer.get_eval_dataloader().batch_sampler)))
    assert orders[0] == orders[1]
    assert train.read == valid.read == []
