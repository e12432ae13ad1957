"""The report's pictures, with and without Chinese fonts, and its page in a browser."""

import base64
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from novelgpt.settings.charts import find_chinese_font
from predict.report.__main__ import write_report
from predict.report.charts import LABELS
from predict.report.runs import read_runs
from tests.predict.scored_runs import three_runs

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return three_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of this machine, with whatever fonts it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each letter that its fonts lack
        return write_report(read_runs(runs), tmp_path_factory.mktemp("report"), find_chinese_font(LABELS))


@pytest.fixture(scope="module")
def english(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a machine without Chinese fonts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return write_report(read_runs(runs), tmp_path_factory.mktemp("english"), None)


def test_without_a_chinese_font_pictures_are_english_and_the_page_says_so(english: Path, tmp_path: Path) -> None:
    assert find_chinese_font(LABELS, [DEJAVU, tmp_path / "NotoSansCJK-Regular.ttc"]) is None
    page = english.read_text(encoding="utf-8")
    assert "fonts-noto-cjk" in page and "Noto Sans CJK" in page
    assert "参考答案" in page


@pytest.mark.skipif(find_chinese_font(LABELS) is None, reason="no font with Chinese letters on this machine")
def test_with_a_chinese_font_every_picture_has_chinese_labels(report: Path, english: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert "fonts-noto-cjk" not in page
    for path in (report.parent / "report").iterdir():
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
