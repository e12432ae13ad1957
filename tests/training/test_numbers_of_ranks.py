"""Two ranks whose numbers go wrong on one of them: both stop, or both leave out the step, under DDP and ZeRO-1/2/3."""

import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from deepspeed import zero
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dataset.encoded_rows import EncodedRows
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import EncodedRow
from novelgpt.training import throughput
from novelgpt.training.trainer import NovelTrainer
from tests.memory_rows import as_rows
from tests.ranks import ROOT, run_ranks

VOCABULARY, NAN, ZERO = 50, 49, 48
ROWS = 16
# Row 11 of 16, in steps of 2 ranks x 2 micro-batches: the second rank's part of the third step.
BAD = 11
Case = tuple[str, int, str]
LOSS, GRADIENTS, STOP = ("loss", NAN, "skip"), ("gradients", ZERO, "skip"), ("loss", NAN, "stop")
# By the stage of ZeRO; 0 is DDP.
CASES: dict[int, list[Case]] = {
    0: [LOSS, GRADIENTS, STOP, ("gradients", ZERO, "stop")], 1: [LOSS], 2: [LOSS, GRADIENTS, STOP],
    3: [LOSS, GRADIENTS, STOP],
}  # fmt: skip


def rows_of(bad: int | None, without: set[int]) -> EncodedRows:
    """Rows of several lengths that know their numbers, one of which begins with the token `bad`."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for number in range(ROWS):
        ids = torch.randint(1, ZERO, (8 + number % 5,), generator=draw).tolist()
        if number == BAD and bad is not None:
            ids[0] = bad
        if number not in without:
            made.append(EncodedRow(ids, ids.copy(), source=f"rows:{number}"))
    return as_rows(made)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        tie_word_embeddings=False, rms_norm_eps=1e-30, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN] = math.nan
        # Zeros stay zeros through all norms, whose derivative there is 1/sqrt(eps): the loss is finite.
        model.get_input_embeddings().weight[ZERO] = 0.0
    return model


def train(stage: int, bad: int, skip: bool, folder: Path, without: set[int]) -> dict[str, Any]:
    """{"cause", "steps", "weights", "noted"} of a run on this process."""
    throughput.CEILING_SIZE["cpu"] = 32
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    model = tiny()
    deepspeed: dict[str, Any] = {"deepspeed": str(ROOT / f"scripts/deepspeed/zero{stage}.json")} if stage else {}
    settings = TrainArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", warmup_steps=6, logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="no", eval_strategy="no", eval_on_start=False,
        disable_tqdm=True, use_cpu=True, on_non_finite="skip" if skip else "stop", **deepspeed,
    )  # fmt: skip
    noted: list[dict[str, Any]] = []
    trainer = NovelTrainer(
        model=model, args=settings, train_dataset=rows_of(None if without else bad, without),
        data_collator=Collator(0), note=noted.append,
    )  # fmt: skip
    cause = ""
    try:
        trainer.train()
    except UserError as error:
        cause = error.cause
    parameters = dict(trainer.model.named_parameters())
    with zero.GatheredParameters(list(parameters.values())) if stage == 3 else nullcontext():
        weights = {name: parameter.detach().clone().nan_to_num() for name, parameter in parameters.items()}
    return {"cause": cause, "steps": trainer.state.global_step, "weights": weights, "noted": noted}


def main(folder: Path) -> None:
    """All cases as one of two processes."""
    found = {}
    for stage in range(4):
        reference = train(stage, NAN, False, folder, without=set(range(8, 12)))["weights"]
        for what, bad, choice in CASES[stage]:
            outcome = train(stage, bad, choice == "skip", folder, without=set())
            weights = outcome.pop("weights")
            outcome["equal"] = all(torch.equal(weights[key], reference[key]) for key in weights)
            found[f"{stage} {what} {choice}"] = outcome
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # threads of process groups and engines, several of each by now, do not always end in peace


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, str(folder), logs=folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def cases(choice: str) -> list[tuple[int, str]]:
    return [(stage, what) for stage in CASES for what, _, chosen in CASES[stage] if chosen == choice]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), cases("stop"))
def test_both_ranks_stop_and_name_the_row(
    stage: int, what: str, two_processes: list[dict[str, dict[str, Any]]]
) -> None:
    first, second = (outcomes[f"{stage} {what} stop"] for outcomes in two_processes)
    assert first == second
    assert first["steps"] == 2 and first["noted"] == [
        {"step": 3, "not_finite": what, "rows": [f"rows:{BAD}"], "skipped": False}
    ]
    assert first["cause"].startswith("step 3: the loss is " + ("nan" if what == "loss" else "finite and its gradients"))
    assert first["cause"].endswith(f"on rows:{BAD}")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), cases("skip"))
def test_a_step_left_out_on_both_ranks_leaves_the_weights_of_a_run_without_its_rows(
    stage: int, what: str, two_processes: list[dict[str, dict[str, Any]]]
) -> None:
    first, second = (outcomes[f"{stage} {what} skip"] for outcomes in two_processes)
    assert first == second
    assert first["equal"] and not first["cause"] and first["steps"] == 4
    assert [(entry["step"], entry["not_finite"], entry["skipped"]) for entry in first["noted"]] == [(3, what, True)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
