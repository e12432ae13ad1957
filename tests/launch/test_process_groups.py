"""Ranks leave their group before Python ends, whether the run has ended well or not."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from novelgpt.settings.paths import SAMPLES
from tests.ranks import run_ranks

PAPERS = str(SAMPLES / "papers" / "valid.jsonl")
NOVEL = str(SAMPLES / "novels" / "shan_zhong_yao_pu.txt")
QUICK = ["--max_steps", "1", "--max_length", "256", "--eval_strategy", "no", "--eval_on_start", "False"]
QUICK += ["--guards", "False", "--preflight", "False", "--save_strategy", "no"]
NO_STOPS = ["--stop_check", "0"]
ENDS = {
    "pretrain": (0, [*QUICK, "--train_files", NOVEL, "--valid_files", NOVEL]),
    "finetune": (0, [*QUICK, *NO_STOPS, "--train_files", PAPERS, "--valid_files", PAPERS]),
    "finetune_lora": (0, [*QUICK, *NO_STOPS, "--train_files", PAPERS, "--valid_files", PAPERS]),
    "predict": (0, ["--data_files", PAPERS, "--max_rows", "2", "--max_new_tokens", "2"]),
    "finetune without data": (2, [*QUICK, *NO_STOPS, "--train_files", "none.jsonl"]),
}


# Pipelines end alike.
LONG = ("finetune", "finetune_lora")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in ENDS]
)
def test_ranks_leave_their_group(name: str, base_folder: Path, tmp_path: Path) -> None:
    status, words = ENDS[name]
    words = ["--model", str(base_folder), "--output_dir", str(tmp_path / "run"), *words]
    run_ranks(__file__, name.split()[0], str(status), *words, logs=tmp_path)


def end(pipeline: str, status: int, words: list[str]) -> None:
    """In a rank: run a pipeline, and look."""
    ended = 0
    try:
        importlib.import_module(f"{pipeline}.__main__").main(words)
    except SystemExit as error:
        ended = int(error.code or 0)
    assert ended == status
    assert PartialState().num_processes == 2
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    end(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
