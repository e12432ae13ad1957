"""The estimate counts what a real step does, and auto_batch chooses without a trace."""

import copy
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from novelgpt.budget import memory, memory_plan, simulated_model
from novelgpt.budget.auto_batch import largest_fitting, micro_batches, try_micro_batches, with_rows
from novelgpt.budget.live_bytes import HOLES, Heap, LiveBytes
from novelgpt.budget.memory import MemoryEstimate, estimate_memory
from novelgpt.budget.memory_plan import plan_memory, return_freed_memory
from novelgpt.budget.simulated_model import SimulatedModel, track_step, worst_batch
from novelgpt.checks.devices import NEARLY_AS_FAST
from novelgpt.model.lora import attach_lora
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.arguments import ConversationArguments, LoraArguments, ModelArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import SAMPLES
from novelgpt.settings.runs import FinetuneRun
from novelgpt.training.throughput import matmul_ceiling

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROWS, TOKENS = 2, 96
SIZES: dict[str, Any] = {
    "vocab_size": 3000, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
}
LORA = LoraArguments(lora_rank=4)
# What is simulated, and how: keyword arguments of a step.
CASES = {
    "plain": {},
    "checkpointing": {"checkpointing": {}},
    "accumulated": {"accumulated": True},
    "evaluation": {"evaluation": True},
}


@pytest.fixture(
    scope="module", params=["qwen3", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2", "llama"))]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of a small model, which is all that a simulation reads."""
    path: Path = tmp_path_factory.mktemp(request.param)
    CONFIGS[request.param].save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=CONFIGS)
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of each architecture for all tests."""
    path: Path = tmp_path_factory.mktemp(request.param)
    CONFIGS[request.param].save_pretrained(path)
    return path


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process seems to hold as much at each estimate: garbage collectors and allocators work in between."""
    held = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=100_000_000))
    monkeypatch.setattr(memory, "psutil", SimpleNamespace(Process=lambda: held))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("qwen2")
    CONFIGS["qwen2"].save_pretrained(path)
    return path


def adapt(base: PreTrainedModel) -> nn.Module:
    return attach_lora(base, LORA)


def simulate(folder: Path, lora: bool = False, **options: Any) -> SimulatedModel:
    return SimulatedModel(ModelArguments(str(folder)), CPU, prepare=adapt if lora else None, **options)


def real(folder: Path, lora: bool = False) -> nn.Module:
    """The model that `simulate` simulates, with numbers."""
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="packed")
    attach_chunked_loss(base)
    return adapt(base) if lora else base


def run_of(folder: Path, tokens: int = TOKENS, **training: Any) -> FinetuneRun:
    """A run whose rows are packs of so many tokens."""
    data = ConversationArguments(max_length=tokens)
    arguments = TrainArguments(output_dir="unused", use_cpu=True, **training)
    return FinetuneRun(ModelArguments(str(folder)), data, arguments)


def planned(
    folder: Path, capacity: int, monkeypatch: pytest.MonkeyPatch, tokens: int = TOKENS, **training: Any
) -> FinetuneRun:
    """The run after its memory was planned for a device of `capacity` bytes."""
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: capacity)
    plan = plan_memory(run_of(folder, tokens, **training), [{"input_ids": [1] * tokens}])  # type: ignore[arg-type]
    assert isinstance(plan.run, FinetuneRun)
    return plan.run


def total(folder: Path, tokens: int = TOKENS, **training: Any) -> int:
    """The estimate of such a run."""
    return estimate_memory(simulate(folder), run_of(folder, tokens, **training).training, tokens, True).total


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_simulated_step_holds_what_a_real_one_does(
    folder: Path, case: str, autocast: torch.dtype | None, lora: bool
) -> None:
    check_simulated(folder, case, autocast, lora)


@pytest.mark.parametrize(
    ("case", "autocast", "lora"), [("plain", None, False), ("checkpointing", torch.bfloat16, True)]
)
def test_a_step_of_each_architecture_is_simulated(
    any_folder: Path, case: str, autocast: torch.dtype | None, lora: bool
) -> None:
    check_simulated(any_folder, case, autocast, lora)


def check_simulated(folder: Path, case: str, autocast: torch.dtype | None, lora: bool) -> None:
    """All parts of a step are as large as those of a real one."""
    counted = track_step(real(folder, lora), worst_batch(ROWS, TOKENS, True, CPU), autocast, **CASES[case]).peak()
    simulated = simulate(folder, lora).step(ROWS, TOKENS, True, autocast, **CASES[case]).peak()
    assert simulated.total() == pytest.approx(counted.total(), rel=0.02)
    assert simulated["weights"] == counted["weights"]
    for part in ("copies", "gradients", "activations", "loss"):
        assert simulated[part] == pytest.approx(counted[part], abs=0.02 * counted.total())


def test_rows_of_unequal_length_are_simulated(qwen2: Path) -> None:
    batch = worst_batch(ROWS, TOKENS, False, CPU)
    batch["attention_mask"][0, -1] = 0
    counted = track_step(real(qwen2), batch, None).peak().total()
    assert simulate(qwen2).step(ROWS, TOKENS, False, None).peak().total() == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [pytest.param(False, id="full"), pytest.param(True, id="lora", marks=pytest.mark.long)]
)
def test_three_layers_stand_for_all(folder: Path, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few = simulate(folder, lora)
    monkeypatch.setattr(simulated_model, "KEPT_LAYERS", 100)
    whole = simulate(folder, lora)
    assert sorted(few.trained) == sorted(whole.trained)
    for options in CASES.values():
        for autocast in (None, torch.bfloat16):
            steps = [model.step(ROWS, TOKENS, True, autocast, **options) for model in (few, whole)]
            assert +steps[0].peak() == +steps[1].peak()
            heaps = [step.peak(heap=Heap(limit=100_000)) for step in steps]
            assert +heaps[0] == +heaps[1]


def test_layers_of_two_kinds_are_all_simulated(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
    Qwen2Config(**SIZES, layer_types=kinds, use_sliding_window=True, sliding_window=32).save_pretrained(tmp_path)
    model = simulate(tmp_path)
    real_count = sum(parameter.numel() for parameter in real(tmp_path).parameters())
    assert sum(numel for numel, _ in model.trained) == real_count
    counted = track_step(real(tmp_path), worst_batch(ROWS, TOKENS, True, CPU), None).peak().total()
    assert model.step(ROWS, TOKENS, True, None).peak().total() == pytest.approx(counted, rel=0.02)


def test_a_heap_keeps_small_blocks_and_gives_large_ones_back() -> None:
    with LiveBytes() as live:
        small = [torch.empty(100, dtype=torch.uint8) for _ in range(5)]
        del small
        large = torch.empty(1000, dtype=torch.uint8)
        del large
        torch.empty(1200, dtype=torch.uint8)
    assert live.peak().total() == 1200
    heap = Heap(limit=500)
    assert live.peak(heap=heap) == {"activations": 1200, "kept": 500 + HOLES * 100}
    assert heap.high == 500


def test_a_cpu_converts_the_operands_of_mixed_sums() -> None:
    sums, products = torch.zeros(1000), torch.zeros(1000, dtype=torch.bfloat16)
    with LiveBytes() as live:
        sums += products
    assert live.peak().total() == 4000 + 4000


def test_nothing_is_drawn_printed_or_allocated(qwen2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    model = simulate(qwen2, lora=True)
    model.step(ROWS, TOKENS, True, None, checkpointing={})
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().out == ""


def test_longer_rows_and_more_of_them_take_more(folder: Path) -> None:
    model = simulate(folder)
    sizes = [model.step(ROWS, tokens, True, None).peak().total() for tokens in (16, 64, 256, 1024)]
    assert sizes == sorted(set(sizes))
    sizes = [model.step(rows, TOKENS, True, None).peak().total() for rows in (1, 2, 4, 8)]
    assert sizes == sorted(set(sizes))


def test_four_bits_hold_the_linear_layers_but_the_head(qwen2: Path) -> None:
    whole = simulate(qwen2, lora=True).step(ROWS, TOKENS, True, torch.bfloat16).peak()
    packed = simulate(qwen2, lora=True, four_bits=True).step(ROWS, TOKENS, True, torch.bfloat16).peak()
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    linear = SIZES["num_hidden_layers"] * (3 * width * width + 3 * width * inner)
    # 4 bytes become half a byte and the scales of the blocks.
    assert whole["weights"] - packed["weights"] == pytest.approx(linear * (4 - 0.516), rel=0.001)


def test_optimizer_states_and_buckets(qwen2: Path) -> None:
    model = simulate(qwen2)
    count = sum(numel for numel, _ in model.trained)
    training = run_of(qwen2).training
    alone = estimate_memory(model, training, TOKENS, True)
    assert alone.optimizer == 8 * count
    assert alone.process > 50e6
    several = estimate_memory(model, of_several(training, 4), TOKENS, True)
    assert several.gradients == alone.gradients + 4 * count


def of_several(training: TrainArguments, processes: int, **zero: Any) -> TrainArguments:
    """The arguments as one of several processes has them, under DeepSpeed if settings of ZeRO are given."""

    class Several(TrainArguments):
        world_size = processes  # type: ignore[assignment]

    changed = copy.copy(training)
    changed.__class__ = Several
    if zero:
        changed.deepspeed = {"zero_optimization": zero}
        changed.hf_deepspeed_config = SimpleNamespace(config=changed.deepspeed)  # type: ignore[attr-defined]
    return changed


def test_each_stage_of_zero_divides_one_more_part(qwen2: Path) -> None:
    model = simulate(qwen2)
    training = run_of(qwen2).training
    count = sum(numel for numel, _ in model.trained)
    stages: dict[int, MemoryEstimate] = {}
    for stage in (1, 2, 3):
        changed = of_several(training, 4, stage=stage, reduce_bucket_size=0, stage3_max_live_parameters=0)
        stages[stage] = estimate_memory(model, changed, TOKENS, True)
    for estimate in stages.values():
        assert estimate.optimizer == 8 * count // 4
        assert estimate.copies == 4 * count // 4  # fp32 masters
    assert [stages[stage].gradients for stage in (1, 2, 3)] == [4 * count, count, count]
    assert [stages[stage].weights for stage in (1, 2)] == [stages[1].weights] * 2
    assert stages[3].weights == stages[1].weights // 4


def test_offloading_relieves_a_gpu_alone(qwen2: Path) -> None:
    training = run_of(qwen2).training
    changed = of_several(training, 2, stage=2, offload_optimizer={"device": "cpu"})
    model = simulate(qwen2)
    count = sum(numel for numel, _ in model.trained)
    assert estimate_memory(model, changed, TOKENS, True).optimizer == 4 * count
    on_gpu = SimpleNamespace(device=torch.device("cuda"), trained=model.trained, step=model.step)
    away = estimate_memory(on_gpu, changed, TOKENS, True)  # type: ignore[arg-type]
    assert away.optimizer == away.copies == away.process == 0


def test_micro_batches_divide_the_rows_of_a_step() -> None:
    training = TrainArguments(
        output_dir="unused", use_cpu=True, per_device_train_batch_size=3, gradient_accumulation_steps=4
    )
    assert micro_batches(training) == [1, 2, 3, 4, 6, 12]
    training = with_rows(training, 6)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (6, 2)
    assert micro_batches(training) == [1, 2, 3, 4, 6, 12]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators return memory in other ways")
def test_memory_between_blocks_in_use_is_returned() -> None:
    def private() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])

    size, count = 50_000, 2000  # below what glibc maps one by one
    blocks = [b"x" * size for _ in range(count)]
    used = blocks[::2]
    del blocks
    before = private()
    return_freed_memory()
    assert len(used) * size * 0.8 < before - private()


def test_the_largest_size_that_fits() -> None:
    sizes = [1, 2, 3, 4, 6, 12]
    for limit in (1, 2, 5, 6, 11, 12, 99):
        assert largest_fitting(sizes, lambda size, limit=limit: size <= limit) == max(s for s in sizes if s <= limit)
    assert largest_fitting(sizes, lambda size: False) is None


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trying_micro_batches_leaves_no_trace(qwen2: Path, lora: bool) -> None:
    model = real(qwen2, lora)
    model.eval()
    training = run_of(qwen2, per_device_train_batch_size=3, gradient_accumulation_steps=4).training
    parameters = list(model.parameters())
    held = torch.ones_like(parameters[0])
    parameters[0].requires_grad_(True).grad = held
    states = torch.get_rng_state()
    weights = [parameter.detach().clone() for parameter in parameters]
    forward = vars(model.get_base_model() if lora else model)["forward"]
    tried: list[int] = []

    def peak_of(run: Callable[[], None]) -> int:
        rows: int = run.args[2]["input_ids"].shape[0]  # type: ignore[attr-defined]
        tried.append(rows)
        if rows > 6:
            raise torch.OutOfMemoryError("no room")
        with LiveBytes() as live:
            live.claim(model.parameters(), "weights")
            run()
        return live.peak().total()

    assert try_micro_batches(model, training, TOKENS, True, 10**12, peak_of) == 6
    assert tried == [1, 2, 3, 4, 6, 12]
    assert parameters[0].grad is held
    assert bool((held == 1).all())
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert all(torch.equal(now, before) for now, before in zip(parameters, weights, strict=True))
    assert torch.equal(torch.get_rng_state(), states)
    assert not model.training
    assert vars(model.get_base_model() if lora else model)["forward"] == forward


def test_tried_micro_batches_leave_room_for_the_optimizer(qwen2: Path) -> None:
    model = real(qwen2)
    training = run_of(qwen2, per_device_train_batch_size=8).training
    states = 8 * sum(parameter.numel() for parameter in model.parameters())

    def rows_of(run: Any) -> int:
        return int(run.args[2]["input_ids"].shape[0]) * 1_000_000

    capacity = int((4_000_000 + states) / 0.92) + 1000
    assert try_micro_batches(model, training, TOKENS, True, capacity, rows_of) == 4
    with pytest.raises(UserError, match="one row of 96 tokens"):
        try_micro_batches(model, training, TOKENS, True, states, rows_of)


@pytest.mark.usefixtures("steady")
def test_checkpointing_is_chosen_where_the_run_would_not_fit(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough tokens for activations to outweigh this process.
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "tokens": 8 * TOKENS}
    need = total(qwen2, **options)
    less = total(qwen2, **options, activation_checkpointing=True)
    assert less < 0.9 * need
    tight = int(need / 0.9 * 0.95)
    assert not planned(qwen2, 10 * need, monkeypatch, **options).training.activation_checkpointing
    assert planned(qwen2, tight, monkeypatch, **options).training.activation_checkpointing
    off = planned(qwen2, tight, monkeypatch, **options, activation_checkpointing=False)
    assert not off.training.activation_checkpointing


def test_what_helps_is_named_where_a_run_will_not_fit(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(qwen2, 10**6, monkeypatch, per_device_train_batch_size=4, activation_checkpointing=False)
    text = capsys.readouterr().out
    assert "will probably not fit" in text
    names = [
        "--activation_checkpointing (",
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 (",
        "LoRA",
    ]
    places = [text.index(name) for name in names]
    assert places == sorted(places)


@pytest.mark.usefixtures("steady")
def test_auto_batch_takes_the_largest_micro_batch_of_the_estimate(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "auto_batch": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 6,
        "activation_checkpointing": False,
    }  # fmt: skip
    sizes = {rows: total(qwen2, per_device_train_batch_size=rows, gradient_accumulation_steps=24 // rows)
             for rows in (1, 8, 12)}  # fmt: skip
    room = int((sizes[8] + sizes[12]) / 2 / 0.8)
    training = planned(qwen2, room, monkeypatch, **options).training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 3)
    with pytest.raises(UserError, match="--auto_batch: one row of 96 tokens takes"):
        planned(qwen2, sizes[1], monkeypatch, **options)


def test_a_model_that_cannot_be_simulated_is_no_error(
    qwen2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("unheard of")

    monkeypatch.setattr(memory_plan, "SimulatedModel", fail)
    run = planned(qwen2, 10**12, monkeypatch, per_device_train_batch_size=4)
    assert run.training.per_device_train_batch_size == 4
    assert "no estimate for this model (RuntimeError: unheard of)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_the_estimate_is_near_what_a_run_takes(
    precision: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    if precision == "bf16" and matmul_ceiling(cpu, torch.bfloat16) < NEARLY_AS_FAST * matmul_ceiling(
        cpu, torch.float32
    ):
        pytest.skip("this CPU has no fast instructions for bf16: two steps would take it many minutes")
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["--model", str(tmp_path / "base"), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    words += ["--train_files", str(SAMPLES / "papers" / "train.jsonl"), "--max_length", "1024", "--save_strategy", "no"]
    words += [
        "--per_device_train_batch_size",
        "2",
        "--precision",
        precision,
        "--eval_strategy",
        "no",
        "--stop_check",
        "0",
        # Forward and backward passes of their own, that take time and no more memory than training.
        "--guards",
        "False",
        "--preflight",
        "False",
    ]
    rows = (SAMPLES / "papers" / "valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "valid.jsonl").write_text("".join(rows[:2]), encoding="utf-8")
    words += ["--valid_files", str(tmp_path / "valid.jsonl"), "--eval_on_start", "False"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *words], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    text = (tmp_path / "output.txt").read_text()
    assert status == 0, text[-3000:]
    expected = re.search(r"memory: ([\d.]+) GB expected", text)
    assert expected is not None, text[-3000:]
    assert float(expected[1]) * 1e9 == pytest.approx(usage.ru_maxrss * 1024, rel=0.15)
