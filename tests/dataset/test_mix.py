"""Conversations of several sources by weight: what an epoch takes, what is held out, and whose loss is told."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from transformers import PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.mix import check_figure, figure_names, weights_of
from dataset.sources import find_row_sources
from finetune.__main__ import main as finetune
from novelgpt.settings.arguments import ConversationArguments, TrainArguments
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError
from novelgpt.text.mixture import MixedRows, RowsBySource
from novelgpt.text.statistics import SourceCounts, show_sources
from tests.faults.runs import write_base

SIZES = {"novels": 100, "general": 300, "papers": 150}
WEIGHTS = {"novels": 2.0, "general": 0.3, "papers": 1.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, draw = tmp_path_factory.mktemp("mix"), numpy.random.default_rng(1)
    found = {name: place / f"{name}.jsonl" for name in SIZES}
    for name, path in found.items():
        rows = [
            {"prompt": f"{name} 第{number}问", "response": "答" * int(draw.integers(1, 12))}
            for number in range(SIZES[name])
        ]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return found


def read(
    files: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, packing: bool = True, **training: Any
) -> tuple[MixedRows, RowsBySource]:
    data = ConversationArguments(
        train_files=[str(path) for path in files.values()], mix=["novels=2", f"{files['general']}=0.3"],
        valid_fraction=0.1, max_length=128, packing=packing,
    )  # fmt: skip
    arguments = TrainArguments(output_dir=str(tmp_path), use_cpu=True, **training)
    train, valid = read_conversations(data, tokenizer, arguments)
    assert isinstance(train, MixedRows) and isinstance(valid, RowsBySource)
    return train, valid


@pytest.mark.parametrize("packing", [True, False])
def test_each_source_is_passed_over_as_often_as_its_weight_says(
    packing: bool, files: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train, _ = read(files, tokenizer, tmp_path, packing)
    epochs = 20
    seen = Counter(origin for number in range(epochs * train.per_epoch) for origin in train.origins(number))
    assert max(len(pack["input_ids"]) for pack in train) <= 128
    for name, path in files.items():
        times = [count for origin, count in seen.items() if origin.startswith(str(path))]
        assert len(times) == SIZES[name] * 9 // 10  # a tenth of each source is held out
        assert sum(times) / len(times) / epochs == pytest.approx(WEIGHTS[name], rel=0.005)
        assert max(times) - min(times) <= 2  # the end lies within a section, whose rows are shuffled


def test_the_rows_follow_from_the_seed_in_any_order_of_asking(
    files: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train, valid = read(files, tokenizer, tmp_path)
    numbers = range(3 * train.per_epoch)
    expected = [train.origins(number) for number in numbers]
    again, same = read(files, tokenizer, tmp_path, seed=7, data_seed=42)
    assert [again.origins(number) for number in reversed(numbers)] == expected[::-1]
    other, _ = read(files, tokenizer, tmp_path, seed=7)
    assert [other.origins(number) for number in numbers] != expected
    assert [valid.origins(index) for index in range(len(valid))] == [same.origins(index) for index in range(len(same))]


def test_packs_of_the_evaluation_hold_rows_of_one_source(
    files: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    _, valid = read(files, tokenizer, tmp_path)
    assert valid.names == list(files)
    found = Counter()
    for index in range(len(valid)):
        assert len(valid[index]["input_ids"]) == valid.lengths[index]
        origins = valid.origins(index)
        own = str(files[valid.names[valid.sources[index]]])
        assert all(origin.startswith(own) for origin in origins)
        found[valid.names[valid.sources[index]]] += len(origins)
    assert found == {name: size // 10 for name, size in SIZES.items()}
    assert all(len(valid.origins(index)) > 1 for index in range(2))  # packs, nevertheless


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        ({"novel": 1}, "--mix names novel, which is none of the training sources"),
        ({"novels": 1, "NOVELS": 2}, "--mix names one source as "),
        ({"novels": 0, "general": 0, "papers": 0}, "every source the weight 0"),
    ],
)
def test_weights_of_no_source_are_refused(weights: dict[str, int], cause: str, files: dict[str, Path]) -> None:
    sources = find_row_sources([str(path) for path in files.values()])
    named = {str(files["novels"]) if name == "NOVELS" else name: Fraction(weight) for name, weight in weights.items()}
    with pytest.raises(UserError) as error:
        weights_of(sources, named)
    assert cause in error.value.cause
    assert weights_of(sources, {"general": Fraction(0)}) == [1, 0, 1]


def test_figures_are_named_for_sources_unlike_each_other() -> None:
    assert figure_names(["novels", "a b#30%", "novels", "小说", "//"]) == [
        "novels",
        "a_b_30",
        "novels_2",
        "小说",
        "source",
    ]
    check_figure("eval_novels_loss", ["novels"])
    check_figure("perplexity", ["novels"])
    with pytest.raises(UserError, match="--metric_for_best_model papers_loss is not a metric of evaluations"):
        check_figure("papers_loss", ["novels"])


def test_the_table_of_sources_tells_passes_and_shares() -> None:
    console = make_console(width=200, record=True)
    counts = [SourceCounts("novels", 90, 1000, 600, Fraction(2)), SourceCounts("rest", 9, 5000, 10, Fraction("0.4"))]
    show_sources(counts, 2.5, console)
    lines = [line.split() for line in console.export_text().splitlines()]
    cells = [[cell for cell in line if cell != "│"] for line in lines]
    assert ["novels", "90", "1,000", "600", "2", "5.00", "50.0%"] in cells
    assert ["rest", "9", "5,000", "10", "0.4", "1.00", "50.0%"] in cells


def test_the_loss_of_each_source_is_logged_and_may_choose_the_best_checkpoint(
    files: dict[str, Path], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(base_folder, tmp_path / "base", dropout=0.0)
    finetune([
        "--model", str(base), "--mix", f"{files['novels']}=0.4", f"{files['general']}=0.1", "--max_length", "128",
        "--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2",
        "--metric_for_best_model", "novels_loss", "--load_best_model_at_end", "--stop_check", "0",
        "--preflight", "False",
    ])  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 2, 4]
    for entry in evaluated:
        losses = sorted([entry["eval_novels_loss"], entry["eval_general_loss"]])
        assert losses[0] < entry["eval_loss"] < losses[1]
    best = min(evaluated[1:], key=lambda entry: entry["eval_novels_loss"])
    assert f"the weights of step {best['step']} are saved, whose novels_loss is the best" in capsys.readouterr().out
