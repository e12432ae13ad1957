"""A stand-in for the Hugging Face hub: a folder of data sets, served as the client libraries ask for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


class _Hub(BaseHTTPRequestHandler):
    """Serves ROOT/OWNER/NAME/REVISION/…; a revision is a folder, `main` a file with the newest one's name."""

    root: Path
    asked: list[str]

    def log_message(self, *args: Any) -> None:
        """Nothing: the requests are in `asked`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "datasets"]:
            self._api("/".join(path[2:4]), path[4:])
        elif path[0] == "datasets" and path[3] == "resolve":
            self._file("/".join(path[1:3]), path[4], "/".join(path[5:]))
        else:
            self._send(404, {"error": "no such page"})

    def _folder(self, repository: str, revision: str) -> Path | None:
        if (self.root / repository / "gated").exists():
            self._send(403, {"error": "ask for access"}, {"X-Error-Code": "GatedRepo"})
            return None
        if not (self.root / repository).is_dir():
            self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision == "main":
            revision = (self.root / repository / "main").read_text()
        folder = self.root / repository / revision
        if folder.is_dir():
            return folder
        self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _api(self, repository: str, rest: list[str]) -> None:
        kind, *where = rest or ["revision", "main"]
        folder = self._folder(repository, where[0] if where else "main")
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "revision":
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self._send(200, {"id": repository, "sha": folder.name, "siblings": siblings, "tags": [], "private": False})
        elif kind == "tree":
            below = "/".join(where[1:])
            deep = parse_qs(urlparse(self.path).query).get("recursive", ["False"])[0].lower() == "true"
            if not (folder / below).is_dir():
                self._send(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
                return
            found = (folder / below).rglob("*") if deep else (folder / below).glob("*")
            self._send(200, [_entry(path, folder) for path in sorted(found)])
        elif kind == "paths-info":
            wanted = (
                json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
            )
            paths = [folder / name for name in ([wanted] if isinstance(wanted, str) else wanted)]
            self._send(200, [_entry(path, folder) for path in paths if path.exists()])
        else:
            self._send(404, {"error": kind})

    def _file(self, repository: str, revision: str, name: str) -> None:
        folder = self._folder(repository, revision)
        if folder is None:
            return
        if not (folder / name).is_file():
            self._send(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": folder.name})
            return
        content = (folder / name).read_bytes()
        self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": folder.name})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    oid = hashlib.sha1(b"" if path.is_dir() else path.read_bytes()).hexdigest()
    return {"type": kind, "oid": oid, "size": size, "path": str(path.relative_to(folder))}


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that serves a folder, and the list of what it is asked."""
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
