"""What a launcher that may start a run again, and rank 0 of that run, tell each other in two small files.

A variable in rank 0's environment names the launcher's folder. `told.json` there is written before each start,
`reached.json` by rank 0, which may be killed at any moment: what it has written is there all the same.
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
TOLD, REACHED = "told.json", "reached.json"


@dataclass
class Told:
    """What the start of a run is told of those before it, by the same launcher.

    Attributes:
        folder: that the run has begun; None where none has come so far.
        reached: the highest step of all starts.
        restarts: entries of run.json, the oldest first; see `novelgpt.launch.restarts`.
    """

    folder: str | None = None
    reached: int = 0
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def write(self, place: Path) -> None:
        """Tell the next start, of which nothing is known yet."""
        (place / REACHED).unlink(missing_ok=True)
        (place / TOLD).write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Reached:
    """How far a start has come.

    Attributes:
        folder: of the run, once its run.json is written; None before, and for what has none.
        checkpoint: name of the one that it resumed from; None where it began anew.
        count: steps that are done, or rows that are answered; None before the first could be.
        unit: what is counted.
        finished: whether all is written.
    """

    folder: str | None = None
    checkpoint: str | None = None
    count: int | None = None
    unit: str = "step"
    finished: bool = False

    @classmethod
    def read(cls, place: Path) -> Reached:
        """What rank 0 has told last; nothing where it has told nothing."""
        try:
            return cls(**json.loads((place / REACHED).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return cls()


class Attempt:
    """This start of a run, for rank 0. Where no launcher asks, nothing is told to nobody.

    Attributes:
        told: of the starts before.
        watched: whether a launcher asks, which may start the run again.
    """

    def __init__(self, place: Path | None) -> None:
        self.told = Told()
        self.watched = place is not None
        self._reached = Reached()
        self._file = None
        self._length = 0
        if place is not None:
            self.told = Told(**json.loads((place / TOLD).read_text(encoding="utf-8")))
            self._file = (place / REACHED).open("wb", buffering=0)

    def begin(self, folder: Path, checkpoint: Path | None) -> None:
        """The run has its folder: from here on another start is to go on there."""
        self._reached.folder = str(folder)
        self._reached.checkpoint = None if checkpoint is None else checkpoint.name
        self._write()

    def reach(self, count: int, unit: str = "step") -> None:
        """So many are done. Takes some 20 µs."""
        self._reached.count, self._reached.unit = count, unit
        self._write()

    def finish(self) -> None:
        """All is written: another start would find nothing to do."""
        self._reached.finished = True
        self._write()

    def restarts(self, checkpoint: Path | None) -> list[dict[str, Any]]:
        """Entries of run.json. The last one is that of this start, and gets what it resumes from."""
        entries = [dict(entry) for entry in self.told.restarts]
        if entries:
            entries[-1]["checkpoint"] = None if checkpoint is None else checkpoint.name
        return entries

    def _write(self) -> None:
        if self._file is None:
            return
        content = json.dumps(asdict(self._reached)).encode()
        # In one call, so that a kill leaves the former or the new content; spaces hide what was longer.
        content = content.ljust(self._length)
        self._length = len(content)
        with contextlib.suppress(OSError):  # a full disk: the launcher then knows less, and training goes on
            self._file.seek(0)
            self._file.write(content)


@functools.cache
def this_attempt() -> Attempt:
    """The start that this process is rank 0 of. What it starts itself is no part of it."""
    place = os.environ.pop(VARIABLE, None)
    return Attempt(None if place is None else Path(place))
