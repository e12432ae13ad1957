"""A command that is started, watched by what it prints, and sent signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.warm_python import warm_environment

ROOT = Path(__file__).resolve().parents[1]
# Seconds until a test gives up on what has not happened: a bound against hanging, not a measure of speed. What takes a
# second on a quiet machine takes a minute on a busy one.
PATIENCE = 900.0
# Of the variables of a launcher, none may be there.
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launched:
    """A script with these words, as the leader of a process group, as a terminal would start it."""

    def __init__(
        self,
        *words: str,
        log: Path,
        script: str = "launch.sh",
        prefix: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
        warm: bool = False,
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VENV": sys.prefix}
        environment |= warm_environment() if warm else {}
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*prefix, "bash", str(ROOT / "scripts" / script), *words], cwd=ROOT,
                env=environment | dict(variables or {}), stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ranks = self.ranks()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pid in ranks:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """Wait until it has printed this."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text())
            if found is not None:
                return found
            assert self.process.poll() is None, self.text()[-3000:]
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come:\n{self.text()[-3000:]}")

    def ends(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; the status as a shell has it."""
        status = self.process.wait(timeout=seconds)
        return status if status >= 0 else 128 - status

    def ranks(self) -> list[int]:
        """Process ids of its ranks, the first one first; none of a warm Python."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                parent = re.search(r"PPid:\s+(\d+)", path.read_text())
                variables = (path.parent / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")]
            if parent is not None and int(parent[1]) == self.process.pid and ranks:
                found[ranks[0]] = int(path.parent.name)
        return [found[rank] for rank in sorted(found)]
