"""Every architecture from an original-style checkpoint folder through all pipelines, merging and prediction."""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from tests.model.original_checkpoints import write_original_baichuan
from tests.model.original_qwen1 import write_original_qwen1

ROOT = Path(__file__).resolve().parents[2]
NOVEL = str(ROOT / "dataset" / "samples" / "novels" / "shan_zhong_yao_pu.txt")
QUICK = ["--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--max_length"]
QUICK += ["96", "--per_device_train_batch_size", "2", "--eval_on_start", "False", "--learning_rate", "1e-3"]
QUICK += ["--precision", "fp32"]
# Some bases are pickles, and adapters upon them load their base.
PICKLES = ["--allow_pickles"]
ANSWERS = ["--max_new_tokens", "4", "--batch_size", "2"]

WRITERS: dict[str, Callable[[Path], object]] = {
    "Baichuan-7B": lambda folder: write_original_baichuan(folder, position="rope", norm_head=False, shards="bin"),
    "Baichuan-13B": lambda folder: write_original_baichuan(folder, position="alibi", norm_head=False, shards="bin"),
    "Baichuan2-7B": lambda folder: write_original_baichuan(
        folder, position="rope", norm_head=True, shards="bin_sharded"
    ),
    "Baichuan2-13B": lambda folder: write_original_baichuan(
        folder, position="alibi", norm_head=True, shards="safetensors"
    ),
    "Qwen": lambda folder: write_original_qwen1(folder, shards="safetensors"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [{"prompt": f"第{number}个问题？", "completion": f"第{number}个回答。"} for number in range(8)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return path


def run(module: str, *words: str) -> None:
    importlib.import_module(module if "." in module else f"{module}.__main__").main(list(words))


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def predictions(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]


# Both positions, the head of either generation, and each way in which weights lie on the disk but one.
TOGETHER = ("Baichuan-7B", "Baichuan2-13B", "Qwen")


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [name if name in TOGETHER else pytest.param(name, marks=pytest.mark.long) for name in WRITERS]
)
def test_all_pipelines(architecture: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    WRITERS[architecture](base)
    original = digest(base)
    conversations = ["--train_files", str(rows), "--valid_files", str(rows)]

    run(
        "pretrain",
        *QUICK,
        "--model",
        str(base),
        "--train_files",
        NOVEL,
        "--output_dir",
        str(tmp_path / "pretrained"),
        *PICKLES,
    )
    pretrained = str(tmp_path / "pretrained")
    run("finetune", *QUICK, *conversations, "--model", pretrained, "--output_dir", str(tmp_path / "tuned"))
    run("finetune_lora", *QUICK, *conversations, "--model", str(base), "--output_dir", str(tmp_path / "lora"), *PICKLES)
    run("finetune_lora.merge", str(tmp_path / "lora"), str(tmp_path / "merged"), *PICKLES)
    for name in ("tuned", "lora", "merged"):
        run("predict", "--model", str(tmp_path / name), "--data_files", str(rows), *ANSWERS,
            "--output_dir", str(tmp_path / f"{name}_answers"), *PICKLES)  # fmt: skip
        assert len(predictions(tmp_path / f"{name}_answers")) == 8
    assert predictions(tmp_path / "lora_answers") == predictions(tmp_path / "merged_answers")

    assert digest(base) == original
    config = AutoConfig.from_pretrained(base)
    names = tensor_names(tmp_path / "pretrained")
    assert names and tensor_names(tmp_path / "tuned") == tensor_names(tmp_path / "merged") == names
    for name in ("pretrained", "tuned", "merged"):
        saved = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert saved["model_type"] == config.model_type
        assert "auto_map" not in saved
        assert "auto_map" not in (tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "lora" / "run.json").read_text(encoding="utf-8"))["results"]
    assert 0 < results["eval_loss"] < 20
