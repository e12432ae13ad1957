"""Which host this is, of how many: from a hostfile, from Slurm, or as given; and its addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*|[A-Za-z0-9][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9._:-]*")
MAX_HOSTS, MAX_PROCESSES = 9999, 1024


@dataclass(frozen=True)
class HostPlan:
    """A host's part in a launch.

    Attributes:
        host: number of this host, from 0.
        hosts: how many there are.
        processes: ranks on this host.
        address: of the first host, as a name or a number.
        port: where the ranks meet; the first host's launcher listens at the next one.
    """

    host: int
    hosts: int
    processes: int
    address: str
    port: int

    def __post_init__(self) -> None:
        """Check ranges, before any process is started.

        Raises:
            UserError: impossible numbers, or more processes than a machine has use for.
        """
        if not (0 <= self.host < self.hosts <= MAX_HOSTS and self.processes >= 1):
            raise UserError(
                f"there can be no host {self.host} of {self.hosts} with {counted(self.processes, 'process')}",
                "hosts count from 0; each has at least one process",
            )
        if not 1 <= self.port < 65535:
            raise UserError(f"ranks cannot meet at port {self.port} and the next one", "MASTER_PORT=29500, for example")
        if self.processes > MAX_PROCESSES:
            raise UserError(
                f"{self.processes} processes on one host are too many", f"take at most {MAX_PROCESSES}, one a device"
            )


def read_hostfile(path: Path) -> dict[str, int]:
    """Read hosts and their numbers of processes from lines of `host slots=N`.

    Raises:
        UserError: names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"HOSTFILE={path}: {cause}", "write a file with lines of `host slots=N`") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        host, *rest = fields
        slots = re.fullmatch(r"slots=([1-9][0-9]*)", " ".join(rest))
        if slots is None or not _HOST.fullmatch(host):
            raise UserError(f"{path}:{number}: {line.strip()!r} is not a host", "write lines of `host slots=N`")
        if host in hosts:
            raise UserError(f"{path}:{number}: {host} is listed already", "give each host one line")
        if int(slots[1]) > MAX_PROCESSES:
            raise UserError(f"{path}:{number}: {slots[1]} processes are too many", f"take at most {MAX_PROCESSES}")
        hosts[host] = int(slots[1])
    if not hosts:
        raise UserError(f"HOSTFILE={path} names no host", "write lines of `host slots=N`")
    return hosts


def slurm_plan(environment: Mapping[str, str], processes: int) -> HostPlan:
    """Return this task's part in a Slurm step of one task per host.

    Raises:
        UserError: the step has another shape.
    """
    try:
        hosts = int(environment["SLURM_STEP_NUM_NODES"])
        tasks = int(environment["SLURM_STEP_NUM_TASKS"])
        host = int(environment["SLURM_PROCID"])
        names = environment["SLURM_STEP_NODELIST"]
        # Steps of one job, and jobs of one host, do not meet.
        port = 20000 + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"]) * 2) % 20000
    except (KeyError, ValueError) as error:
        raise UserError(
            f"this is not a step of a Slurm job: {error}",
            "start it with srun, one task per host: srun --ntasks-per-node=1",
        ) from error
    if tasks != hosts:
        raise UserError(
            f"{counted(tasks, 'Slurm task')} on {counted(hosts, 'host')}",
            "one task per host starts all its processes: srun --ntasks-per-node=1, with NPROC processes each",
        )
    return HostPlan(host, hosts, processes, first_host(names), port)


def first_host(names: str) -> str:
    """Return the first of Slurm's list of hosts: of `gpu[03-05,09],login`, gpu03."""
    found = re.match(r"([^,\[\]]+)(?:\[([0-9]+)[^\]]*\]([^,\[\]]*))?", names)
    if found is None:
        raise UserError(f"{names!r} is not a list of hosts", "see SLURM_STEP_NODELIST")
    return found[1] + (found[2] or "") + (found[3] or "")


def is_loopback(name: str) -> bool:
    """Whether a name or an address means, to any host, that host itself."""
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name == "localhost" or name.startswith("localhost.")


def local_addresses(name: str, port: int = 0) -> list[tuple[int, tuple[str | int, ...]]]:
    """Return family and socket address of the addresses of a host name that this machine can bind."""
    found: list[tuple[int, tuple[str | int, ...]]] = []
    try:
        entries = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    for family, kind, protocol, _, address in entries:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            found.append((int(family), (address[0], port, *address[2:])))
    return found


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address, such as eth0."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), None)
