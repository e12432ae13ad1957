"""The fastest matrix products of this machine, for train_throughput.py: python matrix_ceilings.py REQUEST RESULT.json.

The request is not read. Writes {"fp32", "bf16"} in FLOP/s, each the best of several shapes, layouts and repetitions;
without "bf16" on a CPU that has no fast instructions for it, where a single product would take minutes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from novelgpt.checks.devices import NEARLY_AS_FAST
from novelgpt.training.throughput import matmul_ceiling

# Rows, inner size and columns of left @ right: squares, the head of the small model, and its gradient.
CPU_SHAPES = [(2048, 2048, 2048), (4096, 4096, 4096), (1024, 256, 151936), (1024, 151936, 256)]
CUDA_SHAPES = [(4096, 4096, 4096), (8192, 8192, 8192), (4096, 8192, 28672)]
REPETITIONS = 5


def fastest(shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, device: str) -> float:
    """FLOP/s of the best repetition; `transposed` lays the right factor out as the weights of a linear layer."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype).T
    if not transposed:
        right = right.contiguous()
    # One output for all, so that no time goes into getting memory.
    output = torch.empty(rows, columns, device=device, dtype=dtype)
    times = []
    for _ in range(REPETITIONS + 1):
        begin = time.perf_counter()
        torch.mm(left, right, out=output)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * rows * inner * columns / min(times[1:])


device = "cuda" if torch.cuda.is_available() else "cpu"
shapes = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
tried = {name: matmul_ceiling(torch.device(device), dtype) for name, dtype in formats.items()}
ceilings = {
    name: max(fastest(shape, formats[name], transposed, device) for shape in shapes for transposed in (True, False))
    for name in formats
    if device == "cuda" or tried[name] >= NEARLY_AS_FAST * tried["fp32"]
}
Path(sys.argv[2]).write_text(json.dumps(ceilings), encoding="utf-8")
