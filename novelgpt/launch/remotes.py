"""The launchers of other hosts that this one starts by ssh, and restarts where they are lost."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from novelgpt.launch.hosts import HostPlan, read_hostfile
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-T")
# From one start on a host to the next: a machine that boots does not answer for a while.
SECONDS_BETWEEN_STARTS = 5.0


class Remotes:
    """The launchers of each host of a hostfile but the first one.

    Args:
        hostfile: with the hosts; None, and there are none.
        plan: of this host.
        args: module, and the arguments of its command line.
        secret: of the run.
    """

    def __init__(self, hostfile: Path | None, plan: HostPlan, args: Sequence[str], secret: bytes) -> None:
        hosts = {} if hostfile is None else read_hostfile(hostfile)
        self._plans = {
            host: (name, HostPlan(host, plan.hosts, processes, plan.address, plan.port))
            for host, (name, processes) in enumerate(hosts.items())
            if host > 0
        }
        self._shared = {"args": list(args), "environment": shared_environment(os.environ), "secret": secret.hex()}
        self._started: dict[int, float] = {}
        self._launchers: dict[int, subprocess.Popen[bytes]] = {}
        for host in self._plans:
            self._start(host)

    def check(self) -> None:
        """Raise a UserError where a launcher has ended."""
        for host, launcher in self._launchers.items():
            status, name = launcher.poll(), self._plans[host][0]
            if status is not None:
                raise UserError(
                    f"the launcher on {name} did not start: ssh ended with status {status}",
                    f"see that `ssh {name} true` works without a password, and that {Path.cwd()}, {ROOT} and "
                    f"{sys.executable} are there",
                )

    def restart(self, connected: Collection[int]) -> None:
        """Restart launchers that have ended and whose hosts are not connected."""
        for host, launcher in list(self._launchers.items()):
            due = time.monotonic() > self._started[host] + SECONDS_BETWEEN_STARTS
            if host not in connected and due and launcher.poll() is not None:
                self._start(host)

    def wait(self, seconds: float | None) -> None:
        """Wait for their ends; after so many seconds, the connections to them are closed."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for launcher in self._launchers.values():
            try:
                launcher.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                launcher.terminate()

    def _start(self, host: int) -> None:
        """Start a launcher by ssh.

        It reads its settings and the secret from standard input: every user of that host can read a command line.
        """
        name, plan = self._plans[host]
        self._started[host] = time.monotonic()
        here, root, python = (shlex.quote(str(path)) for path in (Path.cwd(), ROOT, sys.executable))
        command = f"cd {here} && PYTHONPATH={root} exec {python} -m novelgpt.launch --from_stdin"
        # In a session of its own: Ctrl-C ends the run through the ranks, not by cutting the connection.
        launcher = subprocess.Popen([*SSH, name, command], stdin=subprocess.PIPE, start_new_session=True)
        self._launchers[host] = launcher
        assert launcher.stdin is not None
        try:
            launcher.stdin.write(json.dumps({"plan": vars(plan), **self._shared}).encode() + b"\n")
            launcher.stdin.close()
        except OSError:
            launcher.wait()  # ssh has printed why


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that other hosts take over: those of the libraries, none that belong to one host."""
    prefixes = ("NCCL_", "GLOO_", "TORCH", "HF_", "OMP_", "MKL_", "MALLOC_", "PYTHON", "TOKENIZERS_", "DS_", "CUDA_")
    further = ("LANG", "LC_ALL", "UCX_TLS", "UCX_NET_DEVICES", "TRITON_CACHE_DIR")
    own = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME")
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(prefixes) or name in further) and name not in own
    }
