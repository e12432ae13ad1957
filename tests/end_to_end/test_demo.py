"""The demo, as a new user runs it, keeps its promises."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.launched import PATIENCE
from tests.ranks import noise_in
from tests.warm_python import warm_environment

ROOT = Path(__file__).resolve().parents[2]
ROUGE = ("rouge-1", "rouge-2", "rouge-l")


@pytest.mark.slow
def test_demo_improves_on_the_base(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "run_demo.sh"), str(tmp_path)],
        env=os.environ | warm_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert noise_in(done.stdout) == []
    assert [line for line in done.stderr.splitlines() if not line.startswith("answers: ")] == []
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))

    comparisons = summary.pop("comparisons")
    assert list(summary) == ["base", "pretrain", "finetune", "finetune_lora"]
    for figures in summary.values():
        assert {"loss", "perplexity", *ROUGE, "stopped", "looped", "seconds", "tokens_per_second"} <= figures.keys()
    bits = "heldout_book_bits_per_character"
    assert summary["pretrain"][bits] < summary["base"][bits] < 7
    pairs = [(one["of"], one["with"], one["name"]) for one in comparisons]
    assert pairs == [
        (tuned, other, score)
        for tuned in ("finetune", "finetune_lora")
        for other in ("base", "pretrain")
        for score in ("loss", "rouge-l")
    ]
    for one in comparisons:
        assert one["high"] < 0 if one["name"] == "loss" else one["low"] > 0, one
    for name in ("finetune", "finetune_lora"):
        assert summary[name]["stopped"] >= 0.9 and summary[name]["looped"] <= 0.1, summary[name]

    for name in ("pretrain", "finetune", "finetune_lora"):
        run = tmp_path / name
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert list((run / "logs").glob("events.out.tfevents.*"))
        assert len((run / "predict" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 110
    assert str(tmp_path) in done.stdout and "predictions.jsonl" in done.stdout
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000
