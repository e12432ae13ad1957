"""Whether a run whose ranks have failed is started again, when, and what is told of it."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from novelgpt.launch.ranks import Failure
from novelgpt.launch.watch import POLL_SECONDS, Outcome, Signals, show_last_words
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.attempts import VARIABLE, Reached, Told
from novelgpt.settings.signals import STOP_SIGNALS
from novelgpt.settings.terminal import counted, say

# Before the first restart, and twice as long before each that follows, up to the last: what made a rank fail may pass.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Fault:
    """What failed, and where: the same one twice is the run's own, and would come a third time.

    Attributes:
        status: of the failure that the others follow from.
        count: of steps that were done, or of rows; None before the first.
    """

    status: int
    count: int | None


class Restarts:
    """The starts of one run by this launcher, which it may make again.

    Args:
        most: how many times it may.
        place: a folder in which rank 0 and this launcher tell each other.
    """

    def __init__(self, most: int, place: Path) -> None:
        self.most = most
        self._place = place
        self._told = Told()
        self._last: Fault | None = None

    @property
    def number(self) -> int:
        """How many there were."""
        return len(self._told.restarts)

    def variables(self) -> dict[str, str]:
        """What the next start of rank 0 finds in its environment."""
        if not self.most:
            return {}
        self._told.write(self._place)
        return {VARIABLE: str(self._place)}

    def again(self, outcome: Outcome, signals: Signals) -> bool:
        """Whether the run shall be started again, after a start that has ended; says so, or why not.

        Errors of use, signals and the same fault at the same place as before end it. So does the last restart's fault.
        """
        if not self.most or not outcome.failures:
            return False
        reached = self._note_reached()
        # Ranks that lose their launcher stop and save, and all others with them: nobody has asked for that.
        stopped = bool(outcome.stopped and not outcome.lost) or bool(signals.received)
        asked = stopped or any(-failure.status in STOP_SIGNALS for failure in outcome.failures)
        if asked or any(failure.status == 2 for failure in outcome.failures):
            return False
        cause = outcome.cause
        fault, before = Fault(cause.status, reached.count), self._last
        self._last = fault
        entry = _entry(cause, reached)
        if reached.finished:
            say("not started again: the run is finished", stderr=True)
            return False
        if fault == before:
            self._give_up(reached, entry, f"the same fault as before, {_where(reached)}: it would come again")
            return False
        if self.number == self.most:
            self._give_up(reached, entry, f"{counted(self.most, 'restart')} made, and none is left")
            return False
        self._told.restarts.append(entry)
        if cause.status != -signal.SIGKILL:
            show_last_words(cause)  # or they would be gone: its next start prints into the same file
        start = _start(self._told, reached)
        what = cause.explain()[0] + ("," if cause.cause else "")
        say(
            f"{what} {_where(reached)}; restart {self.number} of {self.most}{start}, in {self._wait_seconds():.0f} s",
            stderr=True,
        )
        return True

    def wait(self, signals: Signals, watch: Callable[[], None] = lambda: None) -> None:
        """Let some time pass.

        Args:
            signals: of which one ends the waiting at once.
            watch: called again and again meanwhile.

        Raises:
            SystemExit: a signal came.
        """
        end = time.monotonic() + self._wait_seconds()
        while time.monotonic() < end:
            if signals.received:
                name = signal.Signals(signals.received[0]).name
                say(f"stopped by {name} between two starts; the same command goes on from there", stderr=True)
                raise SystemExit(128 + signals.received[0])
            watch()
            time.sleep(POLL_SECONDS)

    def _wait_seconds(self) -> float:
        return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(self.number - 1, 30))

    def _note_reached(self) -> Reached:
        """What the start that has ended tells, kept for those that follow."""
        reached, told = Reached.read(self._place), self._told
        told.folder = reached.folder or told.folder
        if reached.folder is not None and told.restarts:
            told.restarts[-1]["checkpoint"] = reached.checkpoint
        if reached.unit == "step":
            told.reached = max(told.reached, reached.count or 0)
        return reached

    def _give_up(self, reached: Reached, entry: dict[str, Any], reason: str) -> None:
        say(f"not started again: {reason}", stderr=True)
        if reached.folder is None:
            return
        path = Path(reached.folder) / RUN_FILE
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(description, dict) and description.get("status") == "running":
                description["gave_up"] = entry | {"reason": reason}
                atomic_write(path, json.dumps(description, ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError):
            return  # a run that ended before its first step has taken it away; the terminal says it all


def _entry(cause: Failure, reached: Reached) -> dict[str, Any]:
    """Of run.json: when, who, what, and how far the run had come; rank 0 adds what it goes on from."""
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    what: dict[str, Any] = {"status": cause.status}
    if cause.status < 0:
        what = {"signal": signal.Signals(-cause.status).name}
    elif cause.cause:
        what = {"cause": cause.cause}
    return {"at": at, "who": cause.who, **what, reached.unit: reached.count}


def _where(reached: Reached) -> str:
    """Where a start has ended, in words."""
    if reached.count is None:
        return "before training began" if reached.unit == "step" else "before the first answer"
    return f"after {counted(reached.count, 'row')}" if reached.unit == "row" else f"after step {reached.count}"


def _start(told: Told, reached: Reached) -> str:
    """From where the next start goes on, as far as its folder tells: its rank 0 looks whether that one is whole."""
    if told.folder is None:
        return ""
    named = (CHECKPOINT.fullmatch(path.name) for path in Path(told.folder).glob("checkpoint-*"))
    steps = [int(match[1]) for match in named if match is not None and int(match[1]) <= told.reached]
    name = f"checkpoint-{max(steps)}" if steps else reached.checkpoint
    return f" from {name}" if name is not None else " from the beginning"
