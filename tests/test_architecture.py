"""docs/architecture.md lists the functions between a row and its loss, as a trace of real runs finds them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = ("finetune", "pretrain")
# From a row on disk to its loss, a reader opens no more than these.
MOST_FUNCTIONS, MOST_FILES = 25, 10

Way = list[list[str]]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Way]:
    """[file, function] of each function on the way, by pipeline."""
    if sys.version_info < (3, 11):
        pytest.skip("qualified names of code objects came with Python 3.11")
    report = tmp_path_factory.mktemp("ways") / "ways.json"
    command = [warm_python(), str(ROOT / "benchmarks" / "functions_to_loss.py"), "--json", str(report)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found: dict[str, Way] = json.loads(report.read_text(encoding="utf-8"))["ways"]
    return found


def listed(page: str) -> list[Way]:
    """The lists of a page, in order."""
    blocks = re.findall(r"^```text\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [[line.split(None, 1) for line in block.splitlines()] for block in blocks if block.startswith("dataset/")]


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/zh/architecture.md"])
def test_the_page_lists_what_a_trace_finds(page: str, ways: dict[str, Way]) -> None:
    assert listed(page) == [ways[pipeline] for pipeline in PIPELINES]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_few_functions_lie_between_a_row_and_its_loss(pipeline: str, ways: dict[str, Way]) -> None:
    way = ways[pipeline]
    assert 0 < len(way) <= MOST_FUNCTIONS
    assert len({file for file, _ in way}) <= MOST_FILES


def test_places_that_the_page_names_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`(\w+)`(?: in|,? called by| \() ?`((?:novelgpt|dataset|finetune)[\w/]*\.py)`", text)
    assert len(places) > 10
    missing = [
        place
        for place in places
        if not re.search(rf"\b(?:def|class) {place[0]}\b", (ROOT / place[1]).read_text("utf-8"))
    ]
    assert missing == []
    for path in re.findall(r"`((?:novelgpt|dataset|predict|finetune)/[\w/]*(?:\.py)?)`", text):
        assert (ROOT / path).exists(), path
