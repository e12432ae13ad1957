"""Which folder a run gets, what it may remove there, and what a run.json may hold that is none."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from finetune.__main__ import main as finetune
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.run_record import newest_finetuning, read_run_record
from novelgpt.settings.runs import FinetuneRun
from novelgpt.training import run_choice
from novelgpt.training.run_choice import preview_run_folder
from novelgpt.training.run_folder import RESULT_FILES, claim_run_folder
from tests.faults.runs import files_of, write_base, write_rows

Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """The command line of a small run into a folder."""
    place = tmp_path_factory.mktemp("inputs")
    base = write_base(base_folder, place / "base")
    _, questions = write_rows(place / "rows", 12)
    common = ["--model", str(base), "--train_files", str(questions), "--max_length", "32", "--max_steps", "2"]
    common += ["--save_strategy", "steps", "--save_steps", "1", "--stop_check", "0", "--eval_on_start", "False"]

    def make(folder: Path | None, *more: str) -> list[str]:
        return [*common, *([] if folder is None else ["--output_dir", str(folder)]), *more]

    return make


@pytest.fixture(scope="module")
def finished(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended well."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finetune(words(folder))
    return folder


def status_of(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"])


def test_runs_that_start_together_get_folders_of_their_own(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_choice, "OUTPUT", tmp_path)
    count = 6
    together = threading.Barrier(count, timeout=60)  # a run that fails breaks it for all

    def claim(_: int) -> Path:
        run = parse_arguments(FinetuneRun, words(None))
        together.wait()
        with claim_run_folder(run) as folder:
            together.wait()  # all are held at once
            return folder.path

    for _ in range(5):
        with ThreadPoolExecutor(count) as pool:
            folders = list(pool.map(claim, range(count)))
        names = ["finetune", *(f"finetune-{number}" for number in range(2, count + 1))]
        assert sorted(folder.name for folder in folders) == sorted(names)
        assert list(tmp_path.iterdir()) == []  # none of them was used


@pytest.mark.parametrize(
    "option", ["model", "model by a link", "checkpoint", "train_files", "valid_files", "deepspeed"]
)
def test_a_run_does_not_replace_what_it_reads(option: str, words: Words, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(finished)
    (finished / "inputs").mkdir(exist_ok=True)
    rows, zero = finished / "inputs" / "rows.jsonl", finished / "inputs" / "zero.json"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    zero.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    named = {"model": finished, "model by a link": tmp_path / "link", "checkpoint": finished / "checkpoint-1"}
    named |= {"train_files": rows, "valid_files": tmp_path / "link" / "inputs" / "rows.jsonl", "deepspeed": zero}
    name = "model" if named[option].is_dir() else option
    before = files_of(finished)
    run = parse_arguments(FinetuneRun, words(finished, "--overwrite_output_dir", f"--{name}", str(named[option])))
    with pytest.raises(UserError, match=f"which --{name} names"), claim_run_folder(run):
        pass
    assert files_of(finished) == before
    shutil.rmtree(finished / "inputs")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_does_not_replace_what_another_process_works_on(
    when: str, words: Words, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    before = files_of(folder)
    inner = parse_arguments(FinetuneRun, words(folder / "inner"))
    outer = parse_arguments(FinetuneRun, words(folder, "--overwrite_output_dir"))
    first, second = (inner, outer) if when == "before" else (outer, inner)
    (folder / "inner").mkdir()
    (folder / "inner" / "run.lock").touch()  # as a killed run leaves it
    with (
        pytest.raises(UserError, match="another process works on .*inner"),
        claim_run_folder(first) as one,
        claim_run_folder(second),
    ):
        one.start(one.run)
    assert before.items() <= files_of(folder).items()


def test_a_checkpoint_by_a_link_is_the_one_it_points_to(
    words: Words, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(finished / "checkpoint-1")
    run = parse_arguments(FinetuneRun, words(tmp_path / "on", "--resume_from_checkpoint", str(tmp_path / "link")))
    with claim_run_folder(run) as folder:
        assert folder.checkpoint == (finished / "checkpoint-1").resolve()
    more = words(tmp_path / "on", "--resume_from_checkpoint", str(tmp_path / "link"), "--learning_rate", "0.1")
    with pytest.raises(UserError, match="learning_rate"), claim_run_folder(parse_arguments(FinetuneRun, more)):
        pass
    shutil.copytree(finished / "checkpoint-1", tmp_path / "best")
    named = parse_arguments(FinetuneRun, words(tmp_path / "on", "--resume_from_checkpoint", str(tmp_path / "best")))
    with pytest.raises(UserError, match="its name does not give the step"), claim_run_folder(named):
        pass
    (tmp_path / "best").rename(tmp_path / "checkpoint-1")
    alone = words(tmp_path / "on", "--resume_from_checkpoint", str(tmp_path / "checkpoint-1"))
    capsys.readouterr()
    with claim_run_folder(parse_arguments(FinetuneRun, alone)):
        assert "holds no run.json: whether data and settings" in capsys.readouterr().out


def test_what_a_killed_run_left_before_it_began_is_taken_again(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_choice, "OUTPUT", tmp_path)
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "run.lock").touch()
    with claim_run_folder(parse_arguments(FinetuneRun, words(None))) as folder:
        assert folder.path == tmp_path / "finetune"
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_data_leaves_no_folder(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": 1}\n', encoding="utf-8")
    folder = tmp_path / "new" / "run"
    with pytest.raises(SystemExit, match="2"):
        finetune(words(folder, "--train_files", str(tmp_path / "rows.jsonl")))
    assert "rows.jsonl:1" in capsys.readouterr().err
    assert not folder.parent.exists()


def test_two_runs_into_one_folder_are_refused(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with claim_run_folder(parse_arguments(FinetuneRun, words(folder))):
        for more in ([], ["--overwrite_output_dir"], ["--resume", "False"]):
            with pytest.raises(SystemExit, match="2"):
                finetune(words(folder, *more))
            assert f"another process trains into {folder}" in capsys.readouterr().err
    assert not folder.exists()


def test_only_the_run_that_was_seen_is_replaced(finished: Path, words: Words) -> None:
    (finished / "predict").mkdir()
    run = parse_arguments(FinetuneRun, words(finished, "--overwrite_output_dir"))
    before = files_of(finished)
    with pytest.raises(UserError, match="was changed by something else.*: predict/scores.json"), ExitStack() as stack:
        folder = stack.enter_context(claim_run_folder(run))
        (finished / "predict" / "scores.json").write_text("{}")
        folder.start(folder.run)
    assert files_of(finished).items() >= before.items()
    (finished / "predict" / "scores.json").unlink()
    (finished / "predict").rmdir()


def test_a_folder_that_was_taken_away_is_not_written_into(words: Words, tmp_path: Path) -> None:
    """Another run may have made it anew."""
    run = parse_arguments(FinetuneRun, words(tmp_path / "run"))
    with pytest.raises(UserError, match="was moved or deleted"), ExitStack() as stack:
        folder = stack.enter_context(claim_run_folder(run))
        shutil.rmtree(tmp_path / "run")
        stack.enter_context(claim_run_folder(parse_arguments(FinetuneRun, words(tmp_path / "run"))))
        folder.start(folder.run)


def test_a_run_that_goes_on_begins_without_the_results_of_an_attempt_before(
    finished: Path, words: Words, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    description = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(description | {"status": "running"}), encoding="utf-8")
    assert all((folder / name).is_file() for name in RESULT_FILES)
    run = parse_arguments(FinetuneRun, words(folder))
    with claim_run_folder(run) as claimed:
        assert claimed.checkpoint == folder / "checkpoint-2"
        claimed.start(claimed.run)
    assert not any((folder / name).exists() for name in RESULT_FILES)


def test_a_finished_run_is_not_even_touched(finished: Path, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(finished)
    (finished / "run.lock").unlink()
    before.pop(finished / "run.lock")
    for more in ([], ["--resume"], ["--overwrite_output_dir", "--max_length", "1"]):
        with pytest.raises(SystemExit, match="2"):
            finetune(words(finished, *more))
        assert "Traceback" not in capsys.readouterr().err
        assert files_of(finished) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_holds_the_run(
    there: bool, finished: Path, words: Words, tmp_path: Path
) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    link.symlink_to(target)
    if there:
        target.mkdir(parents=True)
        (target / "run.json").write_text((finished / "run.json").read_text("utf-8"), encoding="utf-8")
        (target / "checkpoint-9").mkdir()
    finetune(words(link, "--overwrite_output_dir", "--save_strategy", "no"))
    assert link.is_symlink() and status_of(target) == "finished"
    assert (target / "model.safetensors").is_file() and not (target / "checkpoint-9").exists()


DAMAGED = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "cut off": b'{"pipeline": "finetune", "status": "fin',
    "UTF-16": '{"pipeline": "finetune"}'.encode("utf-16"),
    "GBK": '{"pipeline": "微调"}'.encode("gbk"),
    "another shape": b'{"pipeline": ["finetune"], "status": "finished", "finished": "3000"}',
    "null for a word": b'{"pipeline": "finetune", "status": null}',
    "a date of another kind": b'{"pipeline": "finetune", "status": "finished", "finished": {"at": 3000}}',
    "arguments in a list": b'{"pipeline": "finetune", "status": "running", "arguments": [1]}',
    "training in a list": b'{"pipeline": "finetune", "status": "running", "arguments": {"training": [1]}}',
    "words for sizes": b'{"arguments": {"training": {"per_device_train_batch_size": "4"}}}',
    "no sizes": b'{"pipeline": "finetune", "status": "running", "arguments": {"training": {}}}',
    "hashes in a list": b'{"pipeline": "finetune", "status": "running", "data_sha256": ["a"]}',
    "no processes": b'{"pipeline": "finetune", "status": "running", "processes": 0}',
    "data of another shape": b'{"data": [{"role": "train_files"}]}',
    "resumed once": b'{"pipeline": "finetune", "resumed": "yes"}',
    "deep": b"[" * 200_000,
    "a long number": b'{"seed": ' + b"9" * 5000 + b"}",
}  # fmt: skip
INCOMPLETE = {
    "an object": b"{}",
    "a pipeline alone": b'{"pipeline": "finetune"}',
    "no pipeline": b'{"status": "finished", "finished": "3000"}',
    "no date": b'{"pipeline": "finetune", "status": "stopped"}',
    "no arguments": b'{"pipeline": "finetune", "status": "running", "model": "m", "processes": 1}',
    "no training": b'{"pipeline": "finetune", "arguments": {"data": {}}}',
    "a mark of byte order": b'\xef\xbb\xbf{"pipeline": "finetune", "status": "running"}',
}


@pytest.mark.parametrize("name", [*DAMAGED, *INCOMPLETE])
def test_a_damaged_run_json_is_told_in_a_line_and_disturbs_no_other(
    name: str, finished: Path, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_choice, "OUTPUT", tmp_path)
    folder = tmp_path / "finetune"
    folder.mkdir()
    (folder / "run.json").write_bytes({**DAMAGED, **INCOMPLETE}[name])
    if name in DAMAGED:
        with pytest.raises(UserError, match="run.json cannot be read: "):
            read_run_record(folder)
    before = files_of(folder)
    with pytest.raises(UserError, match="run"):
        preview_run_folder(parse_arguments(FinetuneRun, words(folder)))
    with claim_run_folder(parse_arguments(FinetuneRun, words(None))) as unnamed:
        assert unnamed.path == tmp_path / "finetune-2"
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "run.json").write_bytes((finished / "run.json").read_bytes())
    assert newest_finetuning(tmp_path) == tmp_path / "good"
    assert files_of(folder) == before


def test_a_huge_run_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(60 * 10**9)
    with pytest.raises(UserError, match="60000000000 bytes are too many for a run record"):
        read_run_record(tmp_path)
