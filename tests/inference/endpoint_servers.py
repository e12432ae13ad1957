"""A small server in a thread, which answers by recipe: rightly, wrongly, or never."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from predict.__main__ import main


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Served:
    """A server: where it is, what it was asked, and what lets handlers that wait go."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


Recipe = Callable[[BaseHTTPRequestHandler, Asked, Served], None]


@contextmanager
def serving(recipe: Recipe, lists_models: bool = True) -> Iterator[Served]:
    """A server that lists one model, unless told not to, and leaves every other request to the recipe."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._handle({})

        def do_POST(self) -> None:
            self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _handle(self, body: dict[str, Any]) -> None:
            asked = Asked(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            served.asked.append(asked)
            try:
                if lists_models and asked.path.partition("?")[0].endswith("/models"):
                    send(self, {"data": [{"id": "small"}]})
                else:
                    recipe(self, asked, served)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has gone, as some tests want it to

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    """A reply; texts and bytes as they are, all else as JSON."""
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def completion(content: Any = "雨停了。", finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def always(body: Any, status: int = 200, **headers: str) -> Recipe:
    """The recipe of one reply to all."""
    return lambda handler, asked, served: send(handler, body, status, **headers)


def write_rows(folder: Path, *references: str) -> Path:
    """Rows r0, r1, …, one for each reference; "" for a row without one."""
    path = folder / "rows.jsonl"
    lines = []
    for number, reference in enumerate(references):
        messages = [{"role": "user", "content": f"问题{number}"}]
        messages += [{"role": "assistant", "content": reference}] * bool(reference)
        lines.append(json.dumps({"id": f"r{number}", "messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def predict(served: Served, rows: Path, *words: str, url: str = "") -> list[dict[str, Any]]:
    """Predict through the server into the folder of the rows; the predictions."""
    output = rows.parent / "out"
    main(["--endpoint", url or served.url, "--data_files", str(rows), "--output_dir", str(output), *words])
    return [json.loads(line) for line in (output / "predictions.jsonl").read_bytes().splitlines()]


def refused(served: Served, rows: Path, capsys: pytest.CaptureFixture[str], *words: str, url: str = "") -> str:
    """What is said where a prediction ends in an error that the user can mend, in two lines."""
    with pytest.raises(SystemExit) as left:
        predict(served, rows, *words, url=url)
    assert left.value.code == 2
    said = capsys.readouterr().err
    lines = said[said.index("error: ") :].splitlines()
    assert len(lines) == 2 and lines[1].startswith("  fix: ")
    assert not (rows.parent / "out" / "predictions.jsonl").exists()
    return lines[0]
