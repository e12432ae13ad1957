"""The processes of this host: how they start, fail and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from novelgpt.settings.external_ranks import LAUNCHED, stop_with_parent
from novelgpt.settings.terminal import say, say_text

TAIL_BYTES = 6000


@dataclass(frozen=True)
class RankBlock:
    """The ranks of a host.

    Attributes:
        first_rank: number of its first one.
        processes: how many it has.
        world_size: ranks of all hosts.
        address: of the first host, where the ranks meet.
        port: there.
        interface: network interface towards the other hosts; None on a single host, or where it is not known.
        grouped: whether its processes are ranks; a single one may be none.
    """

    first_rank: int
    processes: int
    world_size: int
    address: str
    port: int
    interface: str | None = None
    grouped: bool = True

    def environment(self, local_rank: int) -> dict[str, str]:
        """Return the variables that torch.distributed, accelerate and DeepSpeed read.

        DeepSpeed's own launcher sets LOCAL_SIZE besides. On a CPU, each rank then takes 66 MB of shared memory for sums
        that only inference uses, and leaves it behind in /dev/shm when it ends.
        """
        if not self.grouped:
            return {}
        variables = {
            "RANK": self.first_rank + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.processes,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            LAUNCHED: 1,
        }
        return {name: str(value) for name, value in variables.items()}


@dataclass(frozen=True)
class Failure:
    """A rank, or a host, that has failed.

    Attributes:
        who: "rank 1 (node2)".
        status: exit status; negative for a signal, as subprocess has it.
        tail: the end of what it printed, where that is not on the terminal.
        cause: why it is gone, of a host.
    """

    who: str
    status: int
    tail: str = ""
    cause: str = ""

    @property
    def exit_status(self) -> int:
        """As a shell has it."""
        return self.status if self.status > 0 else 128 - self.status

    def weight(self) -> int:
        """Order failures, the cause first: where one rank is killed or refuses its settings, the others fail, too."""
        return 0 if self.status < 0 else 1 if self.status == 2 else 2

    def explain(self) -> tuple[str, str]:
        """Return cause and remedy, one line each."""
        again = "the same command resumes from the newest checkpoint"
        remedies = {
            -signal.SIGKILL: "most likely the system had no memory left (`dmesg | tail` on that host says so): a "
            "smaller --per_device_train_batch_size or --max_length, ZERO=3, or more memory",
            -signal.SIGBUS: "most likely /dev/shm is full: make it larger (docker: --shm-size 16g)",
        }
        if self.status not in remedies and not self.who.startswith("rank"):
            return f"{self.who} is gone: {self.cause}", f"look there; {again}"
        if self.status < 0:
            cause = f"{self.who} was killed by {signal.Signals(-self.status).name}"
            return cause, f"{remedies.get(self.status, 'see the lines above')}; {again}"
        return f"{self.who} ended with exit status {self.status}", f"fix what the lines above say; {again}"


def show_tail(failure: Failure) -> None:
    """Show what a rank printed last, where that is not on the terminal."""
    if failure.tail:
        say(f"--- {failure.who} printed last:", stderr=True)
        say_text(f"{failure.tail}\n---", stderr=True)


class Ranks(contextlib.AbstractContextManager["Ranks"]):
    """The running processes of this host. Leaving the context kills what is left of them.

    Rank 0 prints on the terminal. The others print into files under `logs`, so that nothing is shown twice; the end of
    such a file is shown where its rank fails.
    """

    def __init__(
        self,
        block: RankBlock,
        args: Sequence[str],
        environment: Mapping[str, str],
        host: str,
        logs: Path,
        of_first: Mapping[str, str],
    ) -> None:
        """Start them; rank 0 gets the variables `of_first` as well."""
        self.host = host
        self.first_rank = block.first_rank
        self.logs = [logs / f"rank-{block.first_rank + local}.log" for local in range(block.processes)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._seen: set[int] = set()
        further = {} if block.interface is None else {"GLOO_SOCKET_IFNAME": block.interface}
        for local in range(block.processes):
            variables = further | dict(environment) | block.environment(local)
            first = block.first_rank + local == 0
            variables |= of_first if first else {}
            self.processes.append(_start(args, variables, None if first else self.logs[local]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def running(self) -> bool:
        """Whether one of them is still running."""
        return any(process.poll() is None for process in self.processes)

    def newly_ended(self) -> list[Failure]:
        """Return those that have failed since the last call."""
        found = []
        for local, process in enumerate(self.processes):
            status = process.poll()
            if status is not None and local not in self._seen:
                self._seen.add(local)
                if status != 0:
                    # What a killed one had started, such as the processes that load its rows, holds its locks.
                    _kill_session(process.pid)
                    rank = self.first_rank + local
                    tail = "" if rank == 0 else _tail(self.logs[local])
                    found.append(Failure(f"rank {rank} ({self.host})", status, tail))
        return found

    def send(self, number: int) -> None:
        """Forward a signal."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Kill them, with the processes that they started."""
        for process in self.processes:
            if process.poll() is None:
                _kill_session(process.pid)
        for process in self.processes:
            process.wait()


def _start(args: Sequence[str], environment: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    with contextlib.nullcontext() if log is None else log.open("wb") as output:
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which forwards it once.
        return subprocess.Popen(
            [sys.executable, "-u", "-m", *args], env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
            stderr=None if output is None else subprocess.STDOUT, start_new_session=True,
            preexec_fn=stop_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").split("\n")
    # Of a progress bar, which returns to the start of its line, the last state.
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines).strip()
