"""An optimizer step is the same however its rows are shared out: over micro-batches, packs, processes, ZeRO stages.

Started as a script, this file is one of several processes that train the CASES.
"""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from deepspeed import zero
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune.__main__ import main as finetune
from novelgpt.model import attention as _attention  # noqa: F401  registers "packed"
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow
from novelgpt.text.packing import PackedBlocks, PackedRows, TokenizedText
from novelgpt.training import throughput
from novelgpt.training.trainer import NovelTrainer
from tests.memory_rows import as_rows
from tests.ranks import run_ranks
from tests.rounding import LOSS_TOLERANCE, ROUNDINGS, assert_close

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 71
# Of rows, in windows of 4 a step: the last one is half a window.
ROWS, STEPS = 10, 3
UNTRAINED = (1, 4)
Weights = dict[str, torch.Tensor]


def tiny(tied: bool) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    return Qwen3ForCausalLM._from_config(config, attn_implementation="packed")


def encoded(number: int, longest: int = 40) -> list[EncodedRow]:
    """Rows with few trained tokens and with many."""
    draw = torch.Generator().manual_seed(2)
    made = []
    for index in range(number):
        size = int(torch.randint(3, longest, (1,), generator=draw))
        ids = torch.randint(1, VOCABULARY, (size,), generator=draw).tolist()
        trained = torch.rand(size, generator=draw) < 0.1 + 0.8 * index / number
        made.append(
            EncodedRow(ids, [token if wanted else IGNORE_INDEX for token, wanted in zip(ids, trained, strict=True)])
        )
    return made


def rows_of(packed: bool, weighted: bool = False) -> Any:
    """ROWS rows, padded or packs of three; two have no trained token. Of weighted ones, only those of even number are:
    the second of two processes has none.
    """
    made = encoded(ROWS * 3 if packed else ROWS)
    share = 3 if packed else 1
    groups = [made[begin : begin + share] for begin in range(0, len(made), share)]
    for row in (row for index in UNTRAINED for row in groups[index]):
        row.labels = [IGNORE_INDEX] * len(row.labels)
    if weighted:
        for number, row in enumerate(row for group in groups[::2] for row in group[:2]):
            row.loss_weights = [(0.2 + number % 5) * (label != IGNORE_INDEX) for label in row.labels]
    if packed:
        return [PackedRows(as_rows(group), max_length=120)[0] for group in groups]
    return as_rows(made)


def repetitive_rows() -> PackedBlocks:
    """ROWS blocks, of which an odd number is pseudo-repetitions: now and then, one of two processes has none."""
    tokens = numpy.random.default_rng(4).integers(1, VOCABULARY, ROWS * 39 + 1).astype(numpy.uint16)
    blocks = PackedBlocks([TokenizedText(tokens, numpy.array([0, 55, 200]))], 40).with_repetitions(0.4)
    assert len(blocks) == ROWS and sum("repeat_periods" in blocks[index] for index in range(ROWS)) % 2 == 1
    return blocks


@dataclass
class Case:
    """How the rows of a step are shared out."""

    name: str
    rows_per_batch: int = 1
    accumulation: int = 2
    tied: bool = True
    packed: bool = False
    weighted: bool = False
    repetitive: bool = False
    bf16: bool = False
    zero: int | None = None
    clipping: float = 0.0
    optimizer: str = "sgd"


class Recorder(TrainerCallback):
    """Gradients just before each step."""

    def __init__(self) -> None:
        self.gradients: list[Weights] = []

    def on_pre_optimizer_step(self, *arguments: Any, model: torch.nn.Module, **options: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(case: Case, folder: Path, rows: Any = None) -> dict[str, Any]:
    """{"gradients": of each step (none under ZeRO), "weights": after the last, "losses", "norms"}, on each process."""
    throughput.CEILING_SIZE["cpu"] = 32  # the machine's speed is of no concern here
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()  # under ZeRO-3's settings, also those of an earlier case, models are born in parts
    model = tiny(case.tied)
    deepspeed = {} if case.zero is None else {"deepspeed": str(ROOT / f"scripts/deepspeed/zero{case.zero}.json")}
    settings = TrainArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=case.rows_per_batch,
        gradient_accumulation_steps=case.accumulation, optim=case.optimizer, learning_rate=0.1,
        lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=case.clipping, logging_steps=1,
        save_strategy="no", eval_strategy="no", eval_on_start=False, disable_tqdm=True, use_cpu=True, bf16=case.bf16,
        **deepspeed,
    )  # fmt: skip
    recorder = Recorder()
    if rows is None:
        rows = repetitive_rows() if case.repetitive else rows_of(case.packed, case.weighted)
    trainer = NovelTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=Collator(0),
        callbacks=[recorder],
    )
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    gathered = zero.GatheredParameters(list(parameters.values())) if case.zero == 3 else nullcontext()
    with gathered:
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "gradients": recorder.gradients if case.zero is None else [],
        "weights": weights,
        "losses": [float(entry["loss"]) for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
    }


CASES = [
    Case("ddp, padded"),
    Case("ddp, packed", packed=True, tied=False),
    Case("ddp, clipped", clipping=1.0),
    Case("zero 1, padded", zero=1),
    Case("zero 1, packed, AdamW", zero=1, packed=True, tied=False, optimizer="adamw_torch"),
    Case("zero 2, padded", zero=2, tied=False),
    Case("zero 2, packed, clipped", zero=2, packed=True, clipping=1.0),
    Case("zero 3, padded", zero=3),
    Case("zero 3, packed", zero=3, packed=True, tied=False),
    Case("zero 3, clipped", zero=3, clipping=1.0, tied=False),
    Case("ddp, padded, weighted", weighted=True, tied=False),
    Case("zero 2, packed, weighted", zero=2, packed=True, weighted=True),
    Case("zero 3, packed, weighted", zero=3, packed=True, weighted=True, tied=False),
    Case("ddp, repetitive", repetitive=True, tied=False),
    Case("zero 3, repetitive", zero=3, repetitive=True),
]


def in_one_process(case: Case, folder: Path) -> dict[str, Any]:
    """The same rows in whole windows."""
    return train(replace(case, rows_per_batch=4, accumulation=1, zero=None), folder)


def assert_equal(ours: Weights, expected: Weights, roundings: int = ROUNDINGS) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert_close(tensor, expected[name], name, roundings)


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any], roundings: int = ROUNDINGS) -> None:
    assert len(expected["gradients"]) == STEPS
    assert all(max(float(gradient.abs().max()) for gradient in step.values()) > 1e-3 for step in expected["gradients"])
    if any(ours["gradients"]):  # ZeRO keeps them in parts; there, the weights tell
        for step, expected_step in zip(ours["gradients"], expected["gradients"], strict=True):
            assert_equal(step, expected_step)
    assert_equal(ours["weights"], expected["weights"], roundings)
    assert ours["losses"] == pytest.approx(expected["losses"], abs=1e-4)  # logged with four digits
    assert ours["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows_per_batch", "accumulation"), [(2, 2), pytest.param(1, 4, marks=pytest.mark.long)])
def test_gradients_do_not_depend_on_the_shape_of_batches(
    rows_per_batch: int, accumulation: int, tied: bool, packed: bool, tmp_path: Path
) -> None:
    case = Case("", rows_per_batch, accumulation, tied, packed)
    assert_same_training(train(case, tmp_path), in_one_process(case, tmp_path))


def test_gradients_of_pseudo_repetitions_do_not_depend_on_the_shape_of_batches(tmp_path: Path) -> None:
    """Micro-batches with them, and without, against whole windows; and bf16 leads where fp32 does."""
    case = Case("", 1, 4, repetitive=True)
    ours, expected = train(case, tmp_path), in_one_process(case, tmp_path)
    assert_same_training(ours, expected)
    halves = train(replace(case, bf16=True), tmp_path)
    assert halves["losses"] == pytest.approx(expected["losses"], rel=0.01)
    before = dict(tiny(case.tied).named_parameters())
    steps = [
        torch.cat([(outcome["weights"][name] - tensor.detach()).flatten() for name, tensor in before.items()])
        for outcome in (halves, expected)
    ]
    assert functional.cosine_similarity(*steps, dim=0) > 0.99


def test_packed_rows_give_the_gradients_of_padded_ones(tmp_path: Path) -> None:
    rows = encoded(8)
    for row in rows:
        row.labels[0] = IGNORE_INDEX
    packs = PackedRows(as_rows(rows), max_length=80)
    assert 1 < len(packs) < 4
    padded = train(Case("", 8, 1), tmp_path, as_rows(rows))
    for shape in ((len(packs), 1), (1, len(packs))):
        packed = train(Case("", *shape), tmp_path, packs)
        assert_equal(packed["gradients"][0], padded["gradients"][0])
        assert packed["losses"] == pytest.approx(padded["losses"], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_per_batch", [1, 4])
def test_gradients_of_weighted_rows_are_those_of_plain_cross_entropy(
    rows_per_batch: int, packed: bool, tmp_path: Path
) -> None:
    """sum(weight x loss) / sum(weight) over one window of all rows, which is not filled at the end of the epoch."""
    rows = rows_of(packed, weighted=True)
    ours = train(Case("", rows_per_batch, 11, packed=packed), tmp_path, rows)
    model = tiny(tied=True)
    sums = []
    for row in (Collator(0)([rows[number]]) for number in range(ROWS)):
        labels, weights = row.pop("labels")[:, 1:], row.pop("loss_weights", torch.ones(1, row["input_ids"].shape[1]))
        losses = functional.cross_entropy(model(**row).logits[0, :-1], labels[0], reduction="none")
        sums.append(((losses * weights[0, 1:]).sum(), (weights[:, 1:] * (labels != IGNORE_INDEX)).sum()))
    loss = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    (gradients,) = ours["gradients"]
    assert_equal(gradients, expected)
    assert ours["losses"] == pytest.approx([loss.item()], abs=1e-4)


def test_a_step_without_trained_tokens_changes_nothing(tmp_path: Path) -> None:
    rows = encoded(2)
    for row in rows:
        row.labels = [IGNORE_INDEX] * len(row.labels)
    outcome = train(Case("", 1, 2), tmp_path, as_rows(rows))
    assert outcome["losses"] == [0.0]
    before = {name: parameter.detach() for name, parameter in tiny(tied=True).named_parameters()}
    assert_equal(outcome["weights"], before, 0)


# Of the tiny-random base on the first sample papers, fp32 on a CPU.
RECORDED_LOSSES = [7.097151, 6.978096, 6.823236, 6.712947, 6.651709, 6.599518, 6.500546, 6.43372]


def test_the_loss_curve_of_the_command_line_is_the_recorded_one(base_folder: Path, tmp_path: Path) -> None:
    papers = (SAMPLES / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "papers.jsonl").write_text("".join(papers[:130]), encoding="utf-8")
    words = ["--model", str(base_folder), "--output_dir", str(tmp_path / "run"), "--precision", "fp32", "--seed", "7"]
    words += ["--train_files", str(tmp_path / "papers.jsonl"), "--max_length", "320"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    words += ["--max_steps", "8", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--logging_steps", "1"]
    finetune(
        [*words, "--eval_on_start", "False", "--eval_strategy", "no", "--save_strategy", "no", "--stop_check", "0"]
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert losses == pytest.approx(RECORDED_LOSSES, abs=2e-4)


def main(folder: Path) -> None:
    """Train all cases as one of several processes; the first one writes down what came out."""
    for case in CASES:
        outcome = train(case, folder)
        if os.environ["RANK"] == "0":
            torch.save(outcome, folder / f"{case.name}.pt")
    torch.distributed.barrier()
    os._exit(0)  # threads of process groups and engines, several of each by now, do not always end in peace


@pytest.fixture(scope="module")
def several_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outcomes of two processes, started once for all cases."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, str(folder), logs=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_as_one(case: Case, several_processes: Path, tmp_path: Path) -> None:
    ours = torch.load(several_processes / f"{case.name}.pt")
    # AdamW divides by the root of small numbers, which makes their rounding larger.
    assert_same_training(ours, in_one_process(case, tmp_path), ROUNDINGS * (1 if case.optimizer == "sgd" else 32))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
