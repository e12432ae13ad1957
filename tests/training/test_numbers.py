"""Steps whose numbers go wrong: the rows are named, and the weights never take them."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from dataset.tokens_command import main as prepare_tokens
from finetune.__main__ import main as finetune
from finetune_lora.__main__ import main as finetune_lora
from pretrain.__main__ import main as pretrain

ROOT = Path(__file__).resolve().parents[2]
RARE = "@"
TEXT = "山上有座庙，庙里有个老和尚在讲故事。"
QUICK = ["--eval_on_start", "False", "--eval_strategy", "no", "--save_strategy", "no", "--stop_check", "0"]
QUICK += ["--logging_steps", "1", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "1e-3"]
QUICK += ["--train_sampling_strategy", "sequential", "--num_train_epochs", "1", "--per_device_train_batch_size", "1"]


def build(folder: Path, tokenizer: PreTrainedTokenizerBase, layers: int = 2, eps: float = 1e-6) -> Qwen3ForCausalLM:
    """A Qwen3 whose head is not tied to its embedding, so that a bad row of the one is not one of the other."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, head_dim=16,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, rms_norm_eps=eps,
        )
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return model


def rare_id(tokenizer: PreTrainedTokenizerBase) -> int:
    (token,) = tokenizer.encode(RARE, add_special_tokens=False)
    return int(token)


@pytest.fixture(scope="module")
def nan_base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embedding of RARE is NaN: the loss of whatever holds it is NaN."""
    folder = tmp_path_factory.mktemp("nan") / "base"
    model = build(folder, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[rare_id(tokenizer)] = math.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zero_base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embedding of RARE is zero: a document that begins with it goes through each norm as zeros, whose
    derivative there is 1/sqrt(eps). The loss is finite, the gradients are not.
    """
    folder = tmp_path_factory.mktemp("zero") / "base"
    model = build(folder, tokenizer, layers=4, eps=1e-30)
    with torch.no_grad():
        model.get_input_embeddings().weight[rare_id(tokenizer)] = 0.0
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, bad: set[int], count: int, pretraining: bool = False) -> Path:
    """`count` rows, those of the numbers in `bad` (from 1, as lines are) with the rare token."""
    lines = []
    for number in range(1, count + 1):
        text = f"{TEXT[: 6 + number % 7]}{RARE if number in bad else ''}{TEXT}"
        if pretraining:
            lines.append({"text": f"{RARE if number in bad else ''}{number}{TEXT}"})
        else:
            lines.append({"prompt": f"{number}{TEXT}", "completion": text})
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def words_of(base: Path, rows: Path, folder: Path, *more: str) -> list[str]:
    valid = write_rows(rows.with_name("valid.jsonl"), set(), 2, "text" in rows.read_text(encoding="utf-8")[:8])
    words = ["--model", str(base), "--train_files", str(rows), "--valid_files", str(valid), "--max_length", "128"]
    return [*words, "--output_dir", str(folder), *QUICK, *more]


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, by a reader that knows JSON alone."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def refused(capsys: pytest.CaptureFixture[str], main: Any, words: list[str]) -> str:
    """What a run prints that ends with exit status 2."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "packing"),
    [
        (finetune, True),
        (finetune_lora, False),
        *(pytest.param(main, main is finetune_lora, marks=pytest.mark.long) for main in (finetune, finetune_lora)),
    ],
)
def test_the_very_row_is_named(
    main: Any, packing: bool, nan_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", {17}, 24)
    more = ["--packing", str(packing), "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"]
    error = refused(capsys, main, words_of(nan_base, rows, tmp_path / "run", *more))
    (step,) = map(int, re.findall(r"error: step (\d+)", error))
    assert packing or step == 5
    assert f"error: step {step}: the loss is nan, on {rows}:17\n" in error
    entries = entries_of(tmp_path / "run")  # which is kept, as steps were trained
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, step))
    assert entries[-1] == {"step": step, "not_finite": "loss", "rows": [f"{rows}:17"], "skipped": False}


def test_a_run_that_stops_in_its_first_step_leaves_no_folder(
    nan_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", {2}, 4)
    more = ["--packing", "False", "--gradient_accumulation_steps", "2"]
    assert f"step 1: the loss is nan, on {rows}:2\n" in refused(
        capsys, finetune, words_of(nan_base, rows, tmp_path / "run", *more)
    )
    assert not (tmp_path / "run").exists()


def test_text_is_named_by_line(nan_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    lines = [f"第{number}行：{TEXT}" for number in range(400)]
    lines[250] += RARE
    book.write_text("\n".join(lines), encoding="utf-8")
    error = refused(capsys, pretrain, words_of(nan_base, book, tmp_path / "run")[:4] + [
        "--max_length", "256", "--output_dir", str(tmp_path / "run"), *QUICK
    ])  # fmt: skip
    first, last = error.split(f"on {book}:")[1].split("\n")[0].split(f" to {book}:")
    assert int(first) <= 251 <= int(last) and int(last) - int(first) < 250


def test_prepared_tokens_name_the_row_with_its_book(
    nan_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", {9}, 12, pretraining=True)
    lines = [json.loads(line) for line in rows.read_bytes().splitlines()]
    named = [line | {"book": f"书{number}", "chapter": "第一回"} for number, line in enumerate(lines, 1)]
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in named), encoding="utf-8")
    prepare_tokens([str(rows), str(tmp_path / "tokens"), "--model", str(nan_base)])
    words = words_of(nan_base, rows, tmp_path / "run", "--max_length", "32")
    words[words.index("--train_files") + 1] = str(tmp_path / "tokens")
    assert f"the loss is nan, on {rows}:9 (书9, 第一回)\n" in refused(capsys, pretrain, words)


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_step_left_out_leaves_the_weights_of_a_run_without_its_rows(
    accumulation: int, zero_base: Path, tmp_path: Path
) -> None:
    """weights(rows, skip) == weights(rows without those of the step), bit for bit: moments and schedule stood still."""
    rows = write_rows(tmp_path / "rows.jsonl", {7}, 12, pretraining=True)
    more = ["--packing", "False", "--gradient_accumulation_steps", str(accumulation), "--weight_decay", "0.1"]
    more += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "8", "--logging_steps", "4"]
    pretrain([*words_of(zero_base, rows, tmp_path / "skip", *more), "--on_non_finite", "skip"])
    gone = {7} if accumulation == 1 else {7, 8}
    kept = [line for number, line in enumerate(rows.read_text(encoding="utf-8").splitlines(True), 1)
            if number not in gone]  # fmt: skip
    rows.write_text("".join(kept), encoding="utf-8")
    pretrain([*words_of(zero_base, rows, tmp_path / "without", *more), "--logging_steps", "1"])
    skipped, without = (load_file(tmp_path / name / "model.safetensors") for name in ("skip", "without"))
    assert skipped.keys() == without.keys()
    assert all(torch.equal(skipped[name], without[name]) for name in skipped)
    entries = entries_of(tmp_path / "skip")
    (noted,) = [entry for entry in entries if "not_finite" in entry]
    assert noted == {"step": -(-7 // accumulation), "not_finite": "gradients", "rows": [f"{rows}:7"], "skipped": True}
    logged = [entry for entry in entries if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logged) and logged[-1]["skipped_steps"] == 1
    # An entry of several steps is the mean of those of them that were trained.
    bad = noted["step"]
    plain = [entry["loss"] for entry in entries_of(tmp_path / "without") if "loss" in entry]
    (entry,) = [entry for entry in logged if entry["step"] - 4 < bad <= entry["step"]]
    first = max(1, entry["step"] - 4)  # steps before the entry; step 1 has one of its own
    assert entry["loss"] == pytest.approx(statistics.mean(plain[first : entry["step"] - 1]), rel=1e-5)


def test_ten_steps_in_a_row_stop_all_the_same(
    nan_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", set(range(3, 20)), 20)
    words = words_of(nan_base, rows, tmp_path / "run", "--packing", "False", "--on_non_finite", "skip")
    assert f"step 12: the loss is nan (10 steps in a row), on {rows}:12\n" in refused(capsys, finetune, words)
    losses = [entry["loss"] for entry in entries_of(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 11 and losses[2:] == [None] * 9


def test_gradients_that_overflow_under_a_finite_loss_are_caught(
    zero_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", {5}, 8, pretraining=True)
    words = words_of(zero_base, rows, tmp_path / "run", "--packing", "False")
    error = refused(capsys, pretrain, [*words, "--gradient_accumulation_steps", "2"])
    assert "error: step 3: the loss is finite and its gradients are not" in error and f"on {rows}:5\n" in error


def certain_base(folder: Path, tokenizer: PreTrainedTokenizerBase, certainty: float) -> Path:
    """A base that tells "山" after "山" and nothing else."""
    model = build(folder, tokenizer)
    (mountain,) = tokenizer.encode("山", add_special_tokens=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[mountain] = certainty * model.get_input_embeddings().weight[mountain]
    model.save_pretrained(folder)
    return folder


def test_three_losses_of_zero_stop(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = certain_base(tmp_path / "base", tokenizer, 1e3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("山" * 4000, TEXT)), encoding="utf-8")
    words = words_of(base, rows, tmp_path / "run", "--max_length", "64", "--learning_rate", "1e-9")
    error = refused(capsys, pretrain, words)
    assert f"the loss was exactly 0 in 3 optimizer steps in a row, up to step 3, on {rows}:1\n" in error
    assert "all labels masked" in error and "fp16" in error


def test_a_spike_is_noted_once_with_its_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = certain_base(tmp_path / "base", tokenizer, 15)
    rows = tmp_path / "rows.jsonl"
    wild = (10, 50, 54)  # in the warm-up, told, too soon after
    texts = [TEXT if number in wild else "山" * (30 + number % 3) for number in range(1, 61)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = words_of(base, rows, tmp_path / "run", "--packing", "False", "--learning_rate", "1e-9")
    pretrain([*words, "--gradient_accumulation_steps", "2"])
    entries = entries_of(tmp_path / "run")
    (spike,) = [entry for entry in entries if "spike" in entry]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert spike["step"] == 25 and spike["spike"] == pytest.approx(losses[24], rel=1e-5)
    assert spike["median"] == pytest.approx(statistics.median(losses[:24]), rel=1e-5) and losses[24] > losses[23] + 1
    assert spike["rows"] == [f"{rows}:50", f"{rows}:49"] and spike["row_losses"][0] > spike["row_losses"][1] + 1
    assert capsys.readouterr().out.count("spikes above its median") == 1
