"""Models that must not be trained are refused before the first step, by every process, and sound ones are not.

Started as a script, this file is one of two processes that train the CASES.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from novelgpt.checks.first_step import (
    EVALUATIONS,
    check_forward,
    check_gradients,
    check_vocabulary,
    first_rows,
    probe_first_rows,
)
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.training.plan import Probe
from novelgpt.training.trainer import NovelTrainer
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, WIDTH, TOKENS = 71, 32, 12
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
LLAMA: dict[str, Any] = {"intermediate_size": 64, "max_position_embeddings": 64}
# A token that MarkedEmbedding cannot bear, and another.
BAD, GOOD = 7, 8


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA, **settings))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def check(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if dtype != torch.float32:
        autocast = partial(torch.autocast, "cpu", dtype=dtype)
    check_forward(model, batch(), dtype, autocast)


# --- broken parts


class OtherInTraining(nn.Module):
    """A part that computes something else in training."""

    def __init__(self, part: nn.Module, factor: float) -> None:
        super().__init__()
        self.part, self.factor = part, factor

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.part(states) * (self.factor if self.training else 1.0)


class OverwritingHead(nn.Linear):
    """Normalises its rows, in evaluation once and for all, as the code published with Baichuan2 did at three dates.

    0: evaluation makes a new parameter; 1: it overwrites the weight; 2: the same, and training forgets that it did.
    """

    version = 1
    fresh = True

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.training:
            weight = functional.normalize(weight)
            self.fresh = self.fresh or self.version == 2
        elif self.fresh:
            self.fresh = False
            weight = functional.normalize(weight).detach()
            if self.version == 0:
                self.weight = nn.Parameter(weight)
            else:
                self.weight.data = weight
        return functional.linear(states, weight)


class NormalisingHead(nn.Linear):
    """The same without a memory."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, functional.normalize(self.weight))


class MarkedEmbedding(nn.Embedding):
    """Has no number for one token."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + torch.where(ids == BAD, math.nan, 0.0)[..., None]


class CutOff(nn.Linear):
    """Gives its weight no gradient."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.weight.detach())


def with_head(kind: type[nn.Linear], version: int = 1) -> LlamaForCausalLM:
    model = llama()
    head = kind(WIDTH, VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    vars(head)["version"] = version
    model.lm_head = head
    return model


def other_in_training(factor: float = 0.5) -> LlamaForCausalLM:
    model = llama()
    model.model.norm = OtherInTraining(model.model.norm, factor)
    return model


def marked() -> LlamaForCausalLM:
    model = llama()
    embedding = MarkedEmbedding(VOCABULARY, WIDTH)
    embedding.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = embedding
    return model


def cut_off() -> LlamaForCausalLM:
    model = llama()
    layer = model.model.layers[1]
    layer.mlp.down_proj = CutOff(64, WIDTH, bias=False)
    return model


def adapted(model: PreTrainedModel, targets: str | list[str] = "all-linear") -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.5))


# --- forward passes


SOUND: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **LLAMA),
    "dropout of attention": LlamaConfig(**SIZES, **LLAMA, attention_dropout=0.5),
    "dropout modules": GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5,
        attn_pdrop=0.5, bos_token_id=1, eos_token_id=1,
    ),
    "dropout of the configuration": FalconConfig(**SIZES, attention_dropout=0.5, hidden_dropout=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("adapter", [False, True])
def test_sound_models_pass_whatever_their_dropout(name: str, adapter: bool) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(SOUND[name]).train()
    model = adapted(base).train() if adapter else base
    if "dropout" in name:
        with torch.no_grad():
            assert len({float(model(**batch()).loss) for _ in range(4)}) == 4
    settings = [(part.training, dict(vars(part))) for part in model.modules()]
    configuration = base.config.to_dict()
    state = torch.get_rng_state()
    calls: list[bool] = []
    handle = base.register_forward_hook(lambda module, *_: calls.append(module.training))
    check(model)
    handle.remove()
    assert calls == [True] + [False] * EVALUATIONS
    assert torch.equal(torch.get_rng_state(), state)
    for part, (mode, before) in zip(model.modules(), settings, strict=True):
        assert part.training == mode
        assert {key: value for key, value in vars(part).items() if isinstance(value, float)} == {
            key: value for key, value in before.items() if isinstance(value, float)
        }
    assert base.config.to_dict() == configuration
    assert all(tensor.grad is None for tensor in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_only_in_training_is_refused(dtype: torch.dtype) -> None:
    check(llama(), dtype)
    with pytest.raises(UserError, match=r"in training than in evaluation: loss \d\.\d+ against \d\.\d+") as caught:
        check(other_in_training(), dtype)
    model = other_in_training()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = [float(model.train(mode)(**batch()).loss) for mode in (True, False)]
    assert f"loss {losses[0]:.4f} against {losses[1]:.4f}" in caught.value.cause
    assert f"{abs(losses[0] - losses[1]):.4f} apart" in caught.value.cause


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_evaluation_that_overwrites_weights_is_refused(version: int) -> None:
    check(with_head(NormalisingHead))
    with pytest.raises(UserError, match=r"evaluating the model changes its weights: lm_head\.weight$"):
        check(with_head(OverwritingHead, version))


def test_the_first_module_that_is_not_finite_is_named() -> None:
    model = llama()
    model.model.layers[1].self_attn.o_proj.weight.data[3, 4] = math.nan
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=r"is that of model\.layers\.1\.self_attn\.o_proj$"):
        check(model)
    assert len(calls) == 1 + EVALUATIONS + 1
    assert not any(part._forward_hooks for part in model.modules() if part is not model)


def with_outputs_of(most: float) -> LlamaForCausalLM:
    """A model whose first up_proj outputs `most` at most, on the batch; all else is as small as ever."""
    model = llama()
    part = model.model.layers[0].mlp.up_proj
    found: list[float] = []
    handle = part.register_forward_hook(lambda *call: found.append(float(call[2].abs().max())))
    with torch.no_grad():
        model(**batch())
    handle.remove()
    part.weight.data *= most / found[0]
    return model


@pytest.mark.parametrize("most", [6.2e4, 1e5, 1e6])
def test_fp16_is_refused_where_outputs_come_near_its_end(most: float) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj outputs (6\.\de\+04|inf|nan)") as caught:
        check(with_outputs_of(most), torch.float16)
    assert "bf16" in caught.value.remedy and "fp32" in caught.value.remedy
    for dtype in (torch.float32, torch.bfloat16):
        check(with_outputs_of(most), dtype)


def test_fp16_is_taken_where_there_is_room() -> None:
    check(with_outputs_of(5e4), torch.float16)


def test_tokens_beyond_the_embedding_are_refused() -> None:
    rows = batch()
    rows["input_ids"][1, 3] = VOCABULARY - 1
    check_vocabulary(llama(), rows)
    rows["labels"][0, 2] = VOCABULARY
    with pytest.raises(UserError, match=f"hold token {VOCABULARY}, and the model's embedding has {VOCABULARY} rows"):
        check_vocabulary(llama(), rows)


# --- gradients


def watch(model: nn.Module, base: PreTrainedModel, rows: dict[str, torch.Tensor] | None = None) -> None:
    attach_chunked_loss(base)
    with check_gradients(model):
        model(**(batch() if rows is None else rows)).loss.backward()
    assert not any(tensor._backward_hooks for tensor in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_zeros_are_gradients(tied: bool, trained: bool) -> None:
    rows = batch()
    if not trained:
        rows["labels"][:] = IGNORE_INDEX
    for adapter in (False, True):
        base = llama(tie_word_embeddings=tied)
        model = adapted(base) if adapter else base
        watch(model, base, rows)
        zeros = [not bool(tensor.grad.any()) for tensor in model.parameters() if tensor.grad is not None]
        if adapter and trained:  # the first matrices of adapters, whose second ones are zero
            assert any(zeros) and not all(zeros)
        else:
            assert all(zeros) != trained


def test_trained_tensors_without_a_gradient_are_named() -> None:
    model = cut_off()
    with pytest.raises(UserError, match=r"1 of 21 trained tensors get no gradient: model\.layers\.1\.mlp\.down_proj"):
        watch(model, model)
    model.zero_grad()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    watch(model, model)


def test_adapters_that_are_switched_off_are_named() -> None:
    base = llama()
    model = adapted(base, ["q_proj"])
    model.train()
    part = base.model.layers[1].self_attn.q_proj
    part.forward = part.base_layer.forward
    with pytest.raises(UserError, match=r"2 of 4 trained tensors get no gradient: .*layers\.1\.self_attn\.q_proj"):
        watch(model, base)


def test_adapters_on_modules_that_are_never_called_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    base = llama()
    base.spare = nn.Linear(WIDTH, WIDTH)
    model = adapted(base, ["q_proj", "spare"])
    watch(model, base)
    assert "never calls stay as they are: base_model.model.spare.lora_A.default.weight" in capsys.readouterr().out


# --- whole runs


def test_a_run_that_is_refused_leaves_no_folder(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "base")
    for file in base_folder.glob("*token*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base" / "chat_template.jinja").write_bytes((base_folder / "chat_template.jinja").read_bytes())
    row = {"prompt": "山上有什么？", "completion": "有一座庙。"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 4, encoding="utf-8")
    main = importlib.import_module("finetune.__main__").main
    words = ["--model", str(tmp_path / "base"), "--train_files", str(rows), "--valid_files", str(rows)]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--save_strategy", "no"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "first output that is not finite is that of model.layers.1.mlp.down_proj" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):  # without the guards, the first step says it, and of which rows
        main([*words, "--guards", "False", "--stop_check", "0"])
    assert f"step 1: the loss is nan, on {rows}:1, " in capsys.readouterr().err


# --- two processes


def rows_with_marks() -> list[dict[str, Any]]:
    """Eight rows. The first micro-batch of the second process, and no other, holds the token that is not borne."""
    draw = torch.Generator().manual_seed(2)
    rows = []
    for number in range(8):
        ids = torch.randint(10, VOCABULARY, (TOKENS,), generator=draw).tolist()
        ids[0] = BAD if number == 2 else GOOD
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


Case = tuple[Callable[[], nn.Module], int, str]
CASES: dict[str, Case] = {
    "ddp, other in training": (other_in_training, 0, "in training than in evaluation"),
    "ddp, not finite on the second": (marked, 0, "first output that is not finite is that of model.embed_tokens"),
    "ddp, cut off": (cut_off, 0, "get no gradient: model.layers.1.mlp.down_proj.weight"),
    "ddp, sound": (partial(with_head, NormalisingHead), 0, ""),
    "zero 2, cut off": (cut_off, 2, "get no gradient: model.layers.1.mlp.down_proj.weight"),
    "zero 2, sound": (llama, 2, ""),
    "zero 3, overwriting, 1": (partial(with_head, OverwritingHead, 1), 3, "from one evaluation of the same rows"),
    "zero 3, overwriting, 2": (partial(with_head, OverwritingHead, 2), 3, "from one evaluation of the same rows"),
    "zero 3, not finite on the second": (marked, 3, "first output that is not finite is that of model.embed_tokens"),
    "zero 3, cut off": (cut_off, 3, "get no gradient: model.layers.1.mlp.down_proj.weight"),
    "zero 3, sound": (partial(with_head, NormalisingHead), 3, ""),
    "zero 3, sound adapter": (lambda: adapted(llama(attention_dropout=0.5)), 3, ""),
}


def outcome(case: Case, folder: Path) -> dict[str, Any]:
    """What a run of one step ends in, on this process."""
    build, zero, _ = case
    model = build()  # before the settings of ZeRO-3, under which models are born in parts
    deepspeed: dict[str, Any] = {"deepspeed": str(ROOT / f"scripts/deepspeed/zero{zero}.json")} if zero else {}
    settings = TrainArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, save_strategy="no", eval_strategy="no",
        eval_on_start=False, disable_tqdm=True, use_cpu=True, **deepspeed,
    )  # fmt: skip
    rows = rows_with_marks()
    trainer = NovelTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=Collator(pad_token_id=0),
        probes=[Probe(partial(first_rows, len(rows)), probe_first_rows)],
        watch_gradients=check_gradients,
    )
    try:
        trainer.train()
    except UserError as error:
        return {"cause": error.cause, "steps": trainer.state.global_step}
    return {"cause": "", "steps": trainer.state.global_step}


def main(folder: Path) -> None:
    """Run all cases as one of two processes."""
    found = {name: outcome(case, folder) for name, case in CASES.items()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # threads of process groups and engines, several of each by now, do not always end in peace


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, str(folder), logs=folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_processes_end_alike(name: str, two_processes: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (outcomes[name] for outcomes in two_processes)
    assert first == second
    cause = CASES[name][2]
    assert cause in first["cause"] and bool(cause) == bool(first["cause"])
    assert first["steps"] == (0 if cause else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
