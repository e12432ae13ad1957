"""Checks of the devices, of the precision that training uses on them, and of DeepSpeed's compilers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from novelgpt.budget.memory import compute_dtype
from novelgpt.budget.memory_plan import available_memory
from novelgpt.checks.findings import Finding, Mark, first_case
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import counted, gigabytes
from novelgpt.training.throughput import matmul_ceiling

# Share of a GPU's memory that is free unless another process uses it.
FREE_SHARE = 0.8
# Share of the fp32 speed below which a dtype is slower on a CPU, beyond measurement noise.
NEARLY_AS_FAST = 0.8
# The first compute capability whose bf16 is not emulated.
BF16_CAPABILITY = (8, 0)


def check_host() -> Iterator[Finding]:
    """Report cores and free memory."""
    free = available_memory(torch.device("cpu"))
    cores = counted(os.cpu_count() or 1, "core")
    text = f"{cores}, torch uses {torch.get_num_threads()}, {gigabytes(free)} of memory free"
    yield first_case("host", text, (free < 2e9, "note", text, "close other programs: even the small base takes 1 GB"))


def check_gpus() -> Iterator[Finding]:
    """Check each GPU that torch sees, or find out why it sees none."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _check_gpu(index)
        return
    driver = driver_cuda()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None:
        yield Finding(
            "gpu", "note", "none: training runs on the CPU, in fp32", "for useful models, use a host with GPUs"
        )
    elif hidden is not None and not re.search(r"[0-9A-Za-z]", hidden.replace("-1", "")):
        yield Finding("gpu", "note", f"all are hidden: CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES")
    elif torch.version.cuda is None:
        yield Finding(
            "gpu",
            "problem",
            f"there is an NVIDIA driver, and torch {torch.__version__} is built without CUDA",
            "install torch from https://pytorch.org/get-started, with CUDA",
        )
    elif driver[0] < _numbers(torch.version.cuda)[0]:
        built = f"torch {torch.__version__} is built for {torch.version.cuda}"
        yield Finding(
            "gpu",
            "problem",
            f"the driver supports CUDA up to {driver[0]}.{driver[1]}, {built}",
            "update the NVIDIA driver, or install a torch built for an older CUDA",
        )
    else:
        yield Finding("gpu", "problem", "there is a driver, but torch sees no GPU", "check the output of nvidia-smi")


def check_precision(training: TrainArguments | None = None) -> Iterator[Finding]:
    """Report what `--precision auto` selects here, or how fast a CPU is in the 16-bit dtype that a run uses.

    The latter is measured, which takes a second or two.

    Args:
        training: of the run; None without a run.
    """
    cpu, fp32 = torch.device("cpu"), torch.float32
    asked = compute_dtype(training) if training is not None and training.device.type == "cpu" else None
    if asked is not None:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[asked]
        half, full = matmul_ceiling(cpu, asked), matmul_ceiling(cpu, fp32)
        text = f"in {name} this CPU multiplies matrices at {half / 1e9:,.1f} GFLOP/s, in fp32 at {full / 1e9:,.1f}"
        slow = half < NEARLY_AS_FAST * full
        yield first_case(
            "precision", text, (slow, "note", f"{text}: it has no fast instructions for {name}", "--precision fp32")
        )
        return
    dtype = compute_dtype(TrainArguments(output_dir="unused")) or fp32
    text = f"--precision auto selects {str(dtype).removeprefix('torch.')}"
    if torch.cuda.is_available():
        bf16 = dtype == torch.bfloat16 and torch.version.hip is None
        emulated = bf16 and torch.cuda.get_device_capability() < BF16_CAPABILITY
        yield first_case(
            "precision", text, (emulated, "note", f"{text}, which this GPU only emulates, slowly", "--precision fp16")
        )
    else:
        yield Finding("precision", "ok", f"{text}, as on all CPUs")


def check_toolchain() -> Iterator[Finding]:
    """Check nvcc, ninja and a C++ compiler, with which DeepSpeed builds its own operators."""
    built, home, nvcc = torch.version.cuda, os.environ.get("CUDA_HOME"), find_nvcc()
    serious: Mark = "problem" if torch.cuda.is_available() and built is not None else "note"
    if home is not None and not (Path(home) / "bin" / "nvcc").is_file():
        yield Finding(
            "compilers",
            serious,
            f"CUDA_HOME={home} holds no bin/nvcc",
            "export CUDA_HOME=/usr/local/cuda, or wherever bin/nvcc is",
        )
    elif nvcc is None:
        yield Finding(
            "compilers",
            serious,
            "there is no nvcc, which DeepSpeed needs to compile its own operators",
            "install the CUDA toolkit of torch's version and export CUDA_HOME; ZERO=0 trains without DeepSpeed",
        )
    lacking = ["g++"] if shutil.which(os.environ.get("CXX", "g++")) is None else []
    lacking += ["ninja"] if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None else []
    if lacking:
        yield Finding(
            "compilers",
            serious,
            f"missing for DeepSpeed's operators: {', '.join(lacking)}",
            f"apt-get install g++ ninja-build, or {pip_install('ninja')}",
        )
    release = None if nvcc is None else nvcc_release(nvcc)
    version = "" if release is None else f" of CUDA {release[0]}.{release[1]}"
    if release is not None and built is not None and release[0] != _numbers(built)[0]:
        yield Finding(
            "compilers",
            serious,
            f"nvcc is{version}, torch is built for {built}: DeepSpeed refuses this",
            f"export CUDA_HOME of a CUDA {built} toolkit",
        )
    elif nvcc is not None and not lacking:
        yield Finding("compilers", "ok", f"{nvcc}{version}, g++ and ninja")


def find_nvcc() -> Path | None:
    """Find nvcc under CUDA_HOME, on the PATH, or where toolkits install it."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    return next((place for place in [*places, Path("/usr/local/cuda/bin/nvcc")] if place.is_file()), None)


def nvcc_release(nvcc: Path) -> tuple[int, int] | None:
    """Return major and minor version of the CUDA toolkit that a compiler belongs to; None where unknown."""
    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return None if found is None else _numbers(found[1])


def driver_cuda() -> tuple[int, int] | None:
    """Return major and minor version of the newest CUDA that the NVIDIA driver supports; None without a driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _check_gpu(index: int) -> Finding:
    """Report name, capability and memory of a GPU, and whether this torch has code for it."""
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    formats = "bf16" if (major, minor) >= BF16_CAPABILITY or torch.version.hip else "no bf16"
    text = (
        f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {formats}, "
        f"{gigabytes(free)} of {gigabytes(total)} free"
    )
    kinds = re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))
    # Binary code runs on its major version from its own minor version on, PTX on everything newer.
    served = [
        (int(number[:-1]), int(number[-1])) <= (major, minor) and (kind == "compute" or int(number[:-1]) == major)
        for kind, number in kinds
    ]
    old = f"{text}: torch {torch.__version__} has no code for it"
    url = "https://pytorch.org/get-started"
    used = f"{text}: other processes use the rest"
    return first_case(
        f"gpu {index}",
        text,
        (bool(kinds) and not any(served), "problem", old, f"install a torch built for it from {url}, or use another"),
        (free < FREE_SHARE * total, "note", used, "see which with nvidia-smi; --auto_batch uses what fits"),
    )


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
