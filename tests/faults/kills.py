"""Moments at which training processes are killed, and chains of kills: each followed by the same command."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults.runs import Command, Started
from tests.faults.training_process import Kind, Stop

# The highest count of an event that is waited for: as many happen in a run that starts anew.
MOST: dict[Kind, int] = {"train": 12, "window": 8, "epoch": 1, "step": 4, "evaluate": 8, "save": 60, "final": 8}
LONGEST_SAVE = 0.03  # seconds


@dataclass(frozen=True)
class Aim:
    """When to kill: at an event, some time after the start, or some time after a checkpoint's unfinished folder is seen.

    `alone`: one rank is killed, and the others a little later, as a launcher does.
    """

    at: Kind | Literal["start", "time", "unfinished"]
    alone: bool = False


@dataclass
class Kill:
    """One that was done: what was aimed at, the rank, the last thing that rank did, and folders left half-written."""

    aim: Aim
    rank: int
    last: str
    unfinished: list[str]


def kill_once(command: Command, folder: Path, logs: Path, aim: Aim, draw: random.Random, usual_seconds: float
              ) -> Kill | None:  # fmt: skip
    """Start the command and kill it -9; None where it ended before the moment came.

    Args:
        command: to start.
        folder: its output folder.
        logs: for what it prints.
        aim: the moment.
        draw: for what the aim leaves open.
        usual_seconds: that an undisturbed run takes.
    """
    rank = draw.randrange(command.ranks)
    stop = None
    if aim.at not in ("start", "time", "unfinished"):
        stop = Stop(aim.at, draw.randint(1, MOST[aim.at]), 0 if aim.at in ("save", "final") else rank)
        rank = stop.rank
    started = Started(command, folder, logs, stop)
    try:
        if stop is not None:
            reached = started.wait(lambda: started.stopped(rank))
        elif aim.at == "unfinished":
            reached = _stop_in_save(started, draw)
        else:
            time.sleep(draw.uniform(0, usual_seconds / 6 if aim.at == "start" else usual_seconds))
            reached = not started.ended()
        if reached and aim.alone:
            started.kill([rank])
            time.sleep(draw.uniform(0, 0.5))
    finally:
        started.kill()
    if not reached:
        assert started.statuses() == [0] * command.ranks, started.output()[-4000:]
        return None
    last = [line for line in started.events(rank) if line != "stopped"][-1:]
    return Kill(aim, rank, "".join(last), [path.name for path in folder.glob("*.unfinished")])


def _stop_in_save(started: Started, draw: random.Random) -> bool:
    """Halt all ranks while a checkpoint is being written."""
    wait = draw.uniform(0, LONGEST_SAVE)
    while started.wait(lambda: any(started.folder.glob("checkpoint-*.unfinished"))):
        time.sleep(wait)
        started.signal(signal.SIGSTOP)
        if any(started.folder.glob("checkpoint-*.unfinished")):
            return True
        started.signal(signal.SIGCONT)
        wait /= 2
    return False


def kill_again_and_again(
    command: Command, place: Path, aims: list[Aim], draw: random.Random, usual_seconds: float
) -> tuple[list[Kill], list[Path]]:
    """Kill a run at each of the moments, one after the other, each time starting it by the same command.

    Where a run ends before its moment, the next one starts in a new folder.

    Returns:
        The kills, and the folders of all runs that came to their end.
    """
    kills: list[Kill] = []
    folders = [place / "0"]
    for aim in aims:
        kill = None
        while kill is None:
            kill = kill_once(command, folders[-1], place / "logs", aim, draw, usual_seconds)
            if kill is None:
                folders.append(place / str(len(folders)))
                assert len(folders) <= 2 * len(aims), f"the moment never comes: {aim}"
        kills.append(kill)
        print(f"killed at {aim.at:<10} rank {kill.rank}  after: {kill.last or 'nothing yet':<50} {kill.unfinished}")
    started = Started(command, folders[-1], place / "logs")
    assert started.statuses() == [0] * command.ranks, started.output()[-4000:]
    return kills, folders
