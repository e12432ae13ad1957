"""Names on the hub: the hub is asked once and told of at once where it is not there; what is cached does without."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from novelgpt.model import fingerprint
from novelgpt.model.fingerprint import weights_fingerprint
from novelgpt.model.hub import check_hub
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError

NAME = "someone/small-model"


def into_cache(folder: Path, cache: Path) -> Path:
    """A model as a download leaves it."""
    kept = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = kept / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder, target_is_directory=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
    """A hub that hangs up on everyone; the calls it got."""
    calls: list[object] = []
    server = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            calls.append(connection)
            connection.close()

    threading.Thread(target=hang_up, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as commands have it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    check_hub.cache_clear()
    yield calls
    check_hub.cache_clear()
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_a_hub_that_cannot_be_reached_is_asked_once_and_told_with_the_ways_around(hub: list[object]) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelArguments(NAME))
    assert len(hub) == 1
    assert "cannot be reached" in caught.value.cause
    assert NAME in caught.value.cause
    for way in ("HF_ENDPOINT", "--hub modelscope", "HTTPS_PROXY", "folder"):
        assert way in caught.value.remedy


def test_what_is_cached_is_read_without_the_hub(
    hub: list[object], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    into_cache(base_folder, tmp_path / "cache")
    assert load_tokenizer(ModelArguments(NAME)).get_vocab()
    assert len(hub) == 1
    assert "read from this host's cache" in capsys.readouterr().out
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_base_of_an_adapter_is_its_folder_in_the_cache(
    hub: list[object], base_folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    into_cache(base_folder, tmp_path / "cache")
    check_hub(NAME)
    assert weights_fingerprint(fingerprint.base_folder(NAME)) == weights_fingerprint(base_folder)
    with pytest.raises(UserError, match=r"the base nobody/nothing is not there: \w+"):
        fingerprint.base_folder("nobody/nothing")


def test_offline_the_hub_is_not_asked(hub: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1"):
        load_tokenizer(ModelArguments(NAME))
    assert not hub


@pytest.mark.parametrize("name", ["no such/name!", "a" * 200])
def test_what_can_be_no_name_is_not_asked_for(name: str, hub: list[object]) -> None:
    with pytest.raises(UserError):
        load_tokenizer(ModelArguments(name))
    assert not hub
