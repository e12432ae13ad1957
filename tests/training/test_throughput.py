"""Throughput counts what batches hold, exactly, and charges for it what the model's matrix products cost."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from novelgpt.model import attention as _attention  # noqa: F401  registers "packed"
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.training import throughput
from novelgpt.training.throughput import StepCost, Throughput

Row = dict[str, torch.Tensor]


def tiny(tied: bool = True, attention: str = "packed") -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=301, hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM._from_config(config, attn_implementation=attention).train()


def adapted(tied: bool = True) -> torch.nn.Module:
    model = get_peft_model(tiny(tied), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    return model


def random_row(draw: random.Random, size: int) -> Row:
    ids = torch.tensor([draw.randint(1, 300) for _ in range(size)])
    return {"input_ids": ids, "labels": torch.where(torch.rand(size) < 0.5, ids, IGNORE_INDEX)}


def pack(rows: list[Row]) -> Row:
    for row in rows:
        row["labels"][0] = IGNORE_INDEX
        row["position_ids"] = torch.arange(len(row["labels"]))
    return {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "labels", "position_ids")}


def products(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, int]:
    """FLOPs of a training step by the kind of product, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    counts: dict[str, int] = {}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        name = str(operation).removeprefix("aten.")
        counts[name] = counts.get(name, 0) + flops
    return counts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [tiny, adapted], ids=["full", "adapter"])
def test_linear_layers_cost_what_torch_counts(make: Callable[[bool], torch.nn.Module], tied: bool) -> None:
    draw = random.Random(1)
    batch = Collator(0)([pack([random_row(draw, 30), random_row(draw, 34)]), pack([random_row(draw, 64)])])
    model = make(tied)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cost = StepCost(base)
    attach_chunked_loss(base)
    counted = products(model, batch)
    trained = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert 0 < trained < 128
    linear = counted["mm"] + counted.get("addmm", 0)
    assert cost.flops(tokens=128, trained=trained, pairs=0) == pytest.approx(linear, rel=0.02)
    # Trained tokens alone pay for the head.
    head = 301 * 48 * (4 if make is adapted else 6)
    assert cost.flops(128, trained, 0) - cost.flops(128, 0, 0) == trained * head


def test_adapters_cost_less() -> None:
    full, adapter = StepCost(tiny()), StepCost(adapted().get_base_model())
    assert adapter.flops(1000, 0, 0) < 0.9 * full.flops(1000, 0, 0)
    assert adapter.flops(0, 1000, 0) == pytest.approx(4 / 6 * full.flops(0, 1000, 0))
    assert adapter.flops(0, 0, 1000) == full.flops(0, 0, 1000)


def test_attention_costs_half_of_all_pairs() -> None:
    """Eager attention computes every pair of a row, and a token needs those before it."""
    draw = random.Random(2)
    batch = Collator(0)([random_row(draw, 40), random_row(draw, 40)])
    model = tiny(attention="eager")
    cost = StepCost(model)
    attach_chunked_loss(model)
    assert cost.flops(0, 0, pairs=2 * 40**2) == pytest.approx(products(model, batch)["bmm"] / 2, rel=0.02)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Throughput:
    monkeypatch.setitem(throughput.CEILING_SIZE, "cpu", 32)
    return Throughput(tiny(), torch.device("cpu"), torch.float32)


def counted(meter: Throughput) -> list[float]:
    """[tokens, trained tokens, sum of squared document lengths] since the last reading."""
    seen: list[list[float]] = []

    def total(sums: torch.Tensor) -> torch.Tensor:
        seen.append(sums.tolist())
        return sums

    meter.read(total, processes=1)
    return seen[0]


def trained_tokens(rows: list[Row]) -> int:
    return sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)


def test_padded_batches_are_counted_without_their_padding(meter: Throughput) -> None:
    draw = random.Random(3)
    rows = [random_row(draw, draw.randint(1, 50)) for _ in range(12)]
    for begin in range(0, 12, 4):
        meter.count(Collator(0)(rows[begin : begin + 4]))
    sizes = [len(row["labels"]) for row in rows]
    assert counted(meter) == [sum(sizes), trained_tokens(rows), sum(size**2 for size in sizes)]
    assert counted(meter) == [0, 0, 0]


def test_packed_batches_are_counted_document_by_document(meter: Throughput) -> None:
    draw = random.Random(4)
    rows = []
    for _ in range(6):
        sizes = [draw.randint(1, 20) for _ in range(3)]
        rows.append([random_row(draw, size) for size in [*sizes, 64 - sum(sizes)]])
    packs = [pack(row) for row in rows]
    for begin in range(0, 6, 2):
        meter.count(Collator(0)(packs[begin : begin + 2]))
    documents = [document for row in rows for document in row]
    sizes = [len(document["labels"]) for document in documents]
    assert counted(meter) == [6 * 64, trained_tokens(documents), sum(size**2 for size in sizes)]


def test_padding_of_packs_is_not_trained(meter: Throughput) -> None:
    draw = random.Random(5)
    rows = [[random_row(draw, 30), random_row(draw, 20)], [random_row(draw, 12)]]
    meter.count(Collator(0)([pack(row) for row in rows]))
    _, trained, _ = counted(meter)
    assert trained == trained_tokens([document for row in rows for document in row])


def test_speeds_are_of_all_processes_and_the_ceiling_of_each(
    meter: Throughput, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    meter.since = meter.started = clock[0]
    meter.ceiling.flops, meter.ceiling.undisturbed = 1e9, True
    rows = [random_row(random.Random(6), 50) for _ in range(2)]
    meter.count(Collator(0)(rows))
    meter.outside, clock[0] = 3.0, 108.0  # an evaluation of 3 s among 8 s
    figures = meter.read(lambda sums: 2 * sums, processes=2)  # another process saw as much
    trained = trained_tokens(rows)
    assert figures["tokens_per_second"] == 200 / 5
    assert figures["trained_tokens_per_second"] == round(2 * trained / 5, 1)
    flops = meter.cost.flops(200, 2 * trained, 4 * 50**2)
    assert figures["utilisation"] == round(flops / 5 / 1e9 / 2, 4)
    assert figures["seconds"] == 8.0
    assert figures["memory_gb"] > 0


def read_after(meter: Throughput, seconds: float) -> dict[str, float]:
    """The figures of a step that took so long."""
    meter.count(Collator(0)([random_row(random.Random(7), 50)]))
    meter.since = time.perf_counter() - seconds
    return meter.read(lambda sums: sums, processes=1)


def test_a_ceiling_below_what_training_reaches_is_measured_again(
    meter: Throughput, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing else has the cores.
    monkeypatch.setattr(throughput.time, "process_time", lambda: 1e3 * time.perf_counter())
    meter.ceiling.flops = 1.0
    figures = read_after(meter, seconds=1.0)
    assert meter.ceiling.flops > 1e6
    assert 0 <= figures["utilisation"] <= 1


def test_a_share_of_an_unknown_ceiling_is_not_told(meter: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
    meter.ceiling.undisturbed = True
    # Faster than any product that is found: what was measured is no ceiling, for slower steps neither.
    for seconds in (1e-7, 60.0):
        assert "utilisation" not in read_after(meter, seconds)
    # Others had the cores in all products.
    monkeypatch.setattr(throughput.time, "process_time", lambda: 0.0)
    busy = Throughput(tiny(), torch.device("cpu"), torch.float32)
    assert not busy.ceiling.known
    assert "utilisation" not in read_after(busy, seconds=60.0)
