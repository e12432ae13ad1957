"""The Dockerfile keeps the rules of its linter, and the package builds from what it copies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINTER = Path(sys.executable).with_name("hadolint")


@pytest.mark.skipif(not LINTER.is_file(), reason="hadolint is installed on x86-64 Linux alone")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([LINTER, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_builds_a_package_that_holds_each_room(tmp_path: Path) -> None:
    listed = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    left_out = {name for name in listed if "*" not in name}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in kept:
        if name.split("/")[0] not in left_out:
            target = tmp_path / "src" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run([sys.executable, *words], cwd=tmp_path / "src", check=True)
    (wheel,) = tmp_path.glob("*.whl")
    rooms = {name.split("/")[1] for name in zipfile.ZipFile(wheel).namelist() if name.startswith("novelgpt_toolkit/")}
    assert {"novelgpt", "dataset", "pretrain", "finetune", "finetune_lora", "predict", "cli", "scripts"} <= rooms
