"""Several processes of one script, as ranks of one run on this machine."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.launched import PATIENCE
from tests.warm_python import start_warm, warm_environment

ROOT = Path(__file__).resolve().parents[1]
# Of Python's warnings, of transformers' own logger, of tqdm's bars, and of the launchers and backends below.
NOISE = re.compile(
    r"Warning: |\[transformers\]|\d%\||it/s|Writing model shards|Loading weights|"
    r"\[rank\d|\[W\d|\[Gloo\]|\[DeepSpeed|\[INFO\]"
)
# DeepSpeed's settings for weights in parts, however few processes and however small the weights.
ZERO_3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "bf16": {"enabled": False},
}


def run_pipeline(pipeline: str, words: list[str], processes: int = 1, zero: int = 0) -> str:
    """What a pipeline prints that is started by the real launch script, with so many processes and this ZeRO stage."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"NPROC": str(processes), "ZERO": str(zero), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "launch.sh"), pipeline, *words],
        env=environment | warm_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    noise = noise_in(done.stdout + done.stderr)
    assert noise == [], noise
    return done.stdout


def noise_in(printed: str) -> list[str]:
    """Lines in which libraries warn of themselves, or show bars where no terminal is."""
    return [line for line in re.split(r"[\r\n]", printed) if NOISE.search(line)]


def run_ranks(script: str, *words: str, logs: Path, processes: int = 2, timeout: float = PATIENCE) -> None:
    """Run them to their end; the tail of what they printed is in the error where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = [logs / f"{rank}.log" for rank in range(processes)]
    started = [
        start_warm([script, *words], environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, path)
        for rank, path in enumerate(paths)
    ]
    deadline = time.monotonic() + timeout
    try:
        statuses = [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.signal(signal.SIGKILL)
    assert statuses == [0] * processes, "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in paths)
