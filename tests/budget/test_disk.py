"""What a run takes on the disk is known before it starts, to a few per cent, and refused where it is not there."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState

from finetune.__main__ import main as finetune
from novelgpt.budget.disk import DiskForecast, bytes_in, forecast_disk, lack_of_room, saved_bytes, steps_in_epoch
from novelgpt.checks.run import estimate_run, parse_run
from novelgpt.settings.arguments import TrainArguments
from novelgpt.training.callbacks import Curves, RunRecorder
from tests.ranks import run_pipeline

ROWS = json.dumps({"prompt": "灯塔下有什么？", "completion": "一封没有寄出的信。"}, ensure_ascii=False) + "\n"
# One epoch of four steps, a checkpoint after each, of which one is kept beside the one that is written.
FOUR_STEPS = [
    "--num_train_epochs",
    "1",
    "--per_device_train_batch_size",
    "4",
    "--packing",
    "False",
    "--stop_check",
    "0",
]
FOUR_STEPS += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1", "--eval_strategy", "no"]
FOUR_STEPS += ["--eval_on_start", "False", "--max_length", "128"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(ROWS * 16, encoding="utf-8")
    return path


def forecast(pipeline: str, base: Path, tokenizer: PreTrainedTokenizerBase, words: list[str]) -> DiskForecast:
    run = parse_run(pipeline, ["--model", str(base), *words])
    plan = estimate_run(run)
    assert plan.model is not None
    return forecast_disk(plan.model, plan.training, saved_bytes(tokenizer), steps_in_epoch(16, plan.training))


CASES = [
    ("finetune", 1, 0),
    ("finetune_lora", 1, 0),
    ("finetune", 2, 2),
    pytest.param("finetune_lora", 2, 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("pipeline", "processes", "zero"), CASES)
def test_checkpoints_take_what_was_forecast(
    pipeline: str, processes: int, zero: int, rows: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    words = ["--train_files", str(rows), "--valid_files", str(rows), *FOUR_STEPS, "--output_dir", str(folder)]
    printed = run_pipeline(pipeline, ["--model", str(base_folder), *words], processes, zero)
    # Forecast anew: of one process, which knows of DeepSpeed by its settings alone.
    settings = [] if not zero else ["--deepspeed", str(Path("scripts/deepspeed") / f"zero{zero}.json")]
    expected = forecast(pipeline, base_folder, tokenizer, [*words, *settings])
    (checkpoint,) = folder.glob("checkpoint-*")
    weights = next(folder.glob("*model.safetensors")).stat().st_size
    assert bytes_in(checkpoint) == pytest.approx(expected.checkpoint, rel=0.05)
    assert bytes_in(folder) - bytes_in(checkpoint) == pytest.approx(expected.final + expected.other, abs=250_000)
    assert expected.final == pytest.approx(weights, abs=150_000)
    assert (expected.most, expected.kept) == (2, 1)
    assert "at most 2 checkpoints of" in printed


@pytest.mark.parametrize(
    ("settings", "steps", "counts"),
    [
        ({}, None, (3, 2)),
        ({"num_train_epochs": 2.0}, None, (2, 2)),
        ({"save_strategy": "no"}, 7, (0, 0)),
        ({"save_total_limit": None, "num_train_epochs": 4.5}, None, (5, 5)),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": 4}, None, (5, 4)),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": 4}, 10, (3, 3)),
        ({"save_strategy": "steps", "save_steps": 10, "max_steps": 25}, None, (3, 2)),
        ({"save_strategy": "steps", "save_steps": 0.25, "save_total_limit": None}, 100, (4, 4)),
        ({"save_strategy": "steps", "save_steps": 10, "save_total_limit": None}, None, (None, 0)),
        ({"save_total_limit": 1, "metric_for_best_model": "loss"}, None, (3, 2)),
    ],
)
def test_how_many_checkpoints_lie_there_at_once(
    settings: dict[str, Any], steps: int | None, counts: tuple[int | None, int], base_folder: Path, tmp_path: Path
) -> None:
    run = parse_run("finetune", ["--model", str(base_folder)])
    plan = estimate_run(run)
    assert plan.model is not None
    training = TrainArguments(output_dir=str(tmp_path), **settings)
    found = forecast_disk(plan.model, training, 0, steps)
    assert (found.most, found.kept) == counts


def test_what_a_run_holds_already_is_not_asked_for_again(tmp_path: Path) -> None:
    need = DiskForecast(checkpoint=3000, most=3, kept=2, final=1000, other=0)
    assert need.need == int(1.01 * 9000)  # three checkpoints are more than two and the final weights
    assert DiskForecast(3000, 2, 2, 1000, 0).need == int(1.01 * 7000)
    assert lack_of_room(need, 0, need.need, tmp_path) is None
    assert lack_of_room(need, 90, need.need - 90, tmp_path) is None
    problem = lack_of_room(need, 90, need.need - 91, tmp_path)
    assert problem is not None and "--save_total_limit 1" in problem.remedy and "--output_dir" in problem.remedy


def test_a_run_that_does_not_fit_is_refused_before_its_weights_are_loaded(
    rows: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**7, 10**7))
    words = ["--model", str(base), "--train_files", str(rows), "--valid_files", str(rows), *FOUR_STEPS]
    with pytest.raises(SystemExit) as ended:
        finetune([*words, "--output_dir", str(tmp_path / "run")])
    cause, remedy = capsys.readouterr().err.splitlines()[-2:]
    assert ended.value.code == 2
    assert "too small for this run" in cause and "44.8 MB expected" in cause and "10.0 MB are free" in cause
    assert "--save_only_model" in remedy and "--output_dir" in remedy
    assert not (tmp_path / "run").exists()


@pytest.fixture
def files_of_2000_bytes() -> Iterator[None]:
    """A limit that ends writing as a full disk does, by an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("files_of_2000_bytes")
def test_curves_that_cannot_be_written_do_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = TrainArguments(output_dir=str(tmp_path))
    curves, recorder = Curves(SummaryWriter(str(tmp_path / "logs"), flush_secs=0)), RunRecorder(tmp_path)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    model = torch.nn.Linear(1, 1)
    for callback in (recorder, curves):
        callback.on_train_begin(training, state, control, model=model)
    for step in range(200):
        state.global_step = step + 1
        for callback in (recorder, curves):
            callback.on_log(training, state, control, logs={"loss": 1.0, "learning_rate": 0.1}, model=model)
    curves.close()
    printed = capsys.readouterr().out
    for what in ("metrics.jsonl", "loss.png", "TensorBoard's events"):
        assert printed.count(f"{what} cannot be written any more") == 1, printed
    assert len(recorder.history) == 200
