"""YAML and JSON files of any shape are read as what they mean, or end in an error that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataset.instructions import load_instructions
from dataset.novels.cleaning.rules import read_rules
from novelgpt.settings.deepspeed_settings import check_deepspeed
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object, read_yaml
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import ROOT
from novelgpt.settings.runs import FinetuneRun
from novelgpt.training.checkpoints.folders import MANIFEST, damage
from predict.lm_eval_run import _read_results
from predict.report.runs import read_runs
from tests.predict.scored_runs import three_runs

DEEP = "[" * 100_000
# What lines of references stand for: 9 to the 9th values.
BOMB = "\n".join(["a: &a [1,1,1,1,1,1,1,1,1]", *(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)])  # fmt: skip
YAML: dict[str, bytes] = {
    "list": b"- 1\n- 2\n",
    "text": b"only words",
    "number": b"3",
    "not closed": b"a: [1",
    "tab": b"a:\n\t- 1",
    "nested too deep": DEEP[:5000].encode(),
    "no date": b"a: 2024-13-45",
    "UTF-16": "max_length: 5\n".encode("utf-16"),
    "Latin-1": "a: \u00e9".encode("latin-1"),
    "zeros": b"\0\0\0\0",
    "control sequences": b"a: \x1b[31m",
    "a key twice": b"max_length: 5\nmax_length: 6\n",
    "a key that is a list": b"? [1, 2]\n: 3\n",
    "a list of itself": b"a: &a [*a]",
    "references without end": BOMB.encode(),
    "python": b'!!python/object/apply:os.system ["true"]',
}
READERS: dict[str, Callable[[Path], object]] = {
    "--config": lambda path: parse_arguments(FinetuneRun, ["--config", str(path)]),
    "--instruction_templates": lambda path: load_instructions([str(path)]),
    "--rules": lambda path: read_rules([path]),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_runs(tmp_path_factory.mktemp("runs"))[0]


@pytest.mark.parametrize("shape", [*YAML, "a folder", "a link to nothing"])
@pytest.mark.parametrize("reader", READERS)
def test_yaml_of_any_shape_is_named(reader: str, shape: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    if shape == "a folder":
        path.mkdir()
    elif shape == "a link to nothing":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(YAML[shape])
    with pytest.raises(UserError) as raised:
        READERS[reader](path)
    assert "settings.yaml" in raised.value.cause
    assert "\x1b" not in raised.value.cause


def test_references_and_merged_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n", encoding="utf-8")
    assert read_yaml(path, "", "") == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("zero_optimization", []), ("zero_optimization", 2), ("zero_optimization.stage", 7),
        ("zero_optimization.stage", "two"), ("zero_optimization.stage", []),
        ("zero_optimization.offload_optimizer", []), ("zero_optimization.offload_optimizer", {"device": 3}),
        ("zero_optimization.reduce_bucket_size", {}), ("fp16", []), ("fp16", "yes"), ("bf16", {"enabled": "x"}),
        ("optimizer", []), ("optimizer", {"params": {}}), ("scheduler", 3), ("train_batch_size", -1),
        ("train_micro_batch_size_per_gpu", "many"), ("gradient_accumulation_steps", [1]),
        ("gradient_clipping", float("nan")), ("gradient_clipping", {}),
    ],
)  # fmt: skip
def test_settings_of_deepspeed_are_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    outer, _, inner = name.partition(".")
    settings[outer] = {inner: value} if inner else value
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"zero\.json: {outer}"):
        check_deepspeed(str(path))
    for given in (settings, json.dumps(settings)):
        with pytest.raises(UserError, match=f"--deepspeed: {outer}"):
            check_deepspeed(given)


def test_the_projects_own_settings_of_deepspeed_pass() -> None:
    for path in (ROOT / "scripts" / "deepspeed").glob("*.json"):
        check_deepspeed(str(path))


JSON = (
    b"", b"[]", b"null", b"3", b"{", DEEP.encode(), b'{"a": ' + DEEP.encode(), b"\xff\xfe{\x00}\x00",
    b'{"a": 1, "a": 2}',
)  # fmt: skip


@pytest.mark.parametrize("content", JSON, ids=range(len(JSON)))
def test_json_of_any_shape_is_named_by_each_reader(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results_1.json"
    path.write_bytes(content)
    for read in (read_object, lambda named: check_deepspeed(str(named)), _read_results):
        with pytest.raises(UserError, match=r"results_1\.json"):
            read(path)
    (tmp_path / MANIFEST).write_bytes(content)
    assert damage(tmp_path) == f"{MANIFEST} cannot be read"


@pytest.mark.parametrize(
    "manifest", [{}, {"files": []}, {"files": {"a": 3}}, {"files": {"a": {"bytes": "x", "sha256": "y"}}}]
)
def test_manifests_of_checkpoints_of_another_shape_are_told(manifest: Any, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert damage(tmp_path) == f"{MANIFEST} cannot be read"


@pytest.mark.parametrize(
    ("name", "value"),
    [("intervals", []), ("intervals", {"rouge-1": 3}), ("definitions", []), ("generation", "x"), ("groups", [1]),
     ("groups", {"a": []}), ("rows", "three")],
)  # fmt: skip
def test_scores_of_another_shape_are_named(name: str, value: Any, scored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(scored, folder)
    path = next(folder.rglob("scores.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=r"scores\.json"):
        read_runs([folder])
