"""Data sets of a hub: their rows, versions and refusals, against a stand-in of the hub that real clients talk to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dataset.sources import find_row_sources
from novelgpt.settings.errors import UserError
from novelgpt.text.hub_data import HubData, is_hub_name, read_hub_name
from tests.hub_server import hub

ROOT = Path(__file__).resolve().parents[2]
NEW, OLD = "a" * 40, "b" * 40
# Reads the names in each line of its input; prints the questions, the place of the first row and the version of each.
READER = """
import json, sys
from dataset.sources import find_row_sources
from novelgpt.settings.errors import UserError
for line in sys.stdin:
    told = []
    for name in json.loads(line):
        try:
            (source,) = find_row_sources([name])
            rows = list(source.rows())
            questions = [json.loads(row.text).get("instruction") for row in rows]
            told.append([questions, f"{source.files[rows[0].file]}{rows[0].place}", source.identity()["version"]])
        except UserError as error:
            told.append(f"{error.cause} | {error.remedy}")
    print(json.dumps(told), flush=True)
"""


def write(file: Path, questions: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"instruction": question, "output": "答"}) + "\n" for question in questions]
    file.write_text("".join(rows), encoding="utf-8")


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """Data sets as the hub has them: with two versions, with subsets, with a script, and one that asks for consent."""
    root = tmp_path / "hub" / "org"
    write(root / "talk" / NEW / "train.jsonl", [f"new{number}" for number in range(2500)])
    write(root / "talk" / NEW / "test.jsonl", ["test"])
    write(root / "talk" / OLD / "train.jsonl", ["old0", "old1"])
    write(root / "parts" / NEW / "a" / "rows.jsonl", ["a"])
    write(root / "parts" / NEW / "b" / "rows.jsonl", ["b"])
    card = "---\nconfigs:\n- config_name: first\n  data_files: a/*\n- config_name: second\n  data_files: b/*\n---\n"
    (root / "parts" / NEW / "README.md").write_text(card, encoding="utf-8")
    write(root / "made" / NEW / "rows.jsonl", ["made"])
    (root / "made" / NEW / "made.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    for name in ("talk", "parts", "made"):
        (root / name / "main").write_text(NEW, encoding="utf-8")
    (root / "gated").mkdir()
    (root / "gated" / "gated").touch()
    return root.parent


def test_rows_of_the_hub(repositories: Path, tmp_path: Path) -> None:
    """One process reads with a hub, and then without: what is cached stays, and what is not is refused."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    new = [f"new{number}" for number in range(2500)]
    told = {
        "hf://org/none": "has no data set that this user may see named org/none",
        "hf://org/gated": "asks for consent before it hands out hf://org/gated",
        "hf://org/made": "hf://org/made is made by code, made.py, which is not run here",
        "hf://org/talk@nope": "hf://org/talk has no revision 'nope'",
        "hf://org/talk::nope": "Should be one of ['train', 'test']",
        "hf://org/parts": "'first', 'second'",
    }
    with ExitStack() as stack:
        with hub(repositories) as (address, asked):
            process: Any = subprocess.Popen(
                [sys.executable, "-c", READER], env=environment | {"HF_ENDPOINT": address}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.enter_context(process)

            def read(*names: str) -> list[Any]:
                process.stdin.write(json.dumps(names) + "\n")
                process.stdin.flush()
                return json.loads(next(line for line in process.stdout if line.startswith("[")))

            assert read("hf://org/talk@" + OLD, "hf://org/talk", "hf://org/talk::test", "hf://org/parts:second") == [
                [["old0", "old1"], f"hf://org/talk@{OLD} row 0", OLD],
                [new, "hf://org/talk row 0", NEW],
                [["test"], "hf://org/talk::test row 0", NEW],
                [["b"], "hf://org/parts:second row 0", NEW],
            ]
            ((drawn, place, _),) = read("hf://datasets/org/talk#40%")
            assert len(drawn) == 1000 and drawn == [question for question in new if question in set(drawn)]
            assert place == f"hf://org/talk row {drawn[0].removeprefix('new')}"
            refused = read(*told)
            assert all(part in cause for part, cause in zip(told.values(), refused, strict=True)), refused
            assert not (tmp_path / "ran").exists() and not any("made.py" in line for line in asked)
            count = len(asked)
            assert count < 80  # no retries
            assert read("hf://org/talk")[0][2] == NEW and len(asked) == count  # as of when the process began
        cached, other, missing = read("hf://org/parts:second@main", f"hf://org/parts:second@{OLD}", "hf://org/nobody")
        assert cached == [["b"], "hf://org/parts:second@main row 0", NEW]
        assert f"as of {NEW}, not {OLD}" in other and "hf://org/nobody is in no cache of this host" in missing


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf://squad", ("hf", "squad", "", "train", "")),
        ("hf://org/name", ("hf", "org/name", "", "train", "")),
        ("hf://datasets/org/name", ("hf", "org/name", "", "train", "")),
        ("hf://datasets/name", ("hf", "datasets/name", "", "train", "")),
        ("ms://org/name:sub@v1.0", ("ms", "org/name", "sub", "train", "v1.0")),
        (
            "hf://org/na.me-2:sub:valid@refs/convert/parquet",
            ("hf", "org/na.me-2", "sub", "valid", "refs/convert/parquet"),
        ),
        ("hf://org/name::test", ("hf", "org/name", "", "test", "")),
    ],
)
def test_names_of_hubs(name: str, expected: tuple[str, ...]) -> None:
    assert is_hub_name(name) and read_hub_name(name) == HubData(*expected)  # type: ignore[arg-type]
    assert read_hub_name(str(read_hub_name(name))) == read_hub_name(name)


@pytest.mark.parametrize(
    "name", ["hf://", "hf://a/b/c", "hf://a b", "hf://org/name@", "hf://org/name/rows.jsonl", "ms:///x"]
)
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not a name of a data set on a hub"):
        read_hub_name(name)


def test_modelscope_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError) as refused:
        find_row_sources(["ms://org/talk"])
    assert refused.value.cause == "ms://org/talk needs the package modelscope" and "pip install" in refused.value.remedy


def test_rows_of_modelscope(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client fetches files, and no code; subsets and splits are those of the hub's own library."""
    asked: list[Any] = []

    def download(name: str, revision: str | None, ignore_file_pattern: list[str]) -> str:
        asked.append((name, revision, ignore_file_pattern))
        if name == "org/none":
            raise ValueError("no such data set")
        left_out = shutil.ignore_patterns(*ignore_file_pattern)
        place = tmp_path / "fetched" / f"{name}@{revision}"
        return str(shutil.copytree(repositories / name / (revision or NEW), place, ignore=left_out, dirs_exist_ok=True))

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(dataset_snapshot_download=download))
    names = ["ms://org/talk::test", f"ms://org/talk@{OLD}", "ms://org/parts:second", "ms://org/made"]
    sources = find_row_sources(names)
    read = [[json.loads(row.text)["instruction"] for row in source.rows()] for source in sources]
    assert read == [["test"], ["old0", "old1"], ["b"], ["made"]]
    assert not (tmp_path / "ran").exists() and ("org/talk", OLD, ["*.py"]) in asked
    versions = [source.identity()["version"] for source in sources]
    assert len(set(versions)) == 4 and versions == [source.identity()["version"] for source in find_row_sources(names)]
    with pytest.raises(UserError, match="ms://org/none cannot be downloaded from ModelScope: no such data set"):
        find_row_sources(["ms://org/none"])
