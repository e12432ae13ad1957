"""Rows are encoded once, by all cores as one by one would, until something that decides their tokens changes."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from dataset import encoded_rows, token_cache
from dataset.conversations import read_conversations
from dataset.encoded_rows import EncodedRows, encode_rows
from dataset.readers import read_conversation_rows
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ConversationArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import cache_folder
from novelgpt.text.templates import use_template
from tests.faults.test_disk import small_disk  # noqa: F401 - a fixture
from tests.launched import PATIENCE
from tests.memory_rows import as_list
from tests.ranks import run_pipeline, run_ranks
from tests.warm_python import start_warm

ENCODE = Path(__file__).with_name("encode_process.py")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Places of the rows that this process encodes."""
    made: list[str] = []
    encode = encoded_rows.encode_row

    def noted(row: Any, *arguments: Any) -> Any:
        made.append(row["source"])
        return encode(row, *arguments)

    monkeypatch.setattr(encoded_rows, "encode_row", noted)
    return made


def write_rows(path: Path, count: int, seed: int = 1) -> Path:
    draw = random.Random(seed)
    rows = [
        {"prompt": f"第{number}问", "response": "".join(draw.choices("山水风月花鸟，。", k=draw.randint(1, 60)))}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(file: Path, **options: Any) -> ConversationArguments:
    return ConversationArguments(train_files=[str(file)], packing=False, **options)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("rows-*") if path.suffix != ".lock")


def by_hand(file: Path, tokenizer: PreTrainedTokenizerBase, data: ConversationArguments) -> list[tuple[Any, ...]]:
    kept, _ = encode_rows(list(read_conversation_rows(file)), tokenizer, data)
    return sorted((row.source, row.input_ids, row.labels) for row in kept)


def as_read(sets: tuple[EncodedRows, EncodedRows]) -> list[tuple[Any, ...]]:
    return sorted(
        (*part.origins(number), row.input_ids, row.labels) for part in sets for number, row in enumerate(as_list(part))
    )


def test_a_second_start_encodes_nothing_and_reads_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 40)
    first = read_conversations(settings(file), tokenizer)
    assert calls == [f"{file}:{line}" for line in range(1, 41)]
    assert as_read(first) == by_hand(file, tokenizer, settings(file))
    calls.clear()
    again = read_conversations(settings(file), tokenizer)
    assert list(map(as_list, again)) == list(map(as_list, first)) and calls == []


def test_all_cores_make_what_one_makes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 600)
    alone = as_read(read_conversations(settings(file, overlong="split", max_length=40), tokenizer))
    assert len(list(entries(cache)[0].glob("*.arrow"))) == 1
    shutil.rmtree(cache)
    monkeypatch.setattr(encoded_rows, "BLOCK_CHARACTERS", 2_000)
    monkeypatch.setattr(token_cache, "usable_cores", lambda: 3)
    together = read_conversations(settings(file, overlong="split", max_length=40), tokenizer)
    assert len(list(entries(cache)[0].glob("*.arrow"))) == 3
    assert as_read(together) == alone
    assert [path.name for path in cache.iterdir()] == [entries(cache)[0].name]  # nothing else is left


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 30}, {"overlong": "split"}, {"mask_history": True}, {"min_length": 12}, {"instruction_seed": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_option_is_noticed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, calls: list[str], change: dict[str, Any]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 20)
    read_conversations(settings(file), tokenizer)
    calls.clear()
    changed = settings(file, **change)
    found = as_read(read_conversations(changed, tokenizer))
    assert len(calls) == 20
    assert found == by_hand(file, tokenizer, changed)


def test_a_changed_row_template_or_tokenizer_is_noticed_and_what_does_not_matter_is_not(
    tmp_path: Path, base_folder: Path, calls: list[str]
) -> None:
    def tokenizer() -> PreTrainedTokenizerBase:
        return load_tokenizer(ModelArguments(str(base_folder)))

    def encoded(file: Path, of: PreTrainedTokenizerBase, **options: Any) -> int:
        calls.clear()
        data = settings(file, **options)
        found, count = as_read(read_conversations(data, of)), len(calls)
        assert found == by_hand(file, of, data)
        return count

    file = write_rows(tmp_path / "rows.jsonl", 20)
    assert encoded(file, tokenizer()) == 20
    # Neither where the rows lie, nor when they were written, nor how they are divided.
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(file, moved)
    os.utime(file, (0, 0))
    assert encoded(file, tokenizer()) == encoded(moved, tokenizer()) == 0
    assert encoded(file, tokenizer(), valid_fraction=0.3) == 0

    other = tokenizer()
    use_template(other, "other", str(other.chat_template).replace("<|im_end|>\\n", "<|im_end|>"))
    assert encoded(file, other) == 20
    larger = tokenizer()
    larger.add_tokens(["山水"])
    assert encoded(file, larger) == 20
    file.write_text(file.read_text(encoding="utf-8").replace("第7问", "第七问"), encoding="utf-8")
    assert encoded(file, tokenizer()) == 20


def test_a_damaged_entry_is_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, calls: list[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 20)
    whole = as_read(read_conversations(settings(file), tokenizer))
    (entry,) = entries(cache)
    for damage in (
        lambda: next(entry.glob("*.arrow")).write_bytes(b""),
        lambda: (entry / "index.json").write_text("{", encoding="utf-8"),
        lambda: (entry / "index.json").unlink(),
    ):
        damage()
        calls.clear()
        assert as_read(read_conversations(settings(file), tokenizer)) == whole
        assert len(calls) == 20


def test_an_error_in_another_process_names_the_row_and_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 300)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:200], '{"prompt": "问", "response": 7}', *lines[201:]]), encoding="utf-8")
    monkeypatch.setattr(encoded_rows, "BLOCK_CHARACTERS", 2_000)
    monkeypatch.setattr(token_cache, "usable_cores", lambda: 2)
    with pytest.raises(UserError) as caught:
        read_conversations(settings(file), tokenizer)
    assert caught.value.cause == f"{file}:201: field response is not a text"
    assert list(cache.iterdir()) == []


def test_a_file_of_no_rows_has_nothing_to_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[]")
    with pytest.raises(UserError, match="0 rows cannot be split"):
        read_conversations(settings(file), tokenizer)


def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(taken))
    with pytest.raises(UserError) as caught:
        read_conversations(settings(write_rows(tmp_path / "rows.jsonl", 20)), tokenizer)
    assert caught.value.cause == f"the cache of encoded rows cannot be used: {taken}/novelgpt: Not a directory"


def test_a_source_that_is_written_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 20)
    encode = encoded_rows.encode_row

    def while_written(*arguments: Any) -> Any:
        write_rows(file, 20, seed=2)
        return encode(*arguments)

    monkeypatch.setattr(encoded_rows, "encode_row", while_written)
    with pytest.raises(UserError, match="was written while this run read it"):
        read_conversations(settings(file), tokenizer)
    assert list(cache.iterdir()) == []


class Encoding:
    """A process of `encode_process.py`, with those that it starts."""

    def __init__(self, file: Path, base: Path, cache: Path, pause: float = 0.0) -> None:
        self.calls = cache / "calls"
        self.log = file.with_name(f"{len(list(file.parent.glob('*.log')))}.log")
        self.process = start_warm(
            [str(ENCODE), str(file), str(base), str(pause)], {"HF_DATASETS_CACHE": str(cache)}, self.log
        )

    def number(self) -> int:
        return self.calls.stat().st_size if self.calls.exists() else 0

    def wait_for(self, calls: int) -> list[psutil.Process]:
        """Wait for so many calls; returns the processes that encode."""
        assert until(lambda: self.number() >= calls or self.process.poll() is not None)
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int | None, str]:
        """Its status and what it has printed."""
        return self.process.wait(PATIENCE), self.log.read_text(encoding="utf-8")


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


@pytest.mark.slow
def test_killed_twice_while_it_encodes_the_next_start_ends_right(
    tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, calls: list[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 300)
    for further in (10, 60):
        killed = Encoding(file, base_folder, cache.parent, pause=0.03)
        workers = killed.wait_for(killed.number() + further)
        assert workers
        killed.process.signal(signal.SIGKILL)
        assert killed.end()[0] == -signal.SIGKILL
        assert until(lambda: gone(workers))  # noqa: B023 - at once
        assert not entries(cache) or "unfinished" in entries(cache)[0].name
    before = killed.number()
    last = Encoding(file, base_folder, cache.parent)
    status, out = last.end()
    assert status == 0 and "300 rows" in out
    assert last.number() == before + 300
    assert [path.name for path in cache.iterdir()] == [entries(cache)[0].name]
    # What it has made is read here, and is what is made here.
    found = as_read(read_conversations(settings(file), tokenizer))
    assert calls == []
    assert found == by_hand(file, tokenizer, settings(file))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_all_processes_that_encode(
    tmp_path: Path, base_folder: Path, cache: Path, number: signal.Signals
) -> None:
    stopped = Encoding(write_rows(tmp_path / "rows.jsonl", 300), base_folder, cache.parent, pause=0.05)
    workers = stopped.wait_for(10)
    for one in [psutil.Process(stopped.process.pid), *(workers if number == signal.SIGINT else [])]:
        one.send_signal(number)  # Ctrl-C in a terminal reaches them all
    status, out = stopped.end()
    assert status in (-number, 128 + number)
    assert "Traceback" not in out
    assert until(lambda: gone(workers))


@pytest.mark.long
@pytest.mark.parametrize("which", [0, -1], ids=["worker", "queue"])
def test_a_killed_process_of_those_that_encode_ends_the_run(
    tmp_path: Path, base_folder: Path, cache: Path, which: int
) -> None:
    run = Encoding(write_rows(tmp_path / "rows.jsonl", 300), base_folder, cache.parent, pause=0.05)
    workers = run.wait_for(10)
    sorted(workers, key=lambda one: one.pid)[which].kill()
    status, out = run.end()
    assert status == 2, out
    assert "error: a process that tokenised rows was killed" in out and "Traceback" not in out
    assert until(lambda: gone(workers))
    assert entries(cache) == []


@pytest.mark.slow
def test_of_two_runs_one_encodes_and_the_other_maps(tmp_path: Path, base_folder: Path, cache: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 200)
    first, second = (Encoding(file, base_folder, cache.parent, pause=0.01) for _ in range(2))
    assert [one.end()[0] for one in (first, second)] == [0, 0]
    assert first.number() == 200


@pytest.mark.slow
def test_of_two_ranks_one_encodes(tmp_path: Path, base_folder: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 40)
    run_ranks(str(ENCODE.with_name("encode_ranks.py")), str(file), str(base_folder), str(tmp_path), logs=tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("calls-*"))] == ["calls-0"]
    assert (tmp_path / "calls-0").read_bytes() == b"." * 40
    assert (tmp_path / "rows-0").read_text(encoding="utf-8") == (tmp_path / "rows-1").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_error_of_the_rank_that_encodes_is_that_of_all(tmp_path: Path, base_folder: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 20)
    file.write_text(file.read_text(encoding="utf-8") + '{"prompt": "问", "response": 7}', encoding="utf-8")
    run_ranks(str(ENCODE.with_name("encode_ranks.py")), str(file), str(base_folder), str(tmp_path), logs=tmp_path)
    for rank in range(2):
        assert (tmp_path / f"rows-{rank}").read_text(encoding="utf-8") == f"{file}:21: field response is not a text"


@pytest.mark.long
def test_ranks_of_a_run_map_what_was_made(tmp_path: Path, base_folder: Path, cache: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 200)
    assert Encoding(file, base_folder, cache.parent).end()[0] == 0
    made = {path.name: path.stat().st_mtime_ns for path in entries(cache)[0].iterdir()}
    words = ["--model", str(base_folder), "--train_files", str(file), "--max_steps", "1", "--output_dir"]
    # The default of the command line: packed, which is a matter of drawing.
    run_pipeline("finetune", [*words, str(tmp_path / "run"), "--stop_check", "0", "--max_eval_share", "0.01"], 2)
    assert {path.name: path.stat().st_mtime_ns for path in entries(cache)[0].iterdir()} == made
    assert len(entries(cache)) == 1


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, base_folder: Path, small_disk: Path  # noqa: F811
) -> None:  # fmt: skip
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    failed = Encoding(write_rows(tmp_path / "rows.jsonl", 600), base_folder, small_disk)
    status, out = failed.end()
    assert status == 2, out
    assert "the disk is full" in out and "Traceback" not in out
    assert not list((small_disk / "novelgpt").glob("rows-*"))
