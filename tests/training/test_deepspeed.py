"""Two real ranks under ZeRO-2 and ZeRO-3 train as one process does, and save weights that reload to the same model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from novelgpt.inference.loading import load_for_inference
from novelgpt.scoring.perplexity import summarise
from novelgpt.settings.arguments import ConversationArguments, ModelArguments
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.collator import Collator
from tests.ranks import run_pipeline
from tests.rounding import LOSS_TOLERANCE, assert_close

ROOT = Path(__file__).resolve().parents[2]
VALID = [str(SAMPLES / "papers" / "valid.jsonl")]
# 44 rows in batches of 8 are 5 whole steps and a last one of 4 rows; answers differ in length.
STEPS = 6


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (SAMPLES / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:44]
    rows = [json.loads(line) for line in lines]
    for index, row in enumerate(rows):
        row["abstract"] = row["abstract"][: 20 + 5 * index]
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train(pipeline: str, base: Path, train_file: Path, folder: Path, processes: int, zero: int) -> list[float]:
    """Losses of each step, of a run through the real launch script."""
    words = [
        "--train_files",
        str(train_file),
        "--valid_files",
        *VALID,
        "--output_dir",
        str(folder),
        "--model",
        str(base),
    ]
    words += ["--packing", "False", "--num_train_epochs", "1", "--per_device_train_batch_size", str(4 // processes)]
    words += ["--gradient_accumulation_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3"]
    words += ["--eval_on_start", "False", "--save_strategy", "no", "--lr_scheduler_type", "constant"]
    words += ["--stop_check", "0"]
    run_pipeline(pipeline, words, processes, zero)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == STEPS
    return losses


@pytest.fixture(scope="module")
def one_process(
    base_folder: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, train("finetune", base_folder, train_file, folder, processes=1, zero=0)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train_file: Path
) -> tuple[float, torch.Tensor]:
    """Loss on the held-out rows, and the logits of the first four, on this process."""
    data = ConversationArguments(train_files=[str(train_file)], valid_files=VALID, packing=False)
    _, valid = read_conversations(data, tokenizer)
    sums = []
    first = None
    with torch.no_grad():
        for batch in DataLoader(valid, batch_size=4, collate_fn=Collator(0)):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            first = logits if first is None else first
            sums.append(plain_sums(logits, batch["labels"]))
    assert first is not None
    return summarise(torch.cat(sums).numpy())["loss"], first


def plain_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[1, 3]: summed losses, trained tokens, tokens predicted right, from all logits."""
    targets = labels[:, 1:].flatten()
    logits = logits[:, :-1].flatten(0, 1)[targets != -100]
    targets = targets[targets != -100]
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.tensor([[float(nll), len(targets), int((logits.argmax(-1) == targets).sum())]], dtype=torch.float64)


def reported_loss(folder: Path) -> float:
    return float(json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]["eval_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_two_ranks_equal_one_process(
    zero: int, one_process: tuple[Path, list[float]], base_folder: Path, train_file: Path, tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reference_folder, expected = one_process
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    losses = train("finetune", base_folder, train_file, folder, processes=2, zero=zero)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-3
    assert losses[-1] < losses[0] - 0.5
    assert not (tmp_path / "extensions").exists()  # nothing was compiled

    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss, logits = evaluate(reloaded, tokenizer, train_file)
    assert loss == pytest.approx(reported_loss(folder), rel=LOSS_TOLERANCE)  # what the two ranks saw in memory
    reference = AutoModelForCausalLM.from_pretrained(reference_folder).eval()
    reference_loss, reference_logits = evaluate(reference, tokenizer, train_file)
    assert reference_loss == pytest.approx(reported_loss(reference_folder), rel=LOSS_TOLERANCE)
    assert float((logits - reference_logits).abs().max()) < 5e-3


@pytest.mark.slow
@pytest.mark.long  # test_best_checkpoint.py scores an adapter that was saved under ZeRO-3
@pytest.mark.parametrize("zero", [2, 3])
def test_lora_saves_a_whole_adapter(
    zero: int, base_folder: Path, train_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "run"
    train("finetune_lora", base_folder, train_file, folder, processes=2, zero=zero)
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.numel() > 0 for tensor in weights.values())
    assert all(float(tensor.abs().max()) > 0 for name, tensor in weights.items() if "lora_B" in name)
    merged = load_for_inference(ModelArguments(str(folder)), tokenizer)
    assert evaluate(merged, tokenizer, train_file)[0] == pytest.approx(reported_loss(folder), rel=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.long
def test_pseudo_repetitions_on_two_ranks_equal_one_process(base_folder: Path, tmp_path: Path) -> None:
    """Under ZeRO-3, where ranks whose rows repeat nothing gather the weights as often as the others."""
    words = ["--model", str(base_folder), "--precision", "fp32", "--max_length", "64", "--ditto", "0.4"]
    words += ["--max_steps", "4", "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--optim", "sgd"]
    words += ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--eval_on_start", "False"]
    words += ["--save_strategy", "no"]
    losses, weights = [], []
    for processes, zero in ((1, 0), (2, 3)):
        folder = tmp_path / f"zero{zero}"
        shape = ["--per_device_train_batch_size", str(2 // processes), "--output_dir", str(folder)]
        printed = run_pipeline("pretrain", [*words, *shape], processes, zero)
        assert "blocks are pseudo-repetitions (--ditto)" in printed
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
        losses.append([entry["loss"] for entry in entries if "loss" in entry])
        weights.append(load_file(folder / "model.safetensors"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    before, moved = load_file(base_folder / "model.safetensors"), 0.0
    for name, tensor in weights[0].items():
        assert_close(weights[1][name], tensor, name)
        moved = max(moved, float((tensor - before[name].float()).abs().max()))
    assert len(losses[0]) == 4 and moved > 1e-3
