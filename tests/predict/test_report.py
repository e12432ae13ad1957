"""The report: its figures are those of scores.json, its examples those of the files; what does not fit is an error."""

import json
import math
import random
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from novelgpt.scoring.summary import compare_rows
from novelgpt.settings.errors import UserError
from predict.predictions import ScoringFields
from predict.report.__main__ import main
from predict.report.runs import read_runs
from predict.score import main as score
from tests.predict.scored_runs import noised, papers, predict_folder, three_runs

HOSTILE = '<script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">"\'&'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return three_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    main([*map(str, runs), "--output", str(folder)])
    return folder / "report.html"


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    body = page.split("<body>")[1]
    return unescape(re.sub(r"<[^>]*>", "", body))


def test_every_score_and_interval_in_the_table_is_that_of_scores_json(runs: list[Path], report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    cells = re.findall(
        r'<data value="([^"]+)" data-metric="([^"]+)" data-run="(\d)"(?: data-group="([^"]+)")?>([^<]+)</data>'
        r'(?:<span class="interval">([^<]+)</span>)?',
        page,
    )
    shown: dict[tuple[str, str], set[str]] = {}
    for value, metric, run, group, text, interval in cells:
        scores = json.loads((runs[int(run)] / "predict" / "scores.json").read_text(encoding="utf-8"))
        scores = scores["groups"][group] if group else scores
        digits = len(text.partition(".")[2])
        assert float(value) == scores[metric]
        assert text == f"{scores[metric]:,.{digits}f}"
        ends = scores["intervals"][metric]
        assert interval == (" – ".join(f"{end:,.{digits}f}" for end in ends) if math.isfinite(ends[0]) else "")
        shown.setdefault((run, group), set()).add(metric)
    for number, run in enumerate(runs):
        scores = json.loads((run / "predict" / "scores.json").read_text(encoding="utf-8"))
        wanted = {name for name in scores["intervals"] if not name.startswith("reference_")}
        assert shown[str(number), ""] == wanted
        assert {group for place, group in shown if place == str(number) and group} == {"500", "1000"}
        for name in wanted:
            assert scores["definitions"][name] in unescape(page)


def test_the_best_run_is_marked(runs: list[Path], report: Path) -> None:
    table = report.read_text(encoding="utf-8").split("</table>")[0]
    stars = re.findall(r'★</b><data value="[^"]+" data-metric="([^"]+)" data-run="(\d)"', table)
    best: dict[str, list[int]] = {}
    for metric, run in stars:
        best.setdefault(metric, []).append(int(run))
    scores = [json.loads((run / "predict" / "scores.json").read_text(encoding="utf-8")) for run in runs]

    def smallest(distances: list[float]) -> list[int]:
        return [number for number, distance in enumerate(distances) if distance == min(distances)]

    assert best["rouge-l"] == smallest([-one["rouge-l"] for one in scores])
    assert best["perplexity"] == smallest([one["perplexity"] for one in scores[:2]])  # the server knows none
    for name in ("compression_ratio", "distinct2_char"):
        assert best[name] == smallest([abs(one[name] - one[f"reference_{name}"]) for one in scores])
    assert "first_loop_char" not in best and "looped" not in best  # no better side; all alike


def test_the_comparison_is_that_of_compare_rows(runs: list[Path], report: Path) -> None:
    sides = [
        [json.loads(line) for line in (run / "predict" / "row_scores.jsonl").read_bytes().splitlines()] for run in runs
    ]
    page = report.read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    tables = page.split('<table class="compared">')[1:]
    assert len(tables) == 2
    for table, other in zip(tables, sides[1:], strict=True):
        rows = {}
        for verdict, row in re.findall(r'<tr class="(\w+)">(.*?)</tr>', table.split("</table>")[0], re.DOTALL):
            name = re.search(r'href="#def-([^"]+)"', row)
            rows[name and name[1]] = [verdict, *re.findall(r'<td class="number"[^>]*>([^<]*)</td>', row)]
        wanted = [one for one in compare_rows(sides[0], other) if not one.name.startswith("reference_")]
        assert rows.keys() == {one.name for one in wanted}
        for one in wanted:
            verdict, first, second, difference, ends, _ = rows[one.name]
            digits = len(first.partition(".")[2])
            assert [first, second] == [f"{value:.{digits}f}" for value in (one.first, one.second)]
            assert float(difference) == float(f"{one.second - one.first:.{digits}f}")
            assert [float(end) for end in ends.split(" to ")] == [round(one.low, digits), round(one.high, digits)]
            assert (verdict == "same") == (one.p_value >= 0.05)
        assert rows["rouge-l"][0] == "worse"


def test_the_same_runs_give_the_same_bytes(runs: list[Path], report: Path, tmp_path: Path) -> None:
    main([*map(str, runs), "--output", str(tmp_path)])
    names = sorted(path.name for path in (report.parent / "report").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "report").iterdir())
    assert len(names) == 9
    assert (tmp_path / "report.html").read_bytes() == report.read_bytes()
    for name in names:
        assert (tmp_path / "report" / name).read_bytes() == (report.parent / "report" / name).read_bytes()


def test_one_run_goes_beside_its_predictions(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "server"
    shutil.copytree(runs[2], run)
    (run / "predict" / "report").mkdir()
    (run / "predict" / "report" / "losses.png").write_bytes(b"of an earlier report")
    (run / "predict" / "report" / "mine.png").write_bytes(b"of the user")
    main([str(run)])
    page = (run / "predict" / "report.html").read_text(encoding="utf-8")
    assert "Paired comparison" not in page
    assert "No perplexity for server" in text_of(page)
    names = {path.name for path in (run / "predict" / "report").iterdir()}
    assert "mine.png" in names and "scores.png" in names
    assert not {"losses.png", "perplexity_histogram.png"} & names


def test_examples_show_the_reference_and_every_run_with_marks(runs: list[Path], report: Path) -> None:
    page = report.read_text(encoding="utf-8").split('<section id="examples">')[1].split("</section>")[0]
    articles = page.split('<article class="example">')[1:]
    files = [(run / "predict" / "predictions.jsonl").read_bytes().splitlines() for run in runs]
    by_id = [{entry["id"]: entry for entry in map(json.loads, lines)} for lines in files]
    assert 9 <= len(articles) <= 12
    for article in articles:
        name = re.search(r'<span class="id">([^<]+)</span>', article)
        bodies = re.findall(r'<div class="body"[^>]*>(.*?)</div>', article, re.DOTALL)
        shown = [unescape(re.sub(r"<[^>]*>", "", body)) for body in bodies]
        assert name
        assert shown == [by_id[0][name[1]]["reference"], *(run[name[1]]["prediction"] for run in by_id)]
        assert unescape(article).count("cut off 截断") == 3 * (int(by_id[0][name[1]]["finish_reason"] == "length"))
        assert ('<mark class="repeat loop">' in article) == (by_id[0][name[1]]["finish_reason"] == "length")
    assert '<mark class="overlap">' in articles[0]


def test_hostile_texts_are_escaped(tmp_path: Path) -> None:
    rows = [
        (HOSTILE, HOSTILE, HOSTILE * 2),
        ("b\u202e", "\x00\x1b[31m", "好" * 40),
        ("c", "𠮷😀", "a"),
        ("d", "", "乙"),
    ]
    answers = {0: HOSTILE * 9, 1: "\ud800半个字\x07", 2: "", 3: "👩‍👩‍👧‍👦" * 30}
    folder = predict_folder(tmp_path / "x<b>$x$" / "predict", rows, predictions=answers)
    main([str(folder), "--output", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and 'src="http' not in page and "<b>$x" not in page
    assert "\x00" not in page and "\u202e" not in page and "\\u{202e}" in page
    assert HOSTILE in text_of(page)


def test_rows_without_references_get_a_sentence(tmp_path: Path) -> None:
    folder = predict_folder(tmp_path / "predict", [(name, prompt, "") for name, prompt, _ in papers()])
    main([str(folder)])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "has a reference" in text_of(page) and "没有参考答案" in page
    assert {path.stem for path in (folder / "report").iterdir()} == {"repetition_by_position"}
    assert "Most repetition" in page


@pytest.mark.parametrize("answer", ["", pytest.param("好" * 30, marks=pytest.mark.long)])
def test_a_single_row_makes_a_report(tmp_path: Path, answer: str) -> None:
    folder = predict_folder(tmp_path / "predict", [("only", "问", "好")], predictions={0: answer})
    main([str(folder)])
    page = text_of((folder / "report.html").read_text(encoding="utf-8"))
    assert ("(empty 空)" in page) == (answer == "")


def test_runs_on_other_rows_are_not_compared(runs: list[Path], tmp_path: Path) -> None:
    other = predict_folder(tmp_path / "other", papers()[::-1][:10])
    main([str(runs[0]), str(other), "--output", str(tmp_path)])
    page = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.count("The two runs answer different rows") == 1
    assert "scores are better" not in page


def test_rows_in_another_order_are_compared_row_by_row(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "reversed"
    shutil.copytree(runs[0] / "predict", folder)
    for name in ("predictions.jsonl", "row_scores.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[::-1]), encoding="utf-8")
    main([str(runs[0]), str(folder), "--output", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = page.split('<table class="compared">')[1].split("</table>")[0]
    # The same predictions: no difference, and none in any draw of rows.
    assert set(re.findall(r"0\.0+ to 0\.0+|[+\N{MINUS SIGN}][\d.]+", table)) <= {
        f"{zero} to {zero}" for zero in ("0.0", "0.00", "0.000", "0.0000")
    }
    for article in page.split('<article class="example">')[1:]:
        _, first, second = re.findall(r'<div class="body"[^>]*>(.*?)</div>', article, re.DOTALL)
        assert first == second


def test_only_what_is_scored_of_a_prediction_is_shown(tmp_path: Path) -> None:
    scoring = {0: ScoringFields(scored_characters=10)}
    folder = predict_folder(tmp_path / "predict", papers()[:1], scoring=scoring, predictions={0: "甲" * 10 + "乙" * 99})
    main([str(folder)])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "甲" * 10 in text_of(page) and "乙乙" not in page


def break_line(folder: Path) -> None:
    (folder / "row_scores.jsonl").write_text("{\n", encoding="utf-8")


def drop_row(folder: Path) -> None:
    path = folder / "predictions.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(True)[1:]), encoding="utf-8")


def other_text(folder: Path) -> None:
    path = folder / "predictions.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"prediction": "', '"prediction": "新'), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda folder: (folder / "scores.json").unlink(), "scores.json is missing"),
        (lambda folder: (folder / "row_scores.jsonl").unlink(), "row_scores.jsonl is missing"),
        (lambda folder: (folder / "predictions.jsonl").unlink(), "no predictions.jsonl in"),
        (lambda folder: (folder / "scores.json").write_text("{}"), "is not about the 3 rows"),
        (lambda folder: (folder / "scores.json").write_text("["), "is not JSON"),
        (break_line, "row_scores.jsonl:1: not JSON"),
        (drop_row, "is not what row_scores.jsonl was made of"),
        (other_text, "is not what row_scores.jsonl was made of"),
    ],
)
def test_files_that_do_not_fit_are_errors_of_two_lines(
    tmp_path: Path, spoil: Any, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = predict_folder(tmp_path / "predict", papers()[:3])
    spoil(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(folder)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert cause in error and error.count("\n") == 2
    assert not list(folder.glob("report*"))


def test_a_run_named_twice_and_too_many_are_errors(runs: list[Path]) -> None:
    with pytest.raises(UserError, match="named twice"):
        read_runs([runs[0], runs[0] / "predict"])
    with pytest.raises(UserError, match="too many"):
        read_runs([runs[0]] * 7)


def test_losses_after_a_resumption_replace_those_before(tmp_path: Path) -> None:
    folder = predict_folder(tmp_path / "predict", papers()[:2])
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_runs([folder])[0].losses == [lines[0], lines[3]]


def test_files_of_other_tools_are_runs_once_they_are_scored(tmp_path: Path) -> None:
    names = ("predict", "label")
    thought = "<think>\n先想想。\n</think>\n\n"
    entries = [{names[0]: noised(text, 0.3, random.Random(name)), names[1]: text} for name, _, text in papers()[:6]]
    thoughtful = [{name: thought + text for name, text in entry.items()} for entry in entries]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in thoughtful)
    file = tmp_path / "theirs" / "generated_predictions.jsonl"
    file.parent.mkdir()
    file.write_text(lines, encoding="utf-8")
    score([str(file)])
    main([str(file.parent)])
    page = (file.parent / "report.html").read_text(encoding="utf-8")
    assert all(entry[name] in text_of(page) for entry in entries[:1] for name in names)
    other = tmp_path / "others" / "answers.jsonl"
    other.parent.mkdir()
    other.write_text(lines, encoding="utf-8")
    score([str(other)])
    main([str(file), str(other), "--output", str(tmp_path)])
    assert "Paired comparison" in (tmp_path / "report.html").read_text(encoding="utf-8")
