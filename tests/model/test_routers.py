"""Mixtures of experts: the balancing loss of their routers, LoRA on experts, checkpoints, memory and speed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from transformers.models.qwen3_moe import modeling_qwen3_moe

from finetune.__main__ import main as finetune
from finetune_lora.__main__ import main as finetune_lora
from novelgpt.budget.simulated_model import SimulatedModel, track_step, worst_batch
from novelgpt.checks.run import adapt
from novelgpt.model import attention as _attention  # noqa: F401  registers "packed"
from novelgpt.model.lora import attach_lora, merge_adapter
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.model.routers import router_balance
from novelgpt.settings.arguments import ConversationArguments, LoraArguments, ModelArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.runs import LoraRun, LoraTrainArguments
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow
from novelgpt.training import throughput
from novelgpt.training.throughput import StepCost
from novelgpt.training.trainer import NovelTrainer
from tests.faults.runs import weights, write_base, write_rows
from tests.memory_rows import as_rows
from tests.ranks import run_pipeline

VOCABULARY, EXPERTS, CHOSEN = 71, 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.3,
    "num_experts_per_tok": CHOSEN, "router_aux_loss_coef": 0.02, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SPARSE = {"num_experts": EXPERTS, "moe_intermediate_size": 12}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**SPARSE, "shared_expert_intermediate_size": 12}),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM, SPARSE),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": EXPERTS}),
}
Batch = dict[str, Any]


def tiny(kind: str = "qwen3", **changes: Any) -> PreTrainedModel:
    config, architecture, more = KINDS[kind]
    torch.manual_seed(1)
    return architecture._from_config(config(**SIZES | more | changes), attn_implementation="packed").train()


def encoded(sizes: list[int]) -> list[EncodedRow]:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for size in sizes:
        ids = torch.randint(1, VOCABULARY, (size,), generator=draw)
        labels = torch.where(torch.rand(size, generator=draw) < 0.6, ids, IGNORE_INDEX)
        labels[0] = IGNORE_INDEX
        rows.append(EncodedRow(ids.tolist(), labels.tolist()))
    return rows


def padded() -> Batch:
    return Collator(0)([vars(row) for row in encoded([30, 17, 24])])


def packed() -> Batch:
    """Two packs of unequal length."""
    parts = [encoded([9, 20, 4]), encoded([11, 8])]
    rows = []
    for part in parts:
        lines = {name: torch.tensor(sum((vars(row)[name] for row in part), [])) for name in ("input_ids", "labels")}
        rows.append(lines | {"position_ids": torch.cat([torch.arange(len(row.labels)) for row in part])})
    return Collator(0, mask_packs=True)(rows)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max())), name


@pytest.mark.parametrize("asked", ["by config.json", "by an option"])
@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(kind: str, make: Callable[[], Batch], asked: str) -> None:
    model = tiny(kind, output_router_logits=asked == "by config.json")
    batch = make()
    # transformers' function gets its mask through the attention's, which keeps packs apart by their borders here.
    mask = batch.pop("token_mask", batch.get("attention_mask"))
    whole = model(**{name: value for name, value in batch.items() if name != "labels"}, output_router_logits=True)
    plain = model.loss_function(whole.logits, batch["labels"], VOCABULARY)
    aux = modeling_qwen3_moe.load_balancing_loss_func(whole.router_logits, EXPERTS, CHOSEN, mask)
    if "attention_mask" in batch:
        stock = model(**batch, output_router_logits=True)
        assert float(stock.loss) == pytest.approx(float(plain + 0.02 * aux), rel=1e-6)
    (plain + 0.02 * aux).backward()
    expected = gradients(model)
    model.zero_grad()

    attach_chunked_loss(model, True, router_balance(model, None if asked == "by config.json" else 0.02))
    ours = model(**batch, token_mask=mask)
    assert float(ours.loss) == pytest.approx(float(plain + 0.02 * aux), rel=1e-6)
    assert float(ours.aux_loss) == pytest.approx(float(aux), rel=1e-6)
    ours.loss.backward()
    assert_close(gradients(model), expected)
    with torch.no_grad():  # an evaluation is of cross-entropy alone
        evaluated = model(**batch, token_mask=mask)
    assert float(evaluated.loss) == pytest.approx(float(plain), rel=1e-6)
    assert evaluated.aux_loss is None


def test_the_balancing_loss_of_weighted_rows_has_their_share() -> None:
    """As the cross-entropy: by their weights, among those of the whole step."""
    model = tiny()
    batch = packed()
    weights = torch.rand(batch["labels"].shape) * (batch["labels"] != IGNORE_INDEX)
    attach_chunked_loss(model, True, router_balance(model, 0.02))
    plain, alone = model(**batch), model(**batch, loss_weights=weights)
    assert float(alone.aux_loss) == pytest.approx(float(plain.aux_loss), rel=1e-6)
    of_step = model(**batch, loss_weights=weights, num_items_in_batch=torch.tensor(50.0))
    share = float(weights[:, 1:].sum()) / 50
    assert float(of_step.aux_loss) == pytest.approx(share * float(alone.aux_loss), rel=1e-5)
    assert of_step.loss.item() == pytest.approx(share * alone.loss.item(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_learn_from_it_with_and_without_checkpointing(checkpointing: bool) -> None:
    model = tiny()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    batch = padded()
    found = []
    for coefficient in (0.0, 5.0):
        attached = tiny()
        if checkpointing:
            attached.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        attach_chunked_loss(attached, True, router_balance(attached, coefficient))
        attached(**batch).loss.backward()
        found.append(gradients(attached)["model.layers.0.mlp.gate.weight"])
    assert float((found[1] - found[0]).abs().max()) > 0.01


def test_checkpointing_that_cuts_the_gradient_off_is_told() -> None:
    model = tiny()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    attach_chunked_loss(model, True, router_balance(model, 0.1))
    with pytest.raises(UserError, match="no gradient"):
        model(**padded())


@pytest.mark.parametrize(("changes", "option", "coefficient"), [
    ({}, None, None), ({"output_router_logits": True}, None, 0.02), ({"output_router_logits": True}, 0.0, None),
    ({}, 0.5, 0.5), ({"output_router_logits": True, "router_aux_loss_coef": 0.0}, None, None),
])  # fmt: skip
def test_who_asks_for_it(changes: dict[str, Any], option: float | None, coefficient: float | None) -> None:
    balance = router_balance(tiny(**changes), option)
    assert (balance and balance.coefficient) == coefficient


def test_a_model_without_routers_balances_none() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    assert router_balance(model) is None
    assert router_balance(model, 0.0) is None
    with pytest.raises(UserError, match="no balancing loss"):
        router_balance(model, 0.1)


# --- steps of several micro-batches


class Recorder(TrainerCallback):
    """Gradients before each step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *arguments: Any, model: nn.Module, **options: Any) -> None:
        self.gradients.append(gradients(model))


def train(model: nn.Module, folder: Path, rows: Any, steps: int = 1, **settings: Any) -> tuple[NovelTrainer, Recorder]:
    throughput.CEILING_SIZE["cpu"] = 32
    training = TrainArguments(
        output_dir=str(folder), max_steps=steps, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        warmup_steps=0, max_grad_norm=0, logging_steps=1, save_strategy="no", eval_strategy="no", eval_on_start=False,
        disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    recorder = Recorder()
    trainer = NovelTrainer(
        model=model, args=training, train_dataset=rows, data_collator=Collator(0), callbacks=[recorder]
    )
    trainer.train()
    return trainer, recorder


def test_a_step_weighs_its_micro_batches_by_trained_tokens(tmp_path: Path) -> None:
    rows = encoded([30, 17, 24, 12])
    trainer, recorder = train(
        tiny(), tmp_path, as_rows(rows), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    order = list(trainer.get_train_dataloader())
    # By hand: cross-entropy over all tokens, and the balancing loss of each micro-batch by its share of them.
    model = tiny()
    items = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in order)
    cross_entropy = balancing = torch.zeros(())
    for batch in order:
        trained = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
        loss = model.loss_function(out.logits, batch["labels"], VOCABULARY)
        cross_entropy, balancing = cross_entropy + loss * trained / items, balancing + out.aux_loss * trained / items
    (cross_entropy + 0.5 * balancing).backward()
    assert_close(recorder.gradients[0], gradients(model))
    assert entry["loss"] == pytest.approx(float(cross_entropy), abs=1e-4)
    assert entry["aux_loss"] == pytest.approx(float(balancing), rel=1e-4)


def test_a_smoothed_loss_is_a_mean_over_the_step_and_leaves_no_balancing_out(tmp_path: Path) -> None:
    config = Qwen3Config(**SIZES)
    rows, smoothing = as_rows(encoded([30, 17, 24, 12])), {"label_smoothing_factor": 0.2}
    torch.manual_seed(1)
    dense = Qwen3ForCausalLM._from_config(config, attn_implementation="packed").train()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, recorder = train(dense, tmp_path, rows, **batches, **smoothing)
    order = list(trainer.get_train_dataloader())
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="packed").train()
    model.load_state_dict(before)
    losses = []
    for batch in order:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        trained = labels != IGNORE_INDEX
        losses.append(
            nn.functional.cross_entropy(logits[trained], labels[trained], reduction="none", label_smoothing=0.2)
        )
    torch.cat(losses).mean().backward()
    assert_close(recorder.gradients[0], gradients(model))
    with pytest.raises(UserError, match="--label_smoothing_factor makes the loss of logits alone"):
        train(tiny(), tmp_path, rows, **batches, **smoothing, router_aux_loss_coef=0.5)
    weighted = encoded([30, 17])
    weighted[1].loss_weights = [0.5 * (label != IGNORE_INDEX) for label in weighted[1].labels]
    with pytest.raises(UserError, match="--label_smoothing_factor makes .* without the weights of rows"):
        train(model, tmp_path, as_rows(weighted), **batches, **smoothing)


# --- whole runs


@pytest.fixture(scope="module")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with the tiny-random base's tokenizer."""
    folder = write_base(base_folder, tmp_path_factory.mktemp("mixture") / "base")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    changes = {"vocab_size": 1000, "max_position_embeddings": 4096, "eos_token_id": 999, "pad_token_id": 997}
    tiny(**changes, output_router_logits=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 16)[1]


def words_of(base: Path, rows: Path, folder: Path, more: str = "") -> list[str]:
    words = f"""
        --model {base} --train_files {rows} --output_dir {folder} --precision fp32 --max_length 64
        --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --max_steps 4 --logging_steps 3 --save_steps 2
        --save_strategy steps --learning_rate 1e-2 --warmup_steps 0 --stop_check 0 --disable_tqdm True {more}
    """
    return words.split()


def entries(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


def test_a_run_gone_on_with_ends_with_the_same_experts(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput.CEILING_SIZE["cpu"] = 32
    finetune(words_of(base, rows, tmp_path / "whole", "--save_total_limit 9"))
    printed = capsys.readouterr().out
    assert "mixture of 4 experts: 0.02 x the routers' balancing loss is added" in printed
    assert "expected of" in printed and "no estimate" not in printed
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (*tmp_path.glob("again/checkpoint-4"), *tmp_path.glob("again/*.safetensors")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    path = tmp_path / "again" / "run.json"
    left = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key != "results"}
    path.write_text(json.dumps(left | {"status": "running"}), encoding="utf-8")
    with pytest.raises(SystemExit):
        finetune(words_of(base, rows, tmp_path / "again", "--router_aux_loss_coef 0.5"))
    assert "router_aux_loss_coef (None, now 0.5)" in capsys.readouterr().err
    finetune(words_of(base, rows, tmp_path / "again", "--save_total_limit 9"))
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    for name in ("loss", "aux_loss", "eval_loss"):
        assert entries(tmp_path / "again", name) == entries(tmp_path / "whole", name)
    # Not the base's, which is what a file's names of single experts would leave there.
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "again", base))
    name = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(ours.get_parameter(name), theirs.get_parameter(name))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 2])
def test_two_ranks_balance_as_one_does(zero: int, base: Path, rows: Path, tmp_path: Path) -> None:
    one = words_of(base, rows, tmp_path / "one", "--optim sgd --packing False --lr_scheduler_type constant --seed 3")
    one[one.index("--logging_steps") + 1] = "1"
    two = [word.replace(str(tmp_path / "one"), str(tmp_path / "two")) for word in one]
    two[two.index("--gradient_accumulation_steps") + 1] = "1"
    for words, processes in ((one, 1), (two, 2)):
        run_pipeline("finetune", words, processes, zero if processes == 2 else 0)
    for name in ("loss", "aux_loss", "eval_loss"):
        of_one, of_two = entries(tmp_path / "one", name), entries(tmp_path / "two", name)
        assert [step for step, _ in of_one] == [step for step, _ in of_two]
        assert [value for _, value in of_two] == pytest.approx([value for _, value in of_one], rel=1e-3), name


def test_lora_with_its_defaults_trains_the_experts(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    throughput.CEILING_SIZE["cpu"] = 32
    finetune_lora(words_of(base, rows, tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "LoRA without dropout" in printed and "no estimate" not in printed
    ids = torch.randint(1, 900, (2, 9), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    halves = [weight for name, weight in adapted.named_parameters() if "experts" in name and "lora_B" in name]
    assert halves and all(bool(weight.any()) for weight in halves)
    expected = logits(adapted)
    assert float((logits(merge_adapter(adapted)) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("targets", "adapted"), [
    ("q_proj v_proj", set()), ("q_proj experts.gate_up_proj experts.down_proj", {"down_proj", "gate_up_proj"}),
    ("q_proj gate_up_proj", {"gate_up_proj"}),
])  # fmt: skip
def test_experts_are_adapted_by_name(
    kind: str, targets: str, adapted: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = attach_lora(tiny(kind), LoraArguments(lora_targets=targets.split(), lora_rank=2))
    found = {part.parameter_name for part in model.modules() if type(part).__name__ == "ParamWrapper"}
    assert found == adapted
    printed = capsys.readouterr().out
    assert ("leaves the experts as they are" in printed) == (not adapted)
    assert ("without dropout" in printed) == bool(adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_tries_the_adapter_of_the_pipeline(kind: str, tmp_path: Path) -> None:
    lora, training = LoraArguments(lora_rank=2), LoraTrainArguments(output_dir=str(tmp_path), use_cpu=True)
    run = LoraRun(ModelArguments(str(tmp_path)), ConversationArguments(), lora, training)
    names = [
        {name for name, weight in adapted.named_parameters() if weight.requires_grad}
        for adapted in (adapt(run, tiny(kind)), attach_lora(tiny(kind), lora))
    ]
    assert names[0] == names[1]


def test_what_does_not_go_together_with_experts_names_its_remedy() -> None:
    with pytest.raises(UserError) as dora:
        attach_lora(tiny(), LoraArguments(use_dora=True))
    assert "--use_dora" in dora.value.cause and "leave it out" in dora.value.remedy
    with pytest.raises(UserError) as half:
        attach_lora(tiny(), LoraArguments(lora_targets=["gate_proj"]))
    assert "up_proj" in half.value.cause and "together" in half.value.remedy
    with pytest.raises(UserError) as unknown:
        attach_lora(tiny(), LoraArguments(lora_targets=["q_proj", "gateproj"]))
    assert "experts.gate_up_proj" in unknown.value.remedy


# --- memory and speed


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_simulated_step_holds_what_a_real_one_does(kind: str, evaluation: bool, lora: bool, tmp_path: Path) -> None:
    changes = {"vocab_size": 3000, "hidden_size": 64, "num_hidden_layers": 5}
    model = tiny(kind, **changes)
    model.config.use_cache = False
    model.config.save_pretrained(tmp_path)

    def adapt(base: PreTrainedModel) -> nn.Module:
        return attach_lora(base, LoraArguments(lora_rank=4))

    attach_chunked_loss(model)
    counted = track_step(
        adapt(model) if lora else model, worst_batch(2, 96, True, torch.device("cpu")), None, evaluation=evaluation
    ).peak()
    simulated = SimulatedModel(ModelArguments(str(tmp_path)), torch.device("cpu"), prepare=adapt if lora else None)
    estimated = simulated.step(2, 96, True, None, evaluation=evaluation).peak()
    assert estimated.total() == pytest.approx(counted.total(), rel=0.05)
    assert estimated["weights"] == counted["weights"]


def test_experts_count_as_often_as_tokens_are_sent_to_them() -> None:
    def cost(chosen: int) -> float:
        return StepCost(tiny(num_experts_per_tok=chosen)).per_token

    model = tiny()
    stacks = sum(weight.numel() for weight in model.parameters() if weight.dim() == 3)
    assert cost(2) - cost(1) == pytest.approx(6 * stacks / EXPERTS)
