"""Everything that is written for others is read by transformers 4.57 and an older peft as it is here.

They are installed from the package index into an environment of their own, which is kept in the user's cache.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from finetune.__main__ import main as finetune
from finetune_lora.__main__ import main as finetune_lora
from finetune_lora.merge import main as merge
from novelgpt.export.llama import main as llama_export
from novelgpt.export.qwen2 import main as qwen2_export
from tests.end_to_end.read_by_transformers_4 import reading
from tests.model.original_checkpoints import write_original_baichuan
from tests.model.original_qwen1 import write_original_qwen1
from tests.model.tiny_bases import ADDED, FAMILIES, write_tiny_base

pytestmark = pytest.mark.long
OLDER = ("transformers==4.57.6", "peft==0.17.1")
TEXT = f"天地{ADDED[0]}玄黄，hello world"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def older_python() -> Path:
    """An interpreter with OLDER, and with all else that the tests run on."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "novelgpt" / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    name = "-".join([*OLDER, f"python{sys.version_info[0]}.{sys.version_info[1]}"]).replace("==", "-")
    folder = cache / name
    python, complete = folder / "bin" / "python", folder / "complete"
    with FileLock(cache / f"{name}.lock"):
        if complete.is_file() and complete.read_text() == sys.prefix:
            return python
        venv.create(folder, with_pip=True, clear=True)
        # After its own packages: torch and whatever else fits both.
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (own / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [str(python), "-m", "pip", "install", "--quiet", *OLDER]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
            pytest.fail(f"{' and '.join(OLDER)} cannot be installed from the package index: {reason}", pytrace=False)
        complete.write_text(sys.prefix)
    return python


def read_by_older(python: Path, folders: list[Path]) -> dict[str, Any]:
    script = Path(__file__).with_name("read_by_transformers_4.py")
    command = [str(python), str(script), TEXT, *map(str, folders)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folders[0], env=variables | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == OLDER[0].partition("==")[2]
    result: dict[str, Any] = found["folders"]
    return result


def check_equal(python: Path, folders: list[Path]) -> None:
    for name, older in read_by_older(python, folders).items():
        here = reading(Path(name), TEXT)
        left, right = torch.tensor(older.pop("logits")), torch.tensor(here.pop("logits"))
        assert older == here, name
        torch.testing.assert_close(left, right, atol=1e-5 * float(right.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_checkpoints_adapters_and_merged_models(
    family: str, older_python: Path, base_folder: Path, tmp_path: Path
) -> None:
    base = write_tiny_base(family, base_folder, tmp_path / "base", 2048)
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"第{number}问", "response": "天地玄黄"} for number in range(8)]
    rows.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    words = ["--train_files", str(rows), "--valid_files", str(rows), "--max_length", "256", "--learning_rate", "1e-3"]
    words += ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--stop_check", "0", "--use_cpu"]
    full, adapter, merged = tmp_path / "full", tmp_path / "adapter", tmp_path / "merged"
    finetune([*words, "--model", str(base), "--output_dir", str(full)])
    targets = {"gpt2": ["c_attn"]}.get(family, ["q_proj", "v_proj"])
    lora = ["--lora_rank", "2", "--lora_dropout", "0", "--lora_targets", *targets]
    # On the run, whose folder both versions read.
    finetune_lora([*words, *lora, "--model", str(full), "--output_dir", str(adapter)])
    merge([str(adapter), str(merged)])
    check_equal(older_python, [full, full / "checkpoint-2", adapter, adapter / "checkpoint-2", merged])


def test_exports(older_python: Path, tmp_path: Path) -> None:
    baichuan, llama = tmp_path / "baichuan", tmp_path / "llama"
    write_original_baichuan(baichuan, position="rope", norm_head=True)
    llama_export([str(baichuan), str(llama), "--allow_pickles"])
    qwen1, qwen2 = tmp_path / "qwen1", tmp_path / "qwen2"
    write_original_qwen1(qwen1)
    qwen2_export([str(qwen1), str(qwen2)])
    check_equal(older_python, [llama, qwen2])


def test_the_tiny_random(older_python: Path, base_folder: Path) -> None:
    check_equal(older_python, [base_folder])
