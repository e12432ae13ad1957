"""A lock on a build is taken away where its process is dead, and only there."""

from pathlib import Path

import pytest

from novelgpt.settings.deepspeed_settings import release_build_locks


def test_only_locks_that_nobody_holds_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left, held = tmp_path / "left" / "lock", tmp_path / "held" / "lock"
    for path in (left, held):
        path.parent.mkdir()
        path.touch()
    with held.open():
        assert release_build_locks() == [left]
        assert held.exists() and not left.exists()
    assert release_build_locks() == [held]


def test_on_several_machines_none_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (tmp_path / "lock").touch()
    assert release_build_locks() == [] and (tmp_path / "lock").exists()
