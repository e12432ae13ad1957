"""Whether a run whose ranks have failed is restarted, when, and what is reported of it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

from novelgpt.launch.ranks import Failure, show_tail
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.run_record import ATTEMPT_VARIABLE, RUN_FILE, Progress, StartRecord, utc_now
from novelgpt.settings.signals import STOP_SIGNALS
from novelgpt.settings.terminal import counted, say

# Before the first restart, and twice as long before each that follows, up to the max: what made a rank fail may pass.
FIRST_WAIT_SECONDS = 1.0
MAX_WAIT_SECONDS = 60.0
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


class Restarts:
    """The starts of one run by this launcher, which it may repeat.

    Args:
        limit: max restarts.
        folder: in which rank 0 and this launcher exchange files; see `run_record`.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self._folder = folder
        self._record = StartRecord()
        # Status and progress of the last fault: the same one twice is the run's own, and would come a third time.
        self._last: tuple[int, int | None] | None = None

    @property
    def number(self) -> int:
        """Restarts so far."""
        return len(self._record.restarts)

    @property
    def wait_seconds(self) -> float:
        """Time to wait before the next start."""
        return min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(self.number - 1, 30))

    def variables(self) -> dict[str, str]:
        """Return the environment variables of the next start's rank 0."""
        if not self.limit:
            return {}
        self._record.write(self._folder)
        return {ATTEMPT_VARIABLE: str(self._folder)}

    def again(self, failures: list[Failure], stopped: bool) -> bool:
        """Decide whether the run is restarted, after a start that has ended; prints the decision.

        Errors of use, signals and the same fault at the same progress as before end it. So does a fault after the last
        restart.

        Args:
            failures: of the ranks and hosts.
            stopped: whether a signal has ended the start.
        """
        if not self.limit or not failures:
            return False
        progress, record = Progress.read(self._folder), self._record
        record.folder = progress.folder or record.folder
        if progress.folder is not None and record.restarts:
            record.restarts[-1]["checkpoint"] = progress.checkpoint
        if progress.unit == "step":
            record.reached = max(record.reached, progress.count or 0)
        if stopped or any(failure.status == 2 or -failure.status in STOP_SIGNALS for failure in failures):
            return False
        cause = min(failures, key=Failure.weight)
        fault, before = (cause.status, progress.count), self._last
        self._last = fault
        kind: dict[str, Any] = {"cause": cause.cause} if cause.cause else {"status": cause.status}
        if cause.status < 0:
            kind = {"signal": signal.Signals(-cause.status).name}
        # Rank 0 adds the checkpoint that it resumes from.
        entry = {"at": utc_now(), "who": cause.who, **kind, progress.unit: progress.count}
        if progress.finished:
            say("not restarted: the run is finished", stderr=True)
            return False
        if fault == before:
            self._give_up(progress, entry, f"the same fault as before, {_where(progress)}: it would recur")
            return False
        if self.number == self.limit:
            self._give_up(progress, entry, f"{counted(self.limit, 'restart')} made, and none is left")
            return False
        record.restarts.append(entry)
        if cause.status != -signal.SIGKILL:
            show_tail(cause)  # or it would be lost: its next start prints into the same file
        what = cause.explain()[0] + ("," if cause.cause else "")
        say(
            f"{what} {_where(progress)}; restart {self.number} of {self.limit}{self._resumes_from(progress)}, in "
            f"{self.wait_seconds:.0f} s",
            stderr=True,
        )
        return True

    def _give_up(self, progress: Progress, entry: dict[str, Any], reason: str) -> None:
        say(f"not restarted: {reason}", stderr=True)
        if progress.folder is None:
            return
        path = Path(progress.folder) / RUN_FILE
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(description, dict) and description.get("status") == "running":
                description["gave_up"] = entry | {"reason": reason}
                atomic_write(path, json.dumps(description, ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError):
            return  # a run that ended before its first step has removed it; the terminal shows it all

    def _resumes_from(self, progress: Progress) -> str:
        """Name the checkpoint that the next start resumes from, as its folder shows it; rank 0 verifies it."""
        if self._record.folder is None:
            return ""
        named = (CHECKPOINT.fullmatch(path.name) for path in Path(self._record.folder).glob("checkpoint-*"))
        steps = [int(match[1]) for match in named if match is not None and int(match[1]) <= self._record.reached]
        name = f"checkpoint-{max(steps)}" if steps else progress.checkpoint
        return f" from {name}" if name is not None else " from the beginning"


def _where(progress: Progress) -> str:
    """Format the progress of a start that has ended."""
    if progress.count is None:
        return "before training began" if progress.unit == "step" else "before the first answer"
    return f"after {counted(progress.count, 'row')}" if progress.unit == "row" else f"after step {progress.count}"
