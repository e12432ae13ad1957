"""A CPU without instructions for bf16: runs that ask for it are warned before their first step, and none else gets it.

The libraries are told to use AVX2 alone, as on a CPU that has no more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from novelgpt.budget.memory import compute_dtype
from novelgpt.settings.arguments import TrainArguments
from tests.launched import PATIENCE, ROOT

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Trains by the command line that follows, and tells which products were tried before.
SCRIPT = """
import json, runpy, sys, torch
from novelgpt.checks import devices
from novelgpt.training import throughput
sizes = []
fastest = throughput._fastest_product
def noted(size, device, dtype):
    sizes.append([str(dtype), size])
    return fastest(size, device, dtype)
throughput._fastest_product = noted
sys.argv = sys.argv[1:]
runpy.run_module("finetune", run_name="__main__", alter_sys=True)
print(json.dumps(sizes))
"""


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="another kind of CPU")
def test_a_run_in_a_slow_format_is_warned_with_figures_and_measured_in_little_time(
    base_folder: Path, tmp_path: Path
) -> None:
    words = ["finetune", "--model", str(base_folder), "--precision", "bf16", "--max_length", "64", "--max_steps", "1"]
    rows = [json.dumps({"prompt": f"第{number}问", "response": "雨下了一夜。"}) for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    words += ["--train_files", str(tmp_path / "rows.jsonl"), "--stop_check", "0"]
    words += ["--output_dir", str(tmp_path / "run"), "--eval_strategy", "no", "--eval_on_start", "False"]
    words += ["--guards", "False"]  # passes of their own, in the slow format
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words, "--per_device_train_batch_size", "1", "--logging_steps", "1"],
        cwd=ROOT, env=os.environ | AVX2 | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    (warning,) = [number for number, line in enumerate(lines) if line.startswith("precision: in bf16 this CPU")]
    assert "GFLOP/s" in lines[warning] and lines[warning].endswith("--precision fp32")
    assert warning < next(number for number, line in enumerate(lines) if "step" in line and "1/1" in line)
    # A product of the largest size would take the slow format a hundred times as long as the fast one.
    sizes = json.loads(lines[-1])
    assert max(size for dtype, size in sizes if dtype == "torch.bfloat16") < 1024
    # The share of the peak is that of the machine's best products, which are in fp32.
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert max(entry.get("utilisation", 0.0) for entry in entries) < 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs compute in bf16")
def test_auto_takes_fp32_on_every_cpu(tmp_path: Path) -> None:
    assert compute_dtype(TrainArguments(output_dir=str(tmp_path), precision="auto")) is None
