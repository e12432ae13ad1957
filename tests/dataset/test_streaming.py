"""Rows that are read as the training goes on: how sources take turns, and how a stream goes on where it was left."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from transformers import PreTrainedTokenizerBase

from dataset.encoded_rows import encode_rows
from dataset.instructions import load_instructions
from dataset.records import Record
from dataset.row_columns import RowColumns
from dataset.sources import RowSource
from dataset.streaming import InterleavedRows, StreamedRows
from finetune.__main__ import main as finetune
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from tests.launched import PATIENCE, ROOT
from tests.warm_python import warm_python

SIZES = {"a": 40, "b": 120}
WEIGHTS = [Fraction(2), Fraction(1)]
# Ends after a row of the second section, while a thread reads it.
ENDING_PROGRAM = """
import sys, threading
from tests.dataset.test_streaming import NotedColumns, RowSource, stream
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments

class EndingColumns(NotedColumns):
    def record(self, fields, where):
        if where.endswith(":30"):
            reached.set()
            threading.main_thread().join()
        print(where.rpartition(":")[2], flush=True)
        return fields

reached = threading.Event()
files = sys.argv[2:]
sources = [RowSource("a", files[0], (files[0],), columns=EndingColumns((), "")), RowSource("b", files[1], (files[1],))]
stream(sources, load_tokenizer(ModelArguments(model=sys.argv[1])), buffer_rows=50)
reached.wait()
"""


@dataclass(frozen=True)
class NotedColumns(RowColumns):
    """Columns under their own names, which note the rows that are parsed."""

    parsed: list[str] = field(default_factory=list)

    def record(self, fields: Record, where: str) -> Record:
        self.parsed.append(where)
        return fields


@pytest.fixture
def sources(tmp_path: Path) -> list[RowSource]:
    made = []
    draw = numpy.random.default_rng(1)
    for name, size in SIZES.items():
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name}{number}", "response": "答" * int(draw.integers(1, 9))} for number in range(size)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        made.append(RowSource(name, str(path), (str(path),)))
    return made


def stream(
    sources: list[RowSource],
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any] | None = None,
    **data: Any,
) -> StreamedRows:
    options = {"streaming": True, "buffer_rows": 30, "max_length": 64} | data
    return StreamedRows(
        sources, WEIGHTS, tokenizer, ConversationArguments(**options), load_instructions([], 1), 5, 200, state
    )


def test_sources_are_always_as_far_as_their_weights_say(sources: list[RowSource]) -> None:
    taken = InterleavedRows(sources, WEIGHTS).take(1000)
    for count in range(100, 1001, 100):
        passes = [sum(index == of for index, _, _ in taken[:count]) / size for of, size in enumerate(SIZES.values())]
        assert passes[0] / 2 == pytest.approx(passes[1], abs=0.1)
    assert [number for index, number, _ in taken if index == 0][:81] == [*range(40), *range(40), 0]
    assert {index for index, _, _ in InterleavedRows(sources, [Fraction(0), Fraction(1)]).take(50)} == {1}


@pytest.mark.parametrize("before", [0, 1, 39, 80, 333])
def test_a_position_is_all_that_reading_needs_to_go_on(before: int, sources: list[RowSource]) -> None:
    reader = InterleavedRows(sources, WEIGHTS)
    reader.take(before)
    position = reader.positions()
    expected = reader.take(100)
    assert InterleavedRows(sources, WEIGHTS, position).take(100) == expected


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_stream_encodes_nothing_twice_and_gives_the_same_rows(
    packing: bool, sources: list[RowSource], tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = stream(sources, tokenizer, packing=packing)
    rows = [whole[number]["input_ids"].tolist() for number in range(200)]
    origins = [whole.origins(number) for number in range(200)]
    assert rows[0] == whole[0]["input_ids"].tolist()  # from the start again
    assert sorted(rows[:20]) != sorted(rows[20:40])
    whole = stream(sources, tokenizer, packing=packing)
    for number in range(75):
        whole[number]
    state = json.loads(json.dumps(whole.state(75)))
    assert 0 < state["start"] <= 75
    noted = NotedColumns((), "")
    resumed = stream([replace(source, columns=noted) for source in sources], tokenizer, state, packing=packing)
    resumed[0], resumed[len(resumed) - 1]  # what is tried before training is of the section at hand
    assert [resumed[number]["input_ids"].tolist() for number in range(75, 90)] == rows[75:90]
    assert [resumed.origins(number) for number in range(75, 90)] == origins[75:90]
    sections = sum(start < 90 for start, _ in resumed.starts) + 1  # and one ahead
    assert 0 < len(noted.parsed) <= 30 * sections < 30 * (state["section"] + sections)


@pytest.mark.parametrize("packing", [True, False])
def test_all_rows_that_were_read_are_counted_also_before_a_resume(
    packing: bool, sources: list[RowSource], tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = stream(sources, tokenizer, packing=packing, max_length=34)
    for number in range(75):
        whole[number]
    state = json.loads(json.dumps(whole.state(75)))
    resumed = stream(sources, tokenizer, state, packing=packing, max_length=34)
    for number in range(75, 200):
        assert whole[number]["input_ids"].tolist() == resumed[number]["input_ids"].tolist()
    sections = len(whole.starts) - 1  # of which the last start is that of the next one
    assert sections > 3
    records = [json.loads(row.text) for _, _, row in InterleavedRows(sources, WEIGHTS).take(30 * sections)]
    roles = {"prompt": "user", "response": "assistant"}
    conversations: list[Any] = [
        {"messages": [{"role": roles[name], "content": text} for name, text in record.items()], "source": ""}
        for record in records
    ]
    _, expected = encode_rows(conversations, tokenizer, ConversationArguments(max_length=34))
    assert whole.counts() == resumed.counts() == expected
    assert expected.dropped > 0 and expected.notes
    assert expected.tokens_in == expected.trained + expected.context + expected.dropped


def test_the_thread_that_reads_ends_with_the_program(
    sources: list[RowSource], base_folder: Path, tmp_path: Path
) -> None:
    files = [source.given for source in sources]
    program = tmp_path / "ending.py"
    program.write_text(ENDING_PROGRAM, encoding="utf-8")
    words = [warm_python(), str(program), str(base_folder), *files]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment)
    printed = [int(line) for line in done.stdout.splitlines()]
    assert printed == [*range(1, 31)]
    assert "Traceback" not in done.stderr


def test_a_run_that_is_stopped_says_what_it_has_read(
    sources: list[RowSource], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [source.given for source in sources]
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"

    def stop() -> None:
        while not (metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        finetune([
            "--model", str(base_folder), "--train_files", *files, "--valid_files", files[0], "--streaming",
            "--buffer_rows", "30", "--max_length", "64", "--max_steps", "100000", "--per_device_train_batch_size", "1",
            "--stop_check", "0", "--eval_strategy", "no", "--logging_steps", "1", "--output_dir", str(folder),
        ])  # fmt: skip
    assert ended.value.code == 128 + signal.SIGTERM
    (saved,) = folder.glob("checkpoint-*")
    before = json.loads((saved / "states.json").read_text(encoding="utf-8"))["rows"]["counts"]["rows"]
    shown = capsys.readouterr().out
    found = re.search(r"Data read.*?rows\D+([\d,]+)", shown, re.DOTALL)
    assert found is not None, shown
    rows = int(found[1].replace(",", ""))
    assert rows % 30 == 0 and before <= rows <= before + 60


def test_origins_are_those_of_the_rows(sources: list[RowSource], tokenizer: PreTrainedTokenizerBase) -> None:
    rows = stream(sources, tokenizer)
    for number in range(100):
        text = tokenizer.decode(rows[number]["input_ids"])
        for origin in rows.origins(number):
            path, _, line = origin.rpartition(":")
            assert json.loads(Path(path).read_bytes().splitlines()[int(line) - 1])["prompt"] in text


def test_a_row_that_cannot_be_read_stops_the_run_when_it_is_reached(
    sources: list[RowSource], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = Path(sources[1].given)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines[:70], "broken\n", *lines[70:]]), encoding="utf-8")
    rows = stream(sources, tokenizer)
    with pytest.raises(UserError) as error:
        for number in range(200):
            rows[number]
    assert error.value.cause.startswith(f"{path}:71: invalid JSON")


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--valid_files", "FILE"], "--streaming needs --max_steps"),
        (["--max_steps", "3"], "--streaming needs --valid_files"),
        (["--max_steps", "3", "--valid_files", "FILE", "--train_sampling_strategy", "group_by_length"],
         "--train_sampling_strategy group_by_length needs all of them"),
        (["--max_steps", "3", "--valid_files", "FILE", "--dataloader_num_workers", "1"], "--dataloader_num_workers"),
    ],
)  # fmt: skip
def test_what_a_stream_cannot_do_is_refused(
    words: list[str],
    cause: str,
    sources: list[RowSource],
    base_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = sources[0].given
    words = [file if word == "FILE" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        finetune(["--model", str(base_folder), "--train_files", file, "--streaming", *words])
    assert ended.value.code == 2
    assert cause in capsys.readouterr().err
