"""Preparing novels from the command line: killed at any moment, interrupted, out of space, and on real novels."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dataset.decode import decode_tolerant
from dataset.novels.engines.workers import map_files
from novelgpt.settings.errors import UserError
from tests.launched import PATIENCE
from tests.novel_files import json_rows, shard_rows, source_of_book, tree, write_novels

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
# Numbered chapters of the editions whose true count is known; 玉梨魂 counts to 30 without a 20th.
TRUE_CHAPTERS = {
    "hongloumeng.bookbao.gbk": 120, "hongloumeng.arabic.utf8": 120, "shuihuzhuan.rain8.gbk": 120,
    "sanguoyanyi.readnovel.gbk": 120, "sanguoyanyi.readnovel.utf8": 120, "hulanhezhuan.daocaoren.utf8": 7,
    "xiaohong_quanji.xstt.utf8bom": 39, "guanchangxianxingji.big5": 60, "rulinwaishi.trad.gbk": 55,
    "yulihun.gutenberg.utf8": 29, "ernvyingxiongzhuan.gutenberg.utf8": 40,
}  # fmt: skip


def start(raw: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """A run in a group of processes of its own."""
    command = [sys.executable, "-m", "dataset", "novels", str(raw), str(out), "--workers", "2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out[-2000:] + errors[-3000:]
    return out, errors


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_the_next_run_leaves_what_an_undisturbed_one_does(kills: int, tmp_path: Path) -> None:
    write_novels(tmp_path / "raw")
    finish(start(tmp_path / "raw", tmp_path / "first"))
    began = time.perf_counter()
    finish(start(tmp_path / "raw", tmp_path / "undisturbed"))
    duration = time.perf_counter() - began
    wanted = tree(tmp_path / "undisturbed")
    assert tree(tmp_path / "first") == wanted

    generator = random.Random(0)
    moments = [duration * (kill + generator.random()) / kills for kill in range(kills)]
    killed = 0
    # Two kills before each undisturbed run: the second meets what the first left behind.
    for place, pair in enumerate(zip(moments[::2], moments[1::2], strict=True)):
        out = tmp_path / f"killed-{place}"
        for moment in pair:
            process = start(tmp_path / "raw", out)
            time.sleep(moment)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        finish(start(tmp_path / "raw", out))
        assert tree(out) == wanted
    assert killed >= kills / 4  # the others had ended before


def test_when_only_the_first_process_dies_the_others_end_too(tmp_path: Path) -> None:
    write_novels(tmp_path / "raw")
    process = start(tmp_path / "raw", tmp_path / "out")
    assert process.stderr is not None
    for line in process.stderr:
        if "comparing" in line:  # all workers have run by then
            break
    process.kill()
    process.communicate()
    deadline = time.monotonic() + PATIENCE
    while _group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_is_alive(process.pid)


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_with_one_line_and_status_130(tmp_path: Path) -> None:
    write_novels(tmp_path / "raw")
    process = start(tmp_path / "raw", tmp_path / "out")
    assert process.stderr is not None
    first = process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=PATIENCE)[1].splitlines()
    assert process.returncode == 130
    assert rest[-1].startswith("interrupted") and "Traceback" not in first + "\n".join(rest)
    assert not (tmp_path / "out" / "manifest.json").exists()


def die_at_second(path: Path) -> Path:
    if path.name == "b.txt":
        os.kill(os.getpid(), signal.SIGKILL)
    path.with_suffix(".done").touch()
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_names_its_file_and_leaves_the_others_what_they_made(workers: int, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    with pytest.raises(UserError, match=r"b\.txt"):
        list(map_files(die_at_second, files, workers))
    assert (tmp_path / "a.done").exists()


def test_a_full_disk_is_an_error_with_a_remedy_and_what_is_done_stays(tmp_path: Path) -> None:
    write_novels(tmp_path / "raw")
    small = tmp_path / "small"
    small.mkdir()
    command = [sys.executable, "-m", "dataset", "novels", str(tmp_path / "raw"), str(small / "out"), "--workers", "1"]
    script = f'mount -t tmpfs -o size=250k none "{small}" && shift && "$@"; status=$?'
    script += f'; ls "{small}/out/cache/files"; exit $status'
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "bash", "x", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("no disk of a chosen size can be had here")
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "fix: " in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.split() and not any("unfinished" in name for name in done.stdout.split())


def test_the_script_prepares_the_samples_when_called_alone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("dataset", "novelgpt", "scripts"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    environment = os.environ | {"VENV": sys.prefix, "COLUMNS": "160"}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(checkout / "scripts" / "prepare_novels.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run_pretrain.sh" in done.stdout
    assert (checkout / "output" / "novels" / "report.html").is_file()
    assert shard_rows(checkout / "output" / "novels", "train")


@pytest.fixture(scope="module")
def editions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real editions and the scrambled file, prepared."""
    if not REAL.is_dir():
        pytest.skip("the real novels are not beside the checkout")
    folder = tmp_path_factory.mktemp("editions")
    (folder / "raw").mkdir()
    for path in [*(REAL / "novels").glob("*.txt"), *(REAL / "messy").glob("*.txt")]:
        if ".from_" not in path.name:
            shutil.copyfile(path, folder / "raw" / path.name)
    finish(start(folder / "raw", folder / "out", "--held_out_share", "0"))
    return folder / "raw", folder / "out"


@pytest.mark.slow
def test_real_editions_have_their_chapters(editions: tuple[Path, Path]) -> None:
    counts = Counter(
        source_of_book(row).removesuffix(".txt")
        for row in [*shard_rows(editions[1], "train"), *json_rows(editions[1] / "left_out.jsonl")]
        if row["chapter"].startswith("第")  # prefaces, prologues and epilogues have no number
    )
    assert {name: counts[name] for name in TRUE_CHAPTERS} == TRUE_CHAPTERS
    books = {book["name"]: book for book in json_rows(editions[1] / "books.jsonl")}
    assert [name for name, book in books.items() if book["refused"]] == ["garbage_mojibake.utf8"]


@pytest.mark.slow
def test_real_editions_of_one_novel_are_reported_as_alike(editions: tuple[Path, Path]) -> None:
    pairs = [row for row in json_rows(editions[1] / "duplicates.jsonl") if row["level"] == "book"]
    found = {
        frozenset(name.split(".")[0] + "." + name.split(".")[1] for name in (row["first"], row["second"]))
        for row in pairs
    }
    assert frozenset({"hongloumeng.bookbao", "hongloumeng.arabic"}) in found
    assert frozenset({"hulanhezhuan.daocaoren", "xiaohong_quanji.xstt"}) in found


@pytest.mark.slow
def test_real_editions_keep_every_quotation_mark(editions: tuple[Path, Path]) -> None:
    raw, out = editions
    found: dict[str, dict[str, int]] = {}
    rows: list[dict[str, Any]] = [*shard_rows(out, "train"), *json_rows(out / "left_out.jsonl")]
    for row in [*rows, *(row for row in json_rows(out / "rejected.jsonl") if "line" in row)]:
        marks = found.setdefault(source_of_book(row), dict.fromkeys("“”‘’「」『』", 0))
        for mark in marks:
            marks[mark] += row["text"].count(mark)
    for path in sorted(raw.iterdir()):
        text = decode_tolerant(path.read_bytes(), path.name).text
        assert found[path.name] == {mark: text.count(mark) for mark in "“”‘’「」『』"}


@pytest.mark.slow
def test_real_twins_come_out_equal_but_for_their_sources(editions: tuple[Path, Path]) -> None:
    _, out = editions
    rows = [*shard_rows(out, "train"), *json_rows(out / "left_out.jsonl")]
    first, second = (
        [row["text"] for row in rows if source_of_book(row) == f"sanguoyanyi.readnovel.{name}.txt"]
        for name in ("gbk", "utf8")
    )
    assert len(first) == len(second) == 120
    lines = [
        pair for texts in zip(first, second, strict=True) for pair in zip(*(t.split("\n") for t in texts), strict=True)
    ]
    assert sum(one != other for one, other in lines) <= 1


def test_help_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dataset", "novels", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in ("--format", "--rules", "--held_out", "--workers", "--engine"))


def test_another_engine_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    write_novels(tmp_path / "raw")
    finish(start(tmp_path / "raw", tmp_path / "local"))
    finish(start(tmp_path / "raw", tmp_path / "datatrove", "--engine", "datatrove"))
    shutil.rmtree(tmp_path / "datatrove" / "cache" / "logs")
    assert tree(tmp_path / "datatrove") == tree(tmp_path / "local")
