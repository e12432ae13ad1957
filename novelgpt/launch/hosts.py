"""Which host this is, of how many: from a hostfile, from Slurm, or as told."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT
from novelgpt.settings.terminal import counted

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*|[A-Za-z0-9][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9._:-]*")
MOST_HOSTS, MOST_PROCESSES = 9999, 1024
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-T")


@dataclass(frozen=True)
class Place:
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
        """Refuse numbers that cannot be, and more processes than a machine has use for, before any is started.

        Raises:
            UserError: so it is.
        """
        if not (0 <= self.host < self.hosts <= MOST_HOSTS and self.processes >= 1):
            raise UserError(
                f"there can be no host {self.host} of {self.hosts} with {counted(self.processes, 'process')}",
                "hosts count from 0; each has at least one process",
            )
        if not 1 <= self.port < 65535:
            raise UserError(
                f"port {self.port} and the next one are no ports to meet at", "MASTER_PORT=29500, for example"
            )
        if self.processes > MOST_PROCESSES:
            raise UserError(
                f"{self.processes} processes on one host are too many", f"take at most {MOST_PROCESSES}, one a device"
            )


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their numbers of processes, from lines of `host slots=N`.

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
        words = line.split("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9][0-9]*)", words[1]) if len(words) == 2 else None
        if slots is None or not _HOST.fullmatch(words[0]):
            raise UserError(f"{path}:{number}: {line.strip()!r} is no host", "write lines of `host slots=N`")
        if words[0] in hosts:
            raise UserError(f"{path}:{number}: {words[0]} stands there already", "give each host one line")
        if int(slots[1]) > MOST_PROCESSES:
            raise UserError(f"{path}:{number}: {slots[1]} processes are too many", f"take at most {MOST_PROCESSES}")
        hosts[words[0]] = int(slots[1])
    if not hosts:
        raise UserError(f"HOSTFILE={path} names no host", "write lines of `host slots=N`")
    return hosts


def slurm_place(environment: Mapping[str, str], processes: int) -> Place:
    """This task's part in a Slurm step of one task a host.

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
            f"this is no step of a Slurm job: {error}", "start it with srun, one task a host: srun --ntasks-per-node=1"
        ) from error
    if tasks != hosts:
        raise UserError(
            f"{counted(tasks, 'Slurm task')} on {counted(hosts, 'host')}",
            "one task a host starts all its processes: srun --ntasks-per-node=1, with NPROC processes each",
        )
    return Place(host, hosts, processes, first_host(names), port)


def first_host(names: str) -> str:
    """The first of Slurm's list of hosts: `gpu[03-05,09],login` begins with gpu03."""
    found = re.match(r"([^,\[\]]+)(?:\[([0-9]+)[^\]]*\]([^,\[\]]*))?", names)
    if found is None:
        raise UserError(f"{names!r} is no list of hosts", "see SLURM_STEP_NODELIST")
    return found[1] + (found[2] or "") + (found[3] or "")


def is_loopback(name: str) -> bool:
    """Whether a name or an address means the host itself to whoever uses it."""
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name == "localhost" or name.startswith("localhost.")


def local_addresses(name: str) -> list[tuple[int, tuple[str | int, ...]]]:
    """Where a host's name leads on this machine: family and socket address, with port 0, of what can be bound."""
    found: list[tuple[int, tuple[str | int, ...]]] = []
    try:
        entries = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    for family, kind, protocol, _, address in entries:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            found.append((int(family), cast(tuple[str | int, ...], address)))
    return found


class Remote:
    """The launcher of another host, started by ssh. What it needs to know goes through its standard input."""

    def __init__(
        self, name: str, place: Place, words: Sequence[str], environment: Mapping[str, str], secret: bytes
    ) -> None:
        """Neither settings nor the secret stand in the command line, where every user of that host could read them."""
        self.name = name
        here = shlex.quote(str(Path.cwd()))
        command = f"cd {here} && PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)}"
        # In a session of its own: Ctrl-C ends the run through the ranks, not by cutting the connection.
        self.process = subprocess.Popen(
            [*_SSH, name, f"{command} -m novelgpt.launch --from_stdin"], stdin=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdin is not None
        plan = {"place": vars(place), "words": list(words), "environment": dict(environment), "secret": secret.hex()}
        try:
            self.process.stdin.write(json.dumps(plan).encode() + b"\n")
            self.process.stdin.close()
        except OSError:
            self.process.wait()  # it has said why

    def check(self) -> None:
        """Raise a UserError where it has ended."""
        status = self.process.poll()
        if status is not None:
            raise UserError(
                f"the launcher on {self.name} did not start: ssh ended with status {status}",
                f"see that `ssh {self.name} true` works without a password, and that {Path.cwd()}, {ROOT} and "
                f"{sys.executable} are there",
            )


def shared_environment() -> dict[str, str]:
    """What the other hosts take over: variables of the libraries, none that belong to one host."""
    prefixes = ("NCCL_", "GLOO_", "TORCH", "HF_", "OMP_", "MKL_", "MALLOC_", "PYTHON", "TOKENIZERS_", "DS_", "CUDA_")
    further = ("LANG", "LC_ALL", "UCX_TLS", "UCX_NET_DEVICES", "TRITON_CACHE_DIR")
    own = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME")
    return {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(prefixes) or name in further) and name not in own
    }
