"""A Baichuan2 that goes on training on its own distribution has nothing to learn: its evaluation loss stays flat.

Rows drawn from a model are its own distribution, exactly, so no pretraining is needed. Started as a script, this file
is one of two processes that train under ZeRO.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from novelgpt.checks.first_step import first_rows, probe_first_rows
from novelgpt.model.baichuan import BaichuanConfig, BaichuanForCausalLM
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import EncodedRow
from novelgpt.training import throughput
from novelgpt.training.plan import Probe
from novelgpt.training.trainer import NovelTrainer
from tests.memory_rows import as_rows
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TRAIN_ROWS, HELD_OUT_ROWS, TOKENS, BATCH = 768, 96, 48, 16
RATE, EVALUATE_EVERY = 2e-4, 12
# Nats: the noise of a learning rate that is not 0, and what no such noise gives.
FLAT, CLIMB = 0.015, 0.03


def baichuan2(attention: str = "packed") -> BaichuanForCausalLM:
    """Random, but sure of itself: attention and MLP say much about the next token."""
    config = BaichuanConfig(
        vocab_size=64, hidden_size=40, intermediate_size=96, num_hidden_layers=2, num_attention_heads=5,
        model_max_length=256, position_embedding="alibi", norm_head=True, initializer_range=0.35,
    )  # fmt: skip
    torch.manual_seed(3)
    model = BaichuanForCausalLM._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    return model


@torch.no_grad()
def drawn_rows(model: BaichuanForCausalLM) -> list[list[int]]:
    """Rows of the model's distribution: tokens drawn one by one from what it says of the next."""
    torch.manual_seed(4)
    ids = torch.randint(3, 64, (TRAIN_ROWS + HELD_OUT_ROWS, 1))
    cache = None
    for _ in range(TOKENS - 1):
        outputs = model.eval()(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        ids = torch.cat([ids, torch.multinomial(outputs.logits[:, -1].softmax(-1), 1)], dim=1)
    return ids.tolist()


def evaluation_losses(
    model: BaichuanForCausalLM, rows: list[list[int]], folder: Path, zero: int | None, guards: bool = True
) -> list[float]:
    """Of an untouched model and during training."""
    throughput.CEILING_SIZE["cpu"] = 32  # the machine's speed is of no concern here
    AcceleratorState._reset_state(reset_partial_state=True)
    deepspeed = {} if zero is None else {"deepspeed": str(ROOT / f"scripts/deepspeed/zero{zero}.json")}
    settings = TrainArguments(
        output_dir=str(folder), num_train_epochs=1, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")), per_device_eval_batch_size=48,
        logging_steps=1, save_strategy="no", eval_strategy="steps", eval_steps=EVALUATE_EVERY, eval_on_start=True,
        disable_tqdm=True, use_cpu=True, optim="adamw_torch", guards=guards, **deepspeed,
    )  # fmt: skip
    encoded = [EncodedRow(row, row.copy()) for row in rows]
    trainer = NovelTrainer(
        model=model, args=settings, data_collator=Collator(0),
        train_dataset=as_rows(encoded[:TRAIN_ROWS]), eval_dataset=as_rows(encoded[TRAIN_ROWS:]),
        probes=[Probe(partial(first_rows, TRAIN_ROWS), probe_first_rows)] if guards else [],
    )  # fmt: skip
    trainer.train()
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_evaluation_loss_stays_flat(tmp_path: Path) -> None:
    rows = drawn_rows(baichuan2())
    losses = evaluation_losses(baichuan2(), rows, tmp_path, zero=None)
    assert len(losses) == TRAIN_ROWS // BATCH // EVALUATE_EVERY + 1
    assert losses[0] < 0.8 * torch.tensor(64.0).log()  # the model does say something about the next token
    assert max(losses) < losses[0] + FLAT


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
def test_evaluation_loss_stays_flat_on_two_ranks(zero: int, tmp_path: Path) -> None:
    run_ranks(__file__, str(tmp_path), str(zero), logs=tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    assert max(losses) < losses[0] + FLAT
    rows = drawn_rows(baichuan2())
    assert losses == pytest.approx(evaluation_losses(baichuan2(), rows, tmp_path / "one", zero=None), abs=1e-3)


def test_it_would_climb_if_training_left_alibi_out(tmp_path: Path) -> None:
    """The fault of the original code of 2023-09-06: the tests above can see it, and the guards refuse it."""

    def without_alibi(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        bias = None if module.training else mask  # the biases are in the mask
        output = functional.scaled_dot_product_attention(query, key, value, bias, is_causal=bias is None)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("without_alibi", without_alibi)
    AttentionMaskInterface.register("without_alibi", sdpa_mask)
    rows = drawn_rows(baichuan2())
    with pytest.raises(UserError, match="something else in training than in evaluation"):
        evaluation_losses(baichuan2("without_alibi"), rows, tmp_path, zero=None)
    losses = evaluation_losses(baichuan2("without_alibi"), rows, tmp_path, zero=None, guards=False)
    assert losses[-1] > losses[0] + CLIMB


def main(folder: Path, zero: int) -> None:
    """Train as one of several processes; the first one writes down what came out."""
    rows = drawn_rows(baichuan2())
    losses = evaluation_losses(baichuan2(), rows, folder / "run", zero)
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # threads of process groups and engines do not always end in peace


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
