"""The package that pip installs: all that the rooms hold, under one name; it works in any folder and leaves nothing.

It is built from a copy of the checkout, without a network, into an environment of its own that sees the libraries of
the one that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from novelgpt import __version__

ROOT = Path(__file__).resolve().parents[1]
NO_PART = (".git", ".venv", "output", "__pycache__", ".*_cache")
# What a child process would otherwise find, and what a launcher would tell it.
OF_THIS_PROCESS = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "RANK", "LOCAL_RANK", "WORLD_SIZE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OF_THIS_PROCESS}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PAPER = {
    "title": "温度对反应的影响",
    "abstract": "本文研究温度对反应的影响。结果表明，温度越高，反应越快，产物越纯。" * 4,
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, beside whose files lie an environment, results, and something private."""
    folder = tmp_path_factory.mktemp("build") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NO_PART))
    for name in (".venv/lib/module.py", "output/finetune/model.safetensors", "my_novels/book.txt", "token.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private", encoding="utf-8")
    return folder


class Environment:
    """A virtual environment that sees the libraries of this one, and pip for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.packages = next(folder.glob("lib/python*/site-packages"))
        (self.packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    def pip(self, *words: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *words]
        done = subprocess.run(command, cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *words: str | Path) -> None:
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *words)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def run(self, folder: Path, *words: str, **variables: str) -> str:
        """What the command `novelgpt` prints, called in a folder."""
        command = [self.folder / "bin" / "novelgpt", *words]
        done = subprocess.run(
            command, cwd=folder, env=ENVIRONMENT | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    words = ["pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", *words, str(source)], env=ENVIRONMENT, check=True)
    return folder / f"novelgpt-{__version__}-py3-none-any.whl"


def names_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def files_below(folder: Path) -> Iterator[str]:
    yield from (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_traps(folder: Path) -> None:
    """Modules that have the names of rooms, as a user's folder may hold, which end whatever imports them."""
    for name in ("novelgpt", "dataset", "predict", "finetune_lora"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('this is the module of the user')\n")
    (folder / "cli.py").write_text("raise SystemExit('this is the module of the user')\n")


def test_a_wheel_works_in_any_folder_and_leaves_nothing_behind(
    checkout: Path, environment: Environment, empty: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(checkout, tmp_path)
    inside = {name.removeprefix("novelgpt_toolkit/") for name in names_of(wheel) if "dist-info" not in name}
    rooms = [path.parent for path in checkout.glob("*/__init__.py")]
    in_rooms = {f"{room.name}/{name}" for room in rooms for name in files_below(room)}
    settings = {f"scripts/deepspeed/{name}" for name in files_below(checkout / "scripts" / "deepspeed")}
    assert len(in_rooms) > 200
    assert inside == in_rooms | settings | {"requirements.txt", "__init__.py", "__main__.py"}

    before = environment.files()
    environment.install(wheel)
    installed = environment.files()
    tops = {path.name for path in environment.packages.iterdir()}
    assert tops == {"libraries.pth", "novelgpt_toolkit", f"novelgpt-{__version__}.dist-info"}

    assert "lora" in environment.run(empty, "--help")
    write_traps(empty)
    (empty / "papers.jsonl").write_text(json.dumps(PAPER, ensure_ascii=False) + "\n", encoding="utf-8")
    environment.run(empty, "data", "conversations", "papers.jsonl", "rows.jsonl", "--task", "title_to_abstract")
    (row,) = (empty / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert PAPER["title"] in row and PAPER["abstract"] in row
    assert environment.files() == installed

    environment.pip("uninstall", "--yes", "novelgpt")
    assert environment.files() == before


@pytest.mark.long
def test_a_source_distribution_holds_what_makes_the_wheel_and_nothing_private(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=checkout, env=ENVIRONMENT, check=True)
    archive = tmp_path / f"novelgpt-{__version__}.tar.gz"
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert {"docs/install.md", "tests/test_package.py", "scripts/setup.sh", "requirements-dev.txt"} <= inside
    assert not {name for name in inside if name.startswith((".venv", "output", "my_novels", "token"))}
    built = [names_of(build_wheel(source, tmp_path / kind)) for kind, source in (("a", checkout), ("b", archive))]
    assert built[0] == built[1]


@pytest.mark.long
def test_an_editable_installation_runs_the_checkout_and_leaves_nothing_behind(
    checkout: Path, environment: Environment, empty: Path
) -> None:
    before, source = environment.files(), set(files_below(checkout))
    environment.install("--editable", checkout)
    for folder in (empty, checkout):
        assert "lora" in environment.run(folder, "--help", PYTHONDONTWRITEBYTECODE="1")
    probe = [environment.python, "-B", "-c", "import novelgpt_toolkit, predict"]  # the rooms stand on no other's path
    done = subprocess.run(probe, cwd=empty, env=ENVIRONMENT, capture_output=True, text=True)
    assert "No module named 'predict'" in done.stderr
    environment.pip("uninstall", "--yes", "novelgpt")
    assert environment.files() == before
    assert set(files_below(checkout)) == source


@pytest.mark.long
def test_a_wheel_trains_and_predicts_in_the_folder_of_a_user(
    checkout: Path, environment: Environment, empty: Path, tmp_path: Path
) -> None:
    """By the command with two processes, and as ranks of torchrun, in a folder below somebody's git repository."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "theirs"]):
        subprocess.run([*git, *words], check=True)
    environment.install(build_wheel(checkout, tmp_path))
    installed = environment.files()
    if sys.version_info >= (3, 11):  # before, `python -m` always looks in the current folder first
        write_traps(empty)
    short = ["--max_steps", "2", "--max_length", "128", "--stop_check", "0"]
    environment.run(empty, "lora", *short, NPROC="2")
    environment.run(empty, "predict", "--max_new_tokens", "4")
    output = empty / "output"
    run = json.loads((output / "finetune_lora" / "run.json").read_text(encoding="utf-8"))
    assert (run["status"], run["processes"], run["git_commit"]) == ("finished", 2, None)
    assert run["versions"]["novelgpt"] == __version__
    assert (output / "finetune_lora" / "predict" / "predictions.jsonl").is_file()

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "novelgpt_toolkit", "lora"]
    command = [environment.python, *torchrun, *short, "--output_dir", "output/by_torchrun"]
    subprocess.run(command, cwd=empty, env=ENVIRONMENT, check=True)
    theirs = json.loads((output / "by_torchrun" / "run.json").read_text(encoding="utf-8"))
    assert (theirs["status"], theirs["processes"]) == ("finished", 2)
    assert environment.files() == installed
