"""Memory does not grow with rows: ten times as many take as much, of predictions as of scores."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.inference.endpoint_servers import always, completion, serving

ROOT = Path(__file__).resolve().parents[2]
NOVEL = ROOT / "dataset" / "samples" / "novels" / "deng_ta_xia_de_xin.txt"
FEW, MANY = 2_000, 20_000


def write_rows(path: Path, count: int, prompts: bool) -> Path:
    """Short rows, no two alike."""
    text, draw = NOVEL.read_text(encoding="utf-8"), random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            first, second = (text[start : start + 30] for start in (draw.randrange(len(text) - 30) for _ in range(2)))
            row = {"prompt": first, "completion": second} if prompts else {"prediction": first, "reference": second}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def peak_of(*words: str) -> float:
    """The most private memory (RssAnon) of a command's first process, in MB."""
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))])
        time.sleep(0.02)
    assert process.returncode == 0
    return peak / 1000


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the memory of a process from")
def test_scores_take_the_same_memory_for_ten_times_as_many_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (FEW, MANY):
        file = write_rows(tmp_path / f"{count}.jsonl", count, prompts=False)
        peaks.append(peak_of("predict.score", str(file), "--output", str(tmp_path / "scores.json"), "--workers", "1"))
    assert peaks[1] < 1.15 * peaks[0], peaks


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the memory of a process from")
def test_predictions_take_the_same_memory_for_ten_times_as_many_rows(tmp_path: Path) -> None:
    peaks = []
    with serving(always(completion("雨下了一夜，天亮时他推开了门。"))) as served:
        for count in (FEW, MANY):
            words = ["--endpoint", served.url, "--output_dir", str(tmp_path / "out")]
            file = write_rows(tmp_path / f"{count}.jsonl", count, prompts=True)
            peaks.append(peak_of("predict", "--data_files", str(file), *words))
            assert len((tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines()) == count
    assert peaks[1] < 1.1 * peaks[0], peaks
