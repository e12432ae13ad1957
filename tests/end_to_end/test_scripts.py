"""The scripts, each alone, from any directory, with their defaults and with flags."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.launched import PATIENCE
from tests.warm_python import warm_environment, warm_python

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
QUICK = ["--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"]
QUICK += ["--stop_check", "0"]


def bash(script: str, *words: str, cwd: Path = ROOT, **variables: str) -> str:
    environment = os.environ | warm_environment() | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"} | variables
    done = subprocess.run(
        ["bash", script, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow
def test_pretrain_twice_gives_the_same_losses_and_a_complete_run_folder(tmp_path: Path) -> None:
    bash("run_pretrain.sh", *QUICK, "--output_dir", str(tmp_path / "a"), cwd=SCRIPTS)
    bash(str(SCRIPTS / "run_pretrain.sh"), *QUICK, "--output_dir", "b", cwd=tmp_path)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "a")) == 3

    run = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished"
    assert {"arguments", "versions", "git_commit", "data_sha256", "seed", "results"} <= run.keys()
    assert (tmp_path / "a" / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "a" / "logs")).Reload()
    wanted = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/memory_gb"}
    wanted |= {"eval/loss", "eval/perplexity", "eval/token_accuracy"}
    assert wanted <= set(events.Tags()["scalars"])


def test_lora_again_then_predict_then_merge(tmp_path: Path) -> None:
    for name in ("lora", "again"):
        bash("run_lora.sh", *QUICK, "--output_dir", str(tmp_path / name), "--learning_rate", "1e-3", cwd=SCRIPTS)
    assert losses(tmp_path / "lora") == losses(tmp_path / "again")
    words = ["--max_rows", "3", "--max_new_tokens", "8"]
    bash(str(SCRIPTS / "run_predict.sh"), *words, "--output_dir", "p1", cwd=tmp_path, MODEL=str(tmp_path / "lora"))
    rows = [json.loads(line) for line in (tmp_path / "p1" / "predictions.jsonl").read_bytes().splitlines()]
    fields = ["id", "prompt", "reference", "prediction", "finish_reason", "prompt_tokens", "completion_tokens"]
    assert [list(row) for row in rows] == [fields] * 3
    scores = json.loads((tmp_path / "p1" / "scores.json").read_text(encoding="utf-8"))
    assert {"rouge-1", "rouge-2", "rouge-l", "perplexity", "definitions"} <= scores.keys()

    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    merge = [warm_python(), "-m", "finetune_lora.merge", str(tmp_path / "lora"), str(tmp_path / "merged")]
    done = subprocess.run(merge, env=environment, capture_output=True, text=True, check=True)
    assert "largest difference of a logit" in done.stdout
    bash(str(SCRIPTS / "run_predict.sh"), *words, "--model", "merged", "--output_dir", "p2", cwd=tmp_path)
    assert (tmp_path / "p1" / "predictions.jsonl").read_text() == (tmp_path / "p2" / "predictions.jsonl").read_text()

    score = [warm_python(), "-m", "predict.score", "p1/predictions.jsonl", "--output", "again.json"]
    subprocess.run(score, cwd=tmp_path, env=environment, capture_output=True, check=True)
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert {name: again[name] for name in ("rouge-1", "rouge-2", "rouge-l")} == {
        name: scores[name] for name in ("rouge-1", "rouge-2", "rouge-l")
    }


def test_two_processes_predict_what_one_does(base_folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(base_folder), "--max_rows", "5", "--max_new_tokens", "6"]
    bash("run_predict.sh", *words, "--output_dir", str(tmp_path / "one"), cwd=SCRIPTS)
    bash("run_predict.sh", *words, "--output_dir", str(tmp_path / "two"), cwd=SCRIPTS, NPROC="2")
    assert (tmp_path / "one" / "predictions.jsonl").read_text() == (tmp_path / "two" / "predictions.jsonl").read_text()


def test_help_shows_our_own_arguments_first() -> None:
    text = bash("run_lora.sh", "--help", cwd=SCRIPTS)
    assert text.index("--train_files") < text.index("--lora_rank") < text.index("--learning_rate")
    assert "[default: 0.0001]" in text


@pytest.mark.slow
def test_real_data_runs_as_it_is(tmp_path: Path) -> None:
    shared = ROOT.parent / "shared" / "data"
    novel = shared / "novels" / "hulanhezhuan.daocaoren.utf8.txt"
    papers = shared / "papers" / "csl_title_abstract.jsonl"
    if not novel.is_file():
        pytest.skip("the real data are not beside the checkout")
    for script, file, output in (("run_pretrain.sh", novel, "p"), ("run_lora.sh", papers, "l")):
        words = ["--train_files", str(file), *QUICK, "--output_dir", str(tmp_path / output)]
        bash(script, *words, cwd=SCRIPTS, MODEL="tiny")
    assert len(losses(tmp_path / "p")) == len(losses(tmp_path / "l")) == 3


@pytest.mark.slow
def test_a_real_qwen2_tokenizer_with_a_small_model_beside_it(tmp_path: Path) -> None:
    tokenizer = ROOT.parent / "shared" / "tokenizers" / "qwen2"
    if not tokenizer.is_dir():
        pytest.skip("the real tokenizer is not beside the checkout")
    shutil.copytree(tokenizer, tmp_path / "qwen2")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, num_key_value_heads=1, **small)).save_pretrained(tmp_path / "qwen2")
    quick = [*QUICK, "--max_length", "256", "--per_device_train_batch_size", "1"]
    bash("run_lora.sh", *quick, "--output_dir", str(tmp_path / "l"), cwd=SCRIPTS, MODEL=str(tmp_path / "qwen2"))
    assert len(losses(tmp_path / "l")) == 3
    words = ["--max_rows", "2", "--max_new_tokens", "4"]
    bash("run_predict.sh", *words, cwd=SCRIPTS, MODEL=str(tmp_path / "l"))
    assert (tmp_path / "l" / "predict" / "scores.json").is_file()
