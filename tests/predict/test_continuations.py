"""Continuing held-out novels: whose text the rows hold, where they begin and end, and their way through prediction."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from dataset.__main__ import main as dataset_main
from dataset.sources import find_row_sources
from novelgpt.scoring.row_scores import ScoredRow, score_row
from novelgpt.scoring.text_scores import repetition_scores
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.encoding import encode
from predict.__main__ import main as predict_main
from predict.continuations import (
    Book,
    BookChapter,
    ContinuationSettings,
    choose,
    find_passages,
    main,
    reference_from,
    rows_of,
)
from predict.rows import read_prompt_rows
from predict.score import main as score_main

NOVELS = sorted((SAMPLES / "novels").glob("*.txt"))
SHORT = ["--lengths", "100", "300", "--prompt_characters", "400"]


def make(tmp_path: Path, *words: str, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    """What the command writes; `words` come first."""
    main([words[0], str(tmp_path / name), *words[1:]])
    return read(tmp_path / name)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def novel(chapters: int, paragraphs: int) -> list[BookChapter]:
    """Chapters of paragraphs of 50 characters, all different."""
    return [
        BookChapter(
            f"第{c}章", "".join(f"第{c:03d}章第{p:03d}段" + "话" * 38 + "。\n" for p in range(paragraphs)), True
        )
        for c in range(chapters)
    ]


def test_a_row_is_a_passage_of_the_book_and_what_follows_it(tmp_path: Path) -> None:
    rows = make(tmp_path, str(NOVELS[0]), *SHORT, "--per_book", "5")
    text = NOVELS[0].read_text(encoding="utf-8")
    assert len(rows) == 10
    for row in rows:
        place = text.index(row["text_prompt"])
        end = place + len(row["text_prompt"])
        assert text[end:].startswith(row["text_completion"])
        assert row["text_prompt"].endswith("\n") and len(row["text_prompt"]) <= 400
        assert row["scored_characters"] == len(row["text_completion"])
        assert row["text_completion"][-1] in "。！？…”" or row["scored_characters"] == int(row["score_group"])
        assert abs(row["scored_characters"] - int(row["score_group"])) <= 0.1 * int(row["score_group"])
    # The same places at each length, and no text in two of them.
    prompts = [row["text_prompt"] for row in rows if row["score_group"] == "100"]
    assert prompts == [row["text_prompt"] for row in rows if row["score_group"] == "300"]
    spans = sorted((text.index(prompt), text.index(prompt) + len(prompt) + 330) for prompt in prompts)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_seed_alone_chooses(tmp_path: Path) -> None:
    words = [str(NOVELS[0]), *SHORT, "--per_book", "3"]
    first = make(tmp_path, *words)
    assert make(tmp_path, *words, name="again.jsonl") == first
    assert make(tmp_path, *words, "--seed", "7", name="other.jsonl") != first
    (tmp_path / "named_otherwise.txt").write_bytes(NOVELS[0].read_bytes())
    other = make(tmp_path, str(tmp_path / "named_otherwise.txt"), *words[1:], name="named_otherwise.jsonl")
    assert [row["text_prompt"] for row in other] != [row["text_prompt"] for row in first]
    # A further book changes nothing.
    main([*map(str, NOVELS), str(tmp_path / "both.jsonl"), *words[1:]])
    assert read(tmp_path / "both.jsonl")[: len(first)] == first


def test_rows_begin_with_chapters_and_long_chapters_hold_several() -> None:
    asking = ContinuationSettings((1000,), 500, per_book=3)
    assert asking.needed == 1600
    book = Book.of("甲", novel(20, 20))  # 1,000 characters a chapter: every second one is free
    found, short = find_passages(book, asking)
    assert [place.chapter for place in found] == [f"第{number}章" for number in range(0, 18, 2)] + ["第18章"]
    assert [book.text[place.start :][:5] for place in found] == [f"第{number:03d}章" for number in range(0, 20, 2)]
    assert short == 1
    # One chapter of a whole book.
    found, short = find_passages(Book.of("乙", novel(1, 320)), asking)
    assert [place.start for place in found] == list(range(0, 16000, 1600)) and short == 0
    # One of each third.
    rows, _ = rows_of(book, asking)
    assert [int(row["id"].split("/")[1]) // 6667 for row in rows] == [0, 1, 2]


def test_no_row_reaches_over_a_missing_chapter() -> None:
    chapters = novel(9, 20)
    chapters[4] = chapters[4]._replace(follows=False)
    book = Book.of("甲", chapters)
    asking = ContinuationSettings((1000,), 500)
    found, short = find_passages(book, asking)
    assert [place.chapter for place in found] == ["第0章", "第2章", "第4章", "第6章"]
    assert short == 2  # chapters 3 and 8


def test_chapters_left_out_of_a_prepared_folder_are_gaps(tmp_path: Path) -> None:
    numbers = [1, 2, 4, 5, 6]
    lines = [
        json.dumps({"text": chapter.text, "book": "甲", "chapter": str(number), "source": f"甲.txt#{number}"})
        for number, chapter in zip(numbers, novel(5, 20), strict=True)
    ]
    (tmp_path / "chapters.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = make(tmp_path, str(tmp_path / "chapters.jsonl"), "--lengths", "1000", "--prompt_characters", "500")
    assert [row["chapter"] for row in rows] == ["1", "4"]
    rows = make(tmp_path, str(tmp_path / "chapters.jsonl"), "--lengths", "2000", "--prompt_characters", "500")
    assert [row["chapter"] for row in rows] == ["4"]


def test_all_places_where_there_are_few() -> None:
    found, _ = find_passages(Book.of("甲", novel(8, 20)), ContinuationSettings((1000,), 500))
    assert choose(found, 100, random.Random(0)) == found


@pytest.mark.parametrize(
    ("text", "length", "reference"),
    [
        ("话" * 95 + "。" + "话" * 10 + "。", 100, "话" * 95 + "。"),
        ("话" * 95 + "。”" + "话" * 2 + "？！”\n\n话", 100, "话" * 95 + "。”" + "话" * 2 + "？！”"),
        ("话" * 200, 100, "话" * 100),
        ("话" * 80 + "。" + "话" * 200, 100, "话" * 80 + "。" + "话" * 19),
        ("话" * 98 + "\n" + "话" * 200, 100, "话" * 98),
    ],
)
def test_references_end_with_a_sentence_where_one_ends_near(text: str, length: int, reference: str) -> None:
    assert reference_from(text, 0, length) == reference


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_of_a_prepared_folder_only_the_held_out_part_is_read(kind: str, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "novels"
    raw.mkdir()
    for file in NOVELS:
        (raw / file.name).write_bytes(file.read_bytes())
    dataset_main(["novels", str(raw), str(out), "--held_out", NOVELS[0].stem, "--format", kind, "--workers", "1"])
    rows = make(tmp_path, str(out), *SHORT)
    assert {row["book"] for row in rows} == {NOVELS[0].stem}
    assert {row["chapter"][:1] for row in rows} == {"第"}
    training = out / f"train-00000.{kind}"
    texts = (
        pyarrow.parquet.read_table(training)["text"].to_pylist() if kind == "parquet"
        else [row["text"] for row in read(training)]
    )  # fmt: skip
    assert texts and not any(row["text_completion"] in text for row in rows for text in texts)

    (out / "manifest.json").unlink()
    with pytest.raises(SystemExit):
        make(tmp_path, str(out))


def test_asked_in_a_conversation(tmp_path: Path) -> None:
    plain = make(tmp_path, str(NOVELS[0]), *SHORT, "--per_book", "2")
    asked = make(tmp_path, str(NOVELS[0]), *SHORT, "--per_book", "2", "--ask", "chat", name="chat.jsonl")
    for raw, row in zip(plain, asked, strict=True):
        question, answer = row["messages"]
        assert (
            raw["text_prompt"].rstrip("\n") in question["content"]
            and f"约{row['score_group']}字" in question["content"]
        )
        assert answer == {"role": "assistant", "content": raw["text_completion"]}
        assert {name: raw[name] for name in raw if name in row} == {name: row[name] for name in row if name in raw}


def test_the_prompt_is_raw_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = make(tmp_path, str(NOVELS[0]), *SHORT, "--per_book", "2")
    rows = read_prompt_rows(find_row_sources([str(tmp_path / "rows.jsonl")]), tokenizer, None)
    for row, record in zip(rows, made, strict=True):
        assert row.prompt_ids == encode(record["text_prompt"], tokenizer)
        encoded = row.encoded_reference(tokenizer)
        assert encoded is not None
        reference = encode(record["text_completion"], tokenizer)
        assert encoded.input_ids == row.prompt_ids + reference
        assert encoded.labels == [IGNORE_INDEX] * len(row.prompt_ids) + reference


@pytest.mark.parametrize("field", [{"text_prompt": ""}, {"text_prompt": 7}, {"text_completion": [1]}])
def test_a_plain_row_without_text_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    row = {"text_prompt": "话", "text_completion": "说", **field}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match="rows.jsonl:1"):
        read_prompt_rows(find_row_sources([str(tmp_path / "rows.jsonl")]), None, None)


@pytest.mark.parametrize("field", [{"score_group": 7}, {"scored_characters": 0}, {"scored_characters": "7"}])
def test_a_field_of_scores_of_another_kind_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text_prompt": "话", **field}), encoding="utf-8")
    with pytest.raises(UserError, match=next(iter(field))):
        read_prompt_rows(find_row_sources([str(tmp_path / "rows.jsonl")]), None, None)


def test_through_prediction_each_length_has_scores_of_its_own(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    made = make(tmp_path, str(NOVELS[0]), "--lengths", "5", "60", "--prompt_characters", "80", "--per_book", "3")
    words = ["--model", str(base_folder), "--data_files", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "12"]
    predict_main([*words, "--output_dir", str(tmp_path / "out")])
    predictions, rows = (read(tmp_path / "out" / name) for name in ("predictions.jsonl", "row_scores.jsonl"))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert list(scores["groups"]) == ["5", "60"]
    for prediction, row, record in zip(predictions, rows, made, strict=True):
        assert prediction["reference"] == record["text_completion"]
        assert row["score_group"] == prediction["score_group"] == record["score_group"]
        # As long as the reference at most, which is what a human wrote at this length.
        text = prediction["prediction"][: len(record["text_completion"])]
        expected = score_row(ScoredRow(text, record["text_completion"]))
        assert {name: row[name] for name in expected} == expected
        human = repetition_scores(record["text_completion"])
        assert {name: row[f"reference_{name}"] for name in human} == human
        assert row["cut"] == (len(prediction["prediction"]) > record["scored_characters"])
    assert {row["cut"] for row in rows} == {0.0, 1.0}
    for name, group in scores["groups"].items():
        members = [row for row in rows if row["score_group"] == name]
        assert group["rows"] == len(members) == 3
        for score in ("rouge-1", "rep4_char", "reference_rep4_char", "prediction_characters"):
            assert group[score] == pytest.approx(sum(row[score] for row in members) / 3, rel=1e-12)
            low, high = group["intervals"][score]
            assert low <= group[score] <= high
        nats = sum(row["reference_nats"] for row in members)
        assert group["loss"] == pytest.approx(nats / sum(row["reference_tokens"] for row in members), rel=1e-12)
    shown = capsys.readouterr().out
    assert "Scores of each group" in shown
    line = next(line for line in shown.split("Scores of each group")[1].splitlines() if " rep4_char" in line)
    told = [
        f"{group[name]:.4f}" for group in scores["groups"].values() for name in ("rep4_char", "reference_rep4_char")
    ]
    assert line.replace("│", " ").split()[1:] == told

    score_main([str(tmp_path / "out" / "predictions.jsonl"), "--output", str(tmp_path / "again" / "scores.json")])
    again = json.loads((tmp_path / "again" / "scores.json").read_text(encoding="utf-8"))
    for name, group in again["groups"].items():
        assert {key: scores["groups"][name][key] for key in group if key != "intervals"} == {
            key: group[key] for key in group if key != "intervals"
        }


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["{novel}", "{out}", "--lengths", "0"], "--lengths 0"),
        (["{novel}", "{out}", "--lengths", "90000"], "no passage in"),
        (["{novel}", "{novel}"], "is not a .jsonl file"),
        (["{folder}", "{out}"], "has no manifest.json"),
        (["{out}", "{out}"], "No such file"),
    ],
)
def test_what_cannot_be_is_said(
    words: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"novel": NOVELS[0], "out": tmp_path / "rows.jsonl", "folder": tmp_path}
    with pytest.raises(SystemExit) as caught:
        main([word.format(**paths) for word in words])
    assert caught.value.code == 2
    assert cause in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "rows.jsonl").exists()
