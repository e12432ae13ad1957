"""The launcher of every host but the first one: its connection to the first host's.

    host 1…                              first host
    Hello ------------------------------> is it one of this run, and its number free?
          <------------------------------ Welcome, or Refused
          <------------------------------ Start: all hosts have joined; these are your ranks
    Report, of each rank that fails ----> forwards it to all hosts
          <------------------------------ End, with the status of the run
    Done ------------------------------->

With `--max_restarts`, an End that is not final comes first, and after Done
          <------------------------------ Start, once more, or the final End
    Quit, on a signal meanwhile --------> ends the run

`messages` signs and validates what is sent, `first_host` accepts hosts that know the secret of the run. A host counts
as lost when its connection ends before it sent `Done`, or when it sends something invalid; kept-alive connections end
within half a minute where a host falls silent.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterable

from novelgpt.launch.hosts import interface_of
from novelgpt.launch.messages import (
    Done,
    End,
    Hello,
    LauncherMessage,
    Link,
    LinkFault,
    Quit,
    RanksStart,
    Refused,
    Report,
    Welcome,
)
from novelgpt.launch.ranks import Failure, RankBlock
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted, say

WAIT_SECONDS = 600.0  # for all hosts to join
ANSWER_SECONDS = 20.0  # for the first host to answer a connection
# For a host number to become free: the first host notices within half a minute that its holder has fallen silent.
TAKEN_SECONDS = 60.0
LOST_STATUS = 1
FIRST_HOST = "the first host"
# Cause and remedy of connections that cannot become any better.
FINAL_FAULTS: dict[LinkFault | None, tuple[str, str]] = {
    LinkFault.FORGED: (
        "the first host, at {place}, has another secret than this one, or belongs to another run",
        "give all hosts the same SECRET_FILE or NOVELGPT_SECRET, and each run a MASTER_PORT of its own",
    ),
    LinkFault.UNKNOWN: ("what answers at {place} is not a launcher of this toolkit", "name another MASTER_PORT"),
    **{
        fault: (f"the first host, at {{place}}: {fault.value}", "take the same version on all hosts")
        for fault in (LinkFault.VERSION, LinkFault.INVALID)
    },
}


class Member:
    """The connection of another host to the first one.

    Attributes:
        status: with which the first host wants the ranks to end; None until it does.
        final: whether the run is over then.
        heals: whether there may be another start.
        started: the first host's order to start the ranks, until `block` takes it.
    """

    def __init__(self, address: str, port: int, hello: Hello, secret: bytes, watch: Callable[[], None]) -> None:
        """Connect and introduce this host, waiting for the first host to listen.

        Raises:
            UserError: it does not, has another secret, or does not accept this host.
        """
        self.status: int | None = None
        self.final = self.heals = False
        self.started: RanksStart | None = None
        self._lost = False
        self.link, messages = _join(address, port, hello, secret, watch)
        self._take(messages)

    def block(self, processes: int, watch: Callable[[], None]) -> RankBlock:
        """Return the ranks of this host, once all hosts have joined.

        Raises:
            UserError: the first host ended.
        """
        if not self.starts_again(watch):
            raise UserError(f"the first host is gone: {self.fault}", "see what it printed")
        assert self.started is not None
        start, self.started, self.status = self.started, None, None
        self.heals = start.heals
        own, first = self.link.connection.getsockname()[0], self.link.connection.getpeername()[0]
        return RankBlock(start.first_rank, processes, start.world_size, first, start.port, interface_of(own))

    def poll(self) -> list[Failure]:
        """Return the loss of the first host; all other failures are the first host's to report."""
        self._take(self.link.receive())
        if self.link.fault is not None and self.status is None and not self._lost:
            self._lost = True
            return [Failure(FIRST_HOST, LOST_STATUS, cause=self.link.fault.value)]
        return []

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Report failures to the first host."""
        for failure in failures:
            self.link.send(Report(who=failure.who, status=failure.status, tail=failure.tail))

    def finish(self, seconds: float) -> list[Failure]:
        """Tell the first host that nothing more will be reported."""
        found = self.poll()
        self.link.send(Done())
        if not self.heals:
            self.link.close()
        return found

    def starts_again(self, watch: Callable[[], None]) -> bool:
        """Wait for the first host's order. False where the run is over, or the first host is gone."""
        while self.started is None and not self.final and self.link.fault is None:
            watch()
            self._take(self.link.receive())
            time.sleep(0.05)
        return self.started is not None

    @property
    def fault(self) -> str:
        """Why the first host is silent."""
        return (self.link.fault or LinkFault.GONE).value

    def quit(self, number: int) -> None:
        """Report that a signal ends this host, and the run with it."""
        self.link.send(Quit(signal=number))

    def close(self, status: int) -> None:
        """Close the connection."""
        self.link.close()

    def _take(self, messages: Iterable[LauncherMessage]) -> None:
        for message in messages:
            if isinstance(message, RanksStart):
                self.started = message
            elif isinstance(message, End):
                self.status, self.final = message.status, message.final
            else:
                self.link.fail(LinkFault.INVALID)


def _join(
    address: str, port: int, hello: Hello, secret: bytes, watch: Callable[[], None]
) -> tuple[Link, list[LauncherMessage]]:
    """Connect to the first host, which must prove to know the secret; also returns what it has sent since."""
    place = f"{address} port {port}"
    started = time.monotonic()
    taken: float | None = None  # since when the number is
    silent = False
    while True:
        watch()
        try:
            connection = socket.create_connection((address, port), timeout=5)
            if connection.getsockname() == connection.getpeername():  # may be so where nobody listens yet
                connection.close()
                raise ConnectionRefusedError("nobody listens there")
            link = Link(connection, secret, first=False)
        except OSError as error:
            trouble = str(error)
        else:
            messages = _ask(link, hello, watch)
            answer = messages[0] if messages else None
            if isinstance(answer, Welcome):
                return link, messages[1:]
            link.close()
            trouble = "ends the connection without an answer"
            if isinstance(answer, Refused):
                if answer.reason == "hosts":
                    raise UserError(
                        f"the first host counts {counted(answer.hosts, 'host')}, this one {hello.hosts}",
                        "give the same number on each",
                    )
                if taken is None:
                    say(f"the first host has a host {hello.host} already; waiting for its place", stderr=True)
                taken = taken or time.monotonic()
                if time.monotonic() - taken > TAKEN_SECONDS:
                    raise UserError(
                        f"the first host has a host {hello.host} already, or its run has begun",
                        "see what it printed; each host needs a number of its own, from 0",
                    )
            elif link.fault in FINAL_FAULTS:
                cause, remedy = FINAL_FAULTS[link.fault]
                raise UserError(cause.format(place=place), remedy)
            elif not silent:
                silent = True
                say(f"{place} {trouble}, as another service or an older version would; trying again", stderr=True)
        if time.monotonic() - started > WAIT_SECONDS:
            raise UserError(
                f"the first host does not answer: {place}: {trouble}",
                "start there too; open the port; or name an address of it that this host can reach",
            )
        time.sleep(0.5)


def _ask(link: Link, hello: Hello, watch: Callable[[], None]) -> list[LauncherMessage]:
    """Introduce this host; returns the answer, or nothing where the connection fails or stays silent."""
    deadline = time.monotonic() + ANSWER_SECONDS
    asked = False
    while link.fault is None and time.monotonic() < deadline:
        watch()
        select.select([link.connection], [], [], 0.05)
        messages = link.receive()
        if messages:
            return messages
        if link.greeted and not asked:
            link.send(hello)
            asked = True
    return []
