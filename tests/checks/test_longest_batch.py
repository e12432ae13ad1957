"""The longest micro-batch is tried before the first step, and leaves nothing behind."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from finetune.__main__ import main as finetune
from novelgpt.checks.before_training import compiles_operators, preflight
from novelgpt.checks.longest_batch import rows_to_try, try_batch
from novelgpt.checks.run import parse_run
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError


@pytest.fixture
def training(tmp_path: Path) -> TrainArguments:
    return TrainArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2)


def state_of(model: nn.Module) -> tuple[object, ...]:
    draws = (random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())
    weights = [parameter.detach().clone().numpy().tobytes() for parameter in model.parameters()]
    gradients = [None if part.grad is None else part.grad.numpy().tobytes() for part in model.parameters()]
    return draws, weights, gradients, [part.training for part in model.modules()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind(checkpointing: bool, base_folder: Path, training: TrainArguments) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder, attention_dropout=0.5).train()
    attach_chunked_loss(model, True)
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.arange(3, 35).reshape(2, 16)
    batch = {"input_ids": ids, "labels": ids.clone()}
    model(**batch).loss.backward()
    before = state_of(model)
    reached: list[bool] = []
    with model.get_input_embeddings().register_full_backward_hook(lambda *_: reached.append(True)):
        try_batch(model, batch, training, contextlib.nullcontext)
    assert reached == [True]
    assert state_of(model) == before


class Greedy(nn.Module):
    """Has no room for more than eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> "Greedy":
        if input_ids.numel() > 8:
            raise torch.OutOfMemoryError("out of memory")
        self.loss = self.weight.sum()
        return self


def test_a_batch_that_does_not_fit_is_a_plain_error(training: TrainArguments) -> None:
    def batch(tokens: int) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("input_ids", "labels"), torch.ones(1, tokens, dtype=torch.long))

    try_batch(Greedy(), batch(8), training, contextlib.nullcontext)
    with pytest.raises(UserError, match="the longest micro-batch, 1 x 9 tokens, does not fit"):
        try_batch(Greedy(), batch(9), training, contextlib.nullcontext)


def test_on_a_cpu_one_row_is_tried_unless_it_is_longer_than_a_step(training: TrainArguments) -> None:
    assert rows_to_try(numpy.array([5, 9, 7, 8]), training) == [1]
    assert rows_to_try(numpy.array([1, 1, 1, 13]), training) == [3]  # a step has 2 x 2 rows of 4 tokens
    assert rows_to_try(numpy.array([1, 1, 1, 90, 1, 1, 1, 1]), training) == []


def test_a_run_trains_the_same_with_and_without(base_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "灯塔下有什么？", "completion": "一封信。"}\n' * 8, encoding="utf-8")
    words = ["--model", str(base_folder), "--train_files", str(rows), "--valid_files", str(rows), "--max_steps", "2"]
    words += ["--save_strategy", "no", "--stop_check", "0", "--max_length", "64", "--eval_on_start", "False"]
    weights = []
    for choice in ("True", "False"):
        finetune([*words, "--preflight", choice, "--output_dir", str(tmp_path / choice)])
        weights.append((tmp_path / choice / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.fixture
def foreign_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    import copy

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["㊀", "㊁"])
    yield larger


def test_a_tokenizer_of_another_model_is_refused_before_the_weights_are_read(
    base_folder: Path, foreign_tokenizer: PreTrainedTokenizerBase
) -> None:
    run = parse_run("finetune", ["--model", str(base_folder)])
    with pytest.raises(UserError, match="vocabulary: 2 tokens of 1002 have no row in the embedding of 1000"):
        preflight(run, foreign_tokenizer)
    run.training.preflight = False
    preflight(run, foreign_tokenizer)


@pytest.mark.parametrize(
    ("settings", "compiles"),
    [
        ({"zero_optimization": {"stage": 2}}, False),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, False),
        ({"optimizer": {"type": "AdamW"}}, True),
    ],
)
def test_settings_that_make_deepspeed_compile(settings: dict[str, object], compiles: bool) -> None:
    assert compiles_operators(settings) == compiles
