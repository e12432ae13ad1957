"""The launchers of other hosts that this one starts by ssh, and starts again where they are lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from novelgpt.launch.hosts import Place, Remote, read_hostfile, shared_environment

# From one start on a host to the next: a machine that boots does not answer for a while.
SECONDS_BETWEEN_STARTS = 5.0


class Remotes:
    """Of each host of a hostfile but the first one, its launcher.

    Args:
        hostfile: with the hosts; None, and there are none.
        place: of this host.
        words: module, and the words of its command line.
        secret: of the run.
    """

    def __init__(self, hostfile: Path | None, place: Place, words: Sequence[str], secret: bytes) -> None:
        hosts = {} if hostfile is None else read_hostfile(hostfile)
        self._places = {
            host: (name, Place(host, place.hosts, processes, place.address, place.port))
            for host, (name, processes) in enumerate(hosts.items())
            if host > 0
        }
        self._words, self._secret = words, secret
        self._environment = shared_environment()
        self._started: dict[int, float] = {}
        self._remotes: dict[int, Remote] = {}
        for host in self._places:
            self._start(host)

    def check(self) -> None:
        """Raise a UserError where one has ended."""
        for remote in self._remotes.values():
            remote.check()

    def start_again(self, there: Collection[int]) -> None:
        """Start those that have ended and whose hosts are not `there`."""
        for host, remote in list(self._remotes.items()):
            due = time.monotonic() > self._started[host] + SECONDS_BETWEEN_STARTS
            if host not in there and due and remote.process.poll() is not None:
                self._start(host)

    def wait(self, seconds: float | None) -> None:
        """Wait for their ends; after so many seconds, they are left to themselves."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for remote in self._remotes.values():
            try:
                remote.process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                remote.process.terminate()

    def _start(self, host: int) -> None:
        name, place = self._places[host]
        self._started[host] = time.monotonic()
        self._remotes[host] = Remote(name, place, self._words, self._environment, self._secret)
