"""Two small files by which a launcher that may restart a run, and rank 0 of that run, exchange progress.

A variable in rank 0's environment names the launcher's folder. `record.json` there is written before each start,
`progress.json` by rank 0, which may be killed at any moment: what it has written stays.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "NOVELGPT_ATTEMPT"
RECORD, PROGRESS = "record.json", "progress.json"


@dataclass
class StartRecord:
    """The starts so far, by one launcher, as the next start reads them.

    Attributes:
        folder: of the run; None until a start has one.
        reached: the highest step of all starts.
        restarts: entries of run.json, the oldest first; see `novelgpt.launch.restarts`.
    """

    folder: str | None = None
    reached: int = 0
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def write(self, place: Path) -> None:
        """Write it for the next start, which has made no progress yet."""
        (place / PROGRESS).unlink(missing_ok=True)
        (place / RECORD).write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Progress:
    """The progress of a start.

    Attributes:
        folder: of the run, once its run.json is written; None before, and for commands without one.
        checkpoint: name of the one that it resumed from; None where it started anew.
        count: steps that are done, or rows that are answered; None before the first could be.
        unit: of the count.
        finished: whether everything is written.
    """

    folder: str | None = None
    checkpoint: str | None = None
    count: int | None = None
    unit: str = "step"
    finished: bool = False

    @classmethod
    def read(cls, place: Path) -> Progress:
        """Read what rank 0 has written last; empty where it has written nothing."""
        try:
            return cls(**json.loads((place / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return cls()


class Attempt:
    """This start of a run, for rank 0. Without a launcher that may restart it, nothing is written.

    Attributes:
        record: of the starts before.
        watched: whether a launcher may restart the run.
    """

    def __init__(self, place: Path | None) -> None:
        self.record = StartRecord()
        self.watched = place is not None
        self._progress = Progress()
        self._file = None
        self._length = 0
        if place is not None:
            self.record = StartRecord(**json.loads((place / RECORD).read_text(encoding="utf-8")))
            self._file = (place / PROGRESS).open("wb", buffering=0)

    def begin(self, folder: Path, checkpoint: Path | None) -> None:
        """Note the run's folder: from here on a restart resumes there."""
        self._progress.folder = str(folder)
        self._progress.checkpoint = None if checkpoint is None else checkpoint.name
        self._write()

    def reach(self, count: int, unit: str = "step") -> None:
        """Note how many are done. Takes some 20 µs."""
        self._progress.count, self._progress.unit = count, unit
        self._write()

    def finish(self) -> None:
        """Note that everything is written: a restart would have nothing to do."""
        self._progress.finished = True
        self._write()

    def restarts(self, checkpoint: Path | None) -> list[dict[str, Any]]:
        """Return entries of run.json. The last one is that of this start, and gets the checkpoint it resumes from."""
        entries = [dict(entry) for entry in self.record.restarts]
        if entries:
            entries[-1]["checkpoint"] = None if checkpoint is None else checkpoint.name
        return entries

    def _write(self) -> None:
        if self._file is None:
            return
        content = json.dumps(asdict(self._progress)).encode()
        # In one call, so that a kill leaves the former or the new content; spaces hide what was longer.
        content = content.ljust(self._length)
        self._length = len(content)
        with contextlib.suppress(OSError):  # a full disk: the launcher then knows less, and training continues
            self._file.seek(0)
            self._file.write(content)


@functools.cache
def this_attempt() -> Attempt:
    """Return the start that this process is rank 0 of. Processes that it starts are not part of it."""
    place = os.environ.pop(VARIABLE, None)
    return Attempt(None if place is None else Path(place))
