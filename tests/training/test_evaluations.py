"""Evaluations cost a share of training at most, on rows spread evenly, and what they take is told."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from torch.utils.data import Subset

from finetune.__main__ import main as finetune
from novelgpt.settings.arguments import TrainArguments
from novelgpt.text.mixture import RowsBySource
from novelgpt.text.origins import TracedRows
from novelgpt.training import callbacks, evaluations, throughput
from novelgpt.training.evaluations import EvaluationPlan, plan_evaluations
from tests.faults.runs import write_base, write_rows


@pytest.fixture(autouse=True)
def small_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "MIN_TOKENS", 100)
    monkeypatch.setattr(evaluations, "MIN_ROWS", 2)


def plan(valid_lengths: list[int], lengths: list[int], tmp_path: Path, **training: Any) -> EvaluationPlan:
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True, **training)
    rows: Any = list(range(len(valid_lengths)))
    return plan_evaluations(rows, numpy.array(lengths), numpy.array(valid_lengths), len(lengths), arguments)


def test_all_evaluations_together_take_a_share_of_training(tmp_path: Path) -> None:
    # 3 epochs of 1,000 rows: 4 evaluations (one before the first step) may have 1.5 % of 300,000 tokens each.
    found = plan([100] * 400, [100] * 1000, tmp_path, max_eval_share=0.06)
    assert (found.times, found.tokens, found.of_all) == (4, 4500, (400, 40_000))
    assert found.share == pytest.approx(0.06)
    assert isinstance(found.rows, Subset)
    chosen = list(found.rows.indices)
    assert chosen == [number * 400 // 45 for number in range(45)]  # from all parts of the rows, in their order
    text = found.explain()
    assert "4 times, on 45 of 400 rows, spread evenly, 4,500 of 40,000 tokens" in text and "--max_eval_share 0" in text
    again = plan([100] * 400, [100] * 1000, tmp_path, max_eval_share=0.06)
    assert isinstance(again.rows, Subset) and list(again.rows.indices) == chosen


class Lengths(TracedRows):
    """Rows of which only their lengths matter."""

    def __init__(self, lengths: numpy.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        return []

    def subset(self, numbers: numpy.ndarray) -> "Lengths":
        return Lengths(self.lengths[numbers])


def test_of_each_source_some_rows_are_evaluated(tmp_path: Path) -> None:
    sources = numpy.array([0] * 390 + [1] * 3 + [2] * 7)
    valid = RowsBySource(Lengths(numpy.full(400, 100)), sources, ["a", "b", "c"])
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True, max_eval_share=0.06)
    found = plan_evaluations(valid, numpy.full(1000, 100), valid.lengths, 1000, arguments)
    assert isinstance(found.rows, Subset) and found.sources is not None
    assert numpy.bincount(found.sources).tolist() == [43, 2, 2]
    assert found.sources.tolist() == sources[found.rows.indices].tolist()


@pytest.mark.parametrize(
    ("training", "times"),
    [
        ({}, 4),
        ({"eval_on_start": False}, 3),
        ({"eval_strategy": "no", "eval_on_start": False}, 1),
        ({"eval_strategy": "steps", "eval_steps": 100}, 9),  # of 750 steps, the last one included
        ({"eval_strategy": "steps", "eval_steps": 0.25}, 5),
        ({"max_steps": 300}, 3),  # an epoch and a part of one
        ({"load_best_model_at_end": True}, 5),
    ],
)
def test_how_often(training: dict[str, Any], times: int, tmp_path: Path) -> None:
    assert plan([10], [100] * 1000, tmp_path, **training).times == times


def test_what_costs_little_is_evaluated_whole(tmp_path: Path) -> None:
    found = plan([100] * 10, [100] * 1000, tmp_path)
    assert found.rows == list(range(10))
    assert "4 times, on 10 rows of 1,000 tokens" in found.explain() and "max_eval_share" not in found.explain()
    assert "once, on 1 row of 7 tokens" in plan([7], [9], tmp_path, eval_strategy="no", eval_on_start=False).explain()
    whole = plan([100] * 4000, [100] * 1000, tmp_path, max_eval_share=0)
    assert whole.tokens == 400_000


def test_a_short_run_evaluates_on_something_all_the_same(tmp_path: Path) -> None:
    found = plan([30] * 400, [100] * 1000, tmp_path, max_steps=1, per_device_train_batch_size=1)
    assert found.tokens == 90
    assert "fewer would be too noisy" in found.explain()
    assert len(plan([1000] * 400, [100] * 1000, tmp_path, max_steps=1).rows) == 2  # type: ignore[arg-type]


def test_the_time_left_has_the_evaluations_to_come(tmp_path: Path) -> None:
    found = plan([10] * 9, [100] * 1000, tmp_path, eval_strategy="steps", eval_steps=100)
    assert found.left(0) == 8
    assert [found.left(step) for step in (99, 100, 101, 750)] == [8, 8, 7, 1]
    assert found.seconds_left(701, 4.0, 50.0) == 4.0
    assert found.seconds_left(701, None, 50.0) == pytest.approx(90 / 50 / 3)


def run(base: Path, folder: Path, rows: Path, valid: Path, *more: str) -> dict[str, Any]:
    words = f"""
        --model {base} --train_files {rows} --valid_files {valid} --output_dir {folder} --precision fp32 --packing False
        --max_length 64 --max_steps 4 --eval_strategy steps --eval_steps 2 --save_strategy no --stop_check 0
        --logging_steps 1 --guards False --preflight False --per_device_eval_batch_size 1 --disable_tqdm True
    """
    finetune([*words.split(), *more])
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]


def test_a_run_says_what_it_evaluates_on(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_LINES", 0.0)
    throughput.CEILING_SIZE["cpu"] = 32
    base = write_base(base_folder, tmp_path / "base", dropout=0.0)
    rows = write_rows(tmp_path / "rows", 20)[1]
    capped = run(base, tmp_path / "capped", rows, rows)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("evaluation: "))
    assert "3 times, on" in line and "of 20 rows" in line
    entries = [json.loads(line) for line in (tmp_path / "capped" / "metrics.jsonl").read_bytes().splitlines()]
    tokens = {entry["eval_tokens"] for entry in entries if "eval_loss" in entry}
    assert tokens == {capped["eval_tokens"]}
    assert f"over {capped['eval_tokens']:,} tokens" in printed
    # A line a batch, as no time is to pass between two.
    batches = [line for line in printed.splitlines() if line.startswith("evaluating: ")]
    assert batches and "left" in batches[0]
    whole = run(base, tmp_path / "whole", rows, rows, "--max_eval_share", "0")
    assert whole["eval_tokens"] > capped["eval_tokens"]
