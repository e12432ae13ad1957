"""The report: its figures are those of scores.json, its marks are right, and a browser shows all of it."""

import base64
import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from novelgpt.scoring.summary import compare_rows, reference_scores
from novelgpt.settings.errors import UserError
from predict.report import main, write_report
from predict.report_charts import LABELS
from predict.report_figures import find_chinese_font
from predict.report_runs import read_runs
from predict.score import score_predictions, scored_prediction, write_scores
from predict.scoring_fields import Scoring

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">"\'&'
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def papers() -> list[tuple[str, str, str]]:
    lines = (ROOT / "dataset" / "samples" / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:24]]
    return [(row["id"], row["title"], row["abstract"]) for row in rows]


def noised(text: str, share: float, chance: random.Random) -> str:
    return "".join(chance.choice(text) if chance.random() < share else character for character in text)


def predict_folder(
    folder: Path,
    rows: list[tuple[str, str, str]],
    share: float = 0.3,
    *,
    losses: bool = True,
    scoring: dict[int, Scoring] | None = None,
    predictions: dict[int, str] | None = None,
) -> Path:
    """A prediction folder as `python -m predict` writes it: every fourth answer ends in a loop."""
    chance = random.Random(str((folder.name, share)))
    entries, scored, sums = [], [], {}
    for number, (name, prompt, reference) in enumerate(rows):
        text = noised(reference or prompt, share, chance)[: 60 + 5 * number]
        looped = number % 4 == 1
        text = (predictions or {}).get(number, text + text[-9:] * 12 * looped)
        reason = "length" if looped else "stop"
        how = (scoring or {}).get(number, Scoring())
        entry = {"id": name, "prompt": prompt, "reference": reference, "prediction": text, "finish_reason": reason}
        entries.append(entry | {"prompt_tokens": len(prompt), "completion_tokens": len(text)} | how.fields())
        scored.append(scored_prediction(name, text, reference, how, reason))
        if losses and reference:
            tokens = max(1, len(reference) // 2)
            sums[number] = reference_scores([tokens * chance.uniform(1.5, 4.0), tokens, tokens // 3])
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (folder / "predictions.jsonl").write_text(lines, encoding="utf-8", errors="replace")
    write_scores(
        score_predictions(scored, sums, workers=1),
        folder / "scores.json",
        {"seconds": 1.5, "model": folder.parent.name, "generation": {"max_new_tokens": 64, "do_sample": False}},
    )
    return folder


def write_losses(run: Path, steps: int) -> None:
    entries: list[dict[str, float]] = [{"step": 0, "eval_loss": 5.0}]
    for step in range(1, steps + 1):
        entries.append({"step": step, "loss": 5.0 / step})
        entries += [{"step": step, "eval_loss": 5.5 / step}] * (step % 4 == 0)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run / "metrics.jsonl").write_text(lines + '{"step": 9, "lo', encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three run folders: two models, and a server that knows no loss; all answer the same rows."""
    root = tmp_path_factory.mktemp("runs")
    groups = {number: Scoring(score_group=str(500 * (1 + number % 2))) for number in range(24)}
    predict_folder(root / "full" / "predict", papers(), 0.2, scoring=groups)
    predict_folder(root / "小说_lora" / "predict", papers(), 0.4, scoring=groups)
    predict_folder(root / "server" / "predict", papers(), 0.6, losses=False, scoring=groups)
    write_losses(root / "full", 12)
    write_losses(root / "小说_lora", 9)
    return [root / name for name in ("full", "小说_lora", "server")]


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


def test_the_comparison_is_that_of_compare_rows(runs: list[Path], report: Path) -> None:
    sides = [
        [json.loads(line) for line in (run / "predict" / "row_scores.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in runs
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
    files = [(run / "predict" / "predictions.jsonl").read_text(encoding="utf-8").splitlines() for run in runs]
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


@pytest.mark.parametrize("answer", ["", "好" * 30])
def test_a_single_row_makes_a_report(tmp_path: Path, answer: str) -> None:
    folder = predict_folder(tmp_path / "predict", [("only", "问", "好")], predictions={0: answer})
    main([str(folder)])
    page = text_of((folder / "report.html").read_text(encoding="utf-8"))
    assert ("(empty 空)" in page) == (answer == "")


def test_runs_on_other_rows_are_not_compared(runs: list[Path], tmp_path: Path) -> None:
    other = predict_folder(tmp_path / "other", papers()[::-1][:10])
    reversed_rows = predict_folder(tmp_path / "reversed", papers()[::-1], 0.25)
    main([str(runs[0]), str(other), str(reversed_rows), "--output", str(tmp_path)])
    page = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.count("The two answer other rows") == 1
    assert page.count("scores are better") == 1


def test_only_what_is_scored_of_a_prediction_is_shown(tmp_path: Path) -> None:
    scoring = {0: Scoring(scored_characters=10)}
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
        (lambda folder: (folder / "scores.json").write_text("["), "is no JSON"),
        (break_line, "row_scores.jsonl:1: no JSON"),
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


@pytest.fixture(scope="module")
def english(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a machine without Chinese fonts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each letter that its fonts lack
        return write_report(read_runs(runs), tmp_path_factory.mktemp("english"), None)


def test_without_a_chinese_font_pictures_are_english_and_the_page_says_so(english: Path, tmp_path: Path) -> None:
    assert find_chinese_font(LABELS, [DEJAVU, tmp_path / "NotoSansCJK-Regular.ttc"]) is None
    page = english.read_text(encoding="utf-8")
    assert "fonts-noto-cjk" in page and "Noto Sans CJK" in page
    assert "各项" not in page and "参考答案" in page


def test_with_a_chinese_font_no_letter_is_missing(runs: list[Path], english: Path, tmp_path: Path) -> None:
    font = find_chinese_font(LABELS)
    if font is None:
        pytest.skip("no font with Chinese letters on this machine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(read_runs(runs), tmp_path, font).read_text(encoding="utf-8")
    assert "fonts-noto-cjk" not in page
    for path in (tmp_path / "report").iterdir():
        assert path.read_bytes() != (english.parent / "report" / path.name).read_bytes()
    svgs = [base64.b64decode(code).decode() for code in re.findall(r"svg\+xml;base64,([\w+/=]+)", page)]
    assert len(svgs) == 9 * 4
    for svg in svgs:
        assert not re.search(r"<(script|image|text|foreignObject)\b", svg)
        assert not re.search(r"(?:href|src)=\"(?!#)", svg)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page(browser: Any, report: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.evaluate(
        "[...document.images].map(i => ({natural: i.naturalWidth, source: i.currentSrc,"
        " box: i.getBoundingClientRect()}))"
    )
    assert len(pictures) == 9
    for picture in pictures:
        assert picture["natural"] > 0
        assert picture["box"]["width"] > 300 * (width / 1280) and picture["box"]["height"] > 100
        dark = "#1d1c1a" not in base64.b64decode(picture["source"].partition("base64,")[2]).decode()
        assert dark == (scheme == "dark")
    # Wide pages get wide pictures, narrow ones narrow, so that letters keep their size.
    assert all(abs(p["natural"] - p["box"]["width"]) < 0.2 * p["natural"] for p in pictures)
    shown = page.inner_text("body")
    for label in (
        "预测报告",
        "分数",
        "逐行配对比较",
        "困惑度",
        "与参考答案的相似度",
        "训练损失曲线",
        "得分最高",
        "分数定义",
        "截断",
    ):
        assert label in shown
    for run in ("full", "小说_lora", "server"):
        assert run in shown
    overflowing = page.evaluate(
        "[...document.querySelectorAll('td, th, .text, figure, .card, dd')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    assert overflowing == []
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    page.close()


def test_a_browser_prints_the_page(browser: Any, report: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.body')).maxHeight") == "none"
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    page.close()
