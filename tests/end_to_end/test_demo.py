"""The demo, as a new user runs it, keeps its promises."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo import TUNED, judge
from cli.demo import main
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

    for one in judge(summary):
        assert one["holds"], one
    bits = "heldout_book_bits_per_character"
    assert summary["pretrain"][bits] < summary["base"][bits] < 7
    comparisons = summary.pop("comparisons")
    assert list(summary) == ["base", "pretrain", "finetune", "finetune_lora"]
    for figures in summary.values():
        assert {"loss", "perplexity", *ROUGE, "stopped", "looped", "seconds", "tokens_per_second"} <= figures.keys()
    pairs = [(one["of"], one["with"], one["name"]) for one in comparisons]
    assert pairs == [
        (tuned, other, score)
        for tuned in ("finetune", "finetune_lora")
        for other in ("base", "pretrain")
        for score in ("loss", "rouge-l")
    ]
    for one in comparisons:
        assert one["high"] < 0 if one["name"] == "loss" else one["low"] > 0, one

    for name in ("pretrain", "finetune", "finetune_lora"):
        run = tmp_path / name
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert list((run / "logs").glob("events.out.tfevents.*"))
        assert len((run / "predict" / "predictions.jsonl").read_bytes().splitlines()) == 110
    assert str(tmp_path) in done.stdout and "predictions.jsonl" in done.stdout
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000


def good_summary() -> dict[str, Any]:
    """Of a demo that keeps all promises, by little."""
    answers = {"stopped": 0.9, "looped": 0.1}
    bits = "heldout_book_bits_per_character"
    summary: dict[str, Any] = {"base": {bits: 6.0}, "pretrain": {bits: 5.9}} | {name: dict(answers) for name in TUNED}
    intervals = {"loss": (-0.9, -0.1), "rouge-l": (0.01, 0.2)}
    summary["comparisons"] = [
        {"of": tuned, "with": other, "name": name, "low": low, "high": high}
        for tuned in TUNED
        for other in ("base", "pretrain")
        for name, (low, high) in intervals.items()
    ]
    return summary


def test_a_promise_that_is_not_kept_is_seen() -> None:
    results = judge(good_summary())
    assert len(results) == 13 and all(one["holds"] for one in results)
    for place, change in (
        (("pretrain", "heldout_book_bits_per_character"), 6.1), (("finetune", "stopped"), 0.89),
        (("finetune_lora", "looped"), 0.11), (("comparisons", 0, "high"), 0.1), (("comparisons", 7, "low"), -0.01),
    ):  # fmt: skip
        summary = good_summary()
        found: Any = summary
        for step in place[:-1]:
            found = found[step]
        found[place[-1]] = change
        assert [one["holds"] for one in judge(summary)].count(False) == 1


def test_what_no_demo_made_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "pretrain" / "model.safetensors"
    kept.parent.mkdir()
    kept.write_text("of days", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    error, fix = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "has pretrain, not of a demo" in error and fix == "  fix: name another folder"
    assert kept.read_text(encoding="utf-8") == "of days" and list(tmp_path.iterdir()) == [kept.parent]
