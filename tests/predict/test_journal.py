"""Answers survive: what was written is read again, a line cut off is not, another prediction's never are."""

import json
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from novelgpt.inference.generation import Answer
from novelgpt.settings.errors import UserError
from predict.journal import Journal
from tests.warm_python import WarmProcess, start_warm

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {3: Answer("雨停了。\u2028", "stop", 5), 0: Answer("", "length", 8), 7: Answer("灯\n亮", "stop", 3, 9)}


def test_answers_are_read_again(tmp_path: Path) -> None:
    with Journal(tmp_path, "one") as journal:
        journal.add({3: ANSWERS[3]})
        journal.add({0: ANSWERS[0], 7: ANSWERS[7]})
    with Journal(tmp_path, "one") as again:
        assert again.answers == ANSWERS
        again.remove()
    with Journal(tmp_path, "one") as empty:
        assert empty.answers == {}


def test_each_process_reads_what_all_have_written(tmp_path: Path) -> None:
    with Journal(tmp_path, "one", 0) as first, Journal(tmp_path, "one", 1) as second:
        first.add({3: ANSWERS[3]})
        second.add({7: ANSWERS[7]})
    with Journal(tmp_path, "one", 0) as alone:
        assert alone.answers == {3: ANSWERS[3], 7: ANSWERS[7]}


def test_the_first_process_reads_in_the_end_what_the_others_wrote_meanwhile(tmp_path: Path) -> None:
    with Journal(tmp_path, "one", 0) as first, Journal(tmp_path, "one", 1) as second:
        first.add({3: ANSWERS[3]})
        second.add({0: ANSWERS[0]})
        second.add({7: ANSWERS[7]})
        assert first.answers == {3: ANSWERS[3]}
        first.read_others()
        assert first.answers == ANSWERS and (7 in first.answers, 8 in first.answers) == (True, False)


def test_a_row_that_is_answered_twice_has_the_last_answer(tmp_path: Path) -> None:
    with Journal(tmp_path, "one") as journal:
        journal.add({5: ANSWERS[3]})
        assert journal.answers[5] == ANSWERS[3]
        journal.add({5: ANSWERS[7]})
        assert journal.answers == {5: ANSWERS[7]} and len(journal.answers) == 1


def test_wherever_the_file_is_cut_what_was_complete_is_kept_and_the_rest_written_again(tmp_path: Path) -> None:
    with Journal(tmp_path, "one") as journal:
        journal.add(ANSWERS)
    path = tmp_path / "predictions.partial" / "0.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(tmp_path, "one") as journal:
            assert len(journal.answers) == max(0, whole[:cut].count(b"\n") - 1)
            journal.add({number: one for number, one in ANSWERS.items() if number not in journal.answers})
        with Journal(tmp_path, "one") as journal:
            assert journal.answers == ANSWERS


def test_another_predictions_answers_are_not_taken(tmp_path: Path) -> None:
    with Journal(tmp_path, "one", 1) as journal:
        journal.add(ANSWERS)
    with Journal(tmp_path, "another", 0) as journal:
        assert journal.answers == {}
        journal.add({1: ANSWERS[3]})
    with Journal(tmp_path, "another", 1) as journal:
        assert journal.answers == {1: ANSWERS[3]}


def test_a_full_disk_keeps_the_answers_before_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path, "one")
    try:
        with pytest.raises(UserError, match="cannot be written: File too large") as refusal, journal:
            journal.add({3: ANSWERS[3]})
            resource.setrlimit(resource.RLIMIT_FSIZE, (journal.file.tell() + 10, before[1]))
            journal.add({0: ANSWERS[0]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "resumes from the answers that are kept" in refusal.value.remedy
    with Journal(tmp_path, "one") as again:
        assert again.answers == {3: ANSWERS[3]}
        again.add({0: ANSWERS[0], 7: ANSWERS[7]})
    with Journal(tmp_path, "one") as whole:
        assert whole.answers == ANSWERS


def test_two_predictions_at_once_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, "one"), pytest.raises(UserError, match="another prediction writes into"):
        Journal(tmp_path, "one")


def test_what_another_prediction_removes_as_it_ends_is_not_written_into(tmp_path: Path) -> None:
    """It ends when this one has opened the file, and would lock it next."""
    ending = Journal(tmp_path, "one")

    def end() -> None:
        ending.remove()
        ending.__exit__(None, None, None)

    armed = [end]
    sys.addaudithook(lambda event, _: armed.pop()() if event == "fcntl.flock" and armed else None)
    with Journal(tmp_path, "one") as journal:
        journal.add(ANSWERS)
    assert not armed
    with Journal(tmp_path, "one") as again:
        assert again.answers == ANSWERS


def command(base_folder: Path, output: Path) -> list[str]:
    words = ["--model", str(base_folder), "--max_rows", "18", "--max_new_tokens", "30", "--batch_size", "2"]
    return ["-m", "predict", *words, "--do_sample", "--output_dir", str(output)]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_never_was(base_folder: Path, tmp_path: Path) -> None:
    """kill -9 at 10 moments, in one prediction; drawn answers, which depend on their batch."""

    def start(name: str) -> WarmProcess:
        return start_warm(command(base_folder, tmp_path / name), {}, tmp_path / "log")

    assert start("whole").wait() == 0, (tmp_path / "log").read_text()
    expected = (tmp_path / "whole" / "predictions.jsonl").read_text(encoding="utf-8")
    generator = random.Random(20240610)
    journal = tmp_path / "killed" / "predictions.partial" / "0.jsonl"
    killed_in_between = 0
    for _ in range(10):
        process = start("killed")
        before = journal.stat().st_size if journal.exists() else 0
        # Until it has written something more, or has ended; then a moment that may fall into the next write.
        while process.poll() is None and (not journal.exists() or journal.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(generator.random() * 0.2)
        if process.poll() is None:
            process.signal(signal.SIGKILL)
            killed_in_between += 1
        process.wait()
        if (tmp_path / "killed" / "predictions.jsonl").exists():
            break
    assert killed_in_between >= 3
    assert start("killed").wait() == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "killed" / "predictions.jsonl").read_text(encoding="utf-8") == expected
    assert not (tmp_path / "killed" / "predictions.partial").exists()
    scores = [json.loads((tmp_path / name / "scores.json").read_text(encoding="utf-8")) for name in ("whole", "killed")]
    assert scores[0]["rouge1_char_count"] == scores[1]["rouge1_char_count"]
