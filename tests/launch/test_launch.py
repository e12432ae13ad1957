"""The launcher with ranks that are small scripts: what they are told, what is printed, how all of them end."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from novelgpt.launch.hosts import HostPlan, first_host, read_hostfile, slurm_plan
from novelgpt.settings.errors import UserError
from tests.launched import OF_LAUNCHERS, PATIENCE, ROOT

# Each line of a rank's script may use these.
BEGIN = "import json, os, signal, sys, time\nrank = int(os.environ.get('RANK', '0'))\n"
FOREVER = "\ntime.sleep(600)\n"
SECRET = b"what the hosts of this run know"


@contextmanager
def launcher(
    folder: Path, script: str, *options: str, prefix: tuple[str, ...] = (), **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """`python -m novelgpt.launch` of a module with this text."""
    (folder / "work.py").write_text(BEGIN + script, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    (folder / "secret").touch(mode=0o600)
    (folder / "secret").write_text(SECRET.decode(), encoding="utf-8")
    environment |= {"PYTHONPATH": f"{ROOT}:{folder}", "FOLDER": str(folder), "SECRET_FILE": "secret"} | variables
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "novelgpt.launch", *options, "work"], env=environment, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        ranks = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        for rank in ranks:
            rank.kill()
        process.communicate()


def launch(folder: Path, script: str, *options: str, **variables: str) -> tuple[int, str, str]:
    """Status, standard output and standard error, at its end."""
    with launcher(folder, script, *options, **variables) as process:
        output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output, errors


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def free_port() -> int:
    """One that is free, as is the next, and that no connection is given meanwhile."""
    for port in random.sample(range(20000, 32000, 2), 100):
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket() as further:
            probe.bind(("", port))
            further.bind(("", port + 1))
            return port
    raise AssertionError("no free ports")


def test_ranks_know_each_other_and_only_the_first_one_prints(tmp_path: Path) -> None:
    script = "json.dump(dict(os.environ), open(f'{rank}.json', 'w')); print('rank', rank)"
    status, output, errors = launch(tmp_path, script, "--processes", "3")
    assert (status, output, errors) == (0, "rank 0\n", "")
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, variables in enumerate(told):
        wanted = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        assert wanted.items() <= variables.items()
    assert len({(variables["MASTER_ADDR"], variables["MASTER_PORT"]) for variables in told}) == 1


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_rank_ends_the_others_with_its_cause(victim: int, tmp_path: Path) -> None:
    script = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == {victim}: os.kill(os.getpid(), 9){FOREVER}"
    status, _, errors = launch(tmp_path, script, "--processes", "2")
    assert status == 128 + 9
    assert (
        f"error: rank {victim} ({socket.gethostname()}) was killed by SIGKILL\n  fix: most likely the system" in errors
    )


def test_the_words_of_the_rank_that_failed_are_shown(tmp_path: Path) -> None:
    script = f"print('all is well')\nif rank == 1: raise ValueError('it is broken'){FOREVER}"
    status, output, errors = launch(tmp_path, script, "--processes", "2")
    assert (status, output) == (1, "all is well\n")
    assert errors.count("ValueError: it is broken") == 1
    assert f"error: rank 1 ({socket.gethostname()}) ended with exit status 1" in errors


@pytest.mark.parametrize("which", ["rank >= 0", pytest.param("rank == 0", marks=pytest.mark.long), "rank == 1"])
def test_an_error_of_use_is_printed_once_whoever_has_it(which: str, tmp_path: Path) -> None:
    refuse = "print('error: no such file\\n  fix: name another', file=sys.stderr); sys.exit(2)"
    status, _, errors = launch(tmp_path, f"if {which}: {refuse}{FOREVER}", "--processes", "2")
    assert (status, errors) == (2, "error: no such file\n  fix: name another\n")


LISTEN = """
def note(number, frame):
    open(f'{rank}.noted', 'a').write(f'{number}\\n')
    if leaves: time.sleep(0.3); sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP): signal.signal(number, note)
open(f'{rank}.ready', 'w').close()
while True: time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_each_rank_once_and_they_end_in_their_time(number: signal.Signals, tmp_path: Path) -> None:
    with launcher(tmp_path, "leaves = True" + LISTEN, "--processes", "2") as process:
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        os.killpg(process.pid, number)  # the whole group, as a terminal does
        assert process.wait(timeout=PATIENCE) == 128 + number
    assert [(tmp_path / f"{rank}.noted").read_text() for rank in (0, 1)] == [f"{int(number)}\n"] * 2


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    """As under nohup: a lost terminal ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launcher(tmp_path, "leaves = True" + LISTEN, "--processes", "2") as process:
            wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
            os.killpg(process.pid, signal.SIGHUP)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [(tmp_path / f"{rank}.noted").read_text() for rank in (0, 1)] == [f"{int(signal.SIGTERM)}\n"] * 2


def test_a_second_signal_ends_them_at_once(tmp_path: Path) -> None:
    with launcher(tmp_path, "leaves = False" + LISTEN, "--processes", "2") as process:
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        process.send_signal(signal.SIGUSR1)  # a warning ahead: it does not count
        process.send_signal(signal.SIGTERM)
        wait_for(tmp_path / "0.noted", tmp_path / "1.noted")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM


def test_ranks_hear_of_the_end_of_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = "open(f'{rank}.pid', 'w').write(str(os.getpid()))\nleaves = True" + LISTEN
    with launcher(tmp_path, script, "--processes", "2") as process:
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        process.kill()
        wait_for(tmp_path / "0.noted", tmp_path / "1.noted")
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.noted").read_text() == f"{int(signal.SIGTERM)}\n"


def test_signals_before_the_ranks_listen_end_the_run(tmp_path: Path) -> None:
    with launcher(tmp_path, f"open(f'{{rank}}.ready', 'w').close(){FOREVER}", "--processes", "2") as process:
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (128 + signal.SIGTERM, "stopped by SIGTERM before training began\n")


def on_two_hosts(port: int, host: int, processes: int) -> list[str]:
    words = ["--hosts", "2", "--host", str(host), "--address", "127.0.0.1", "--port", str(port)]
    return [*words, "--processes", str(processes)]


def test_two_launchers_share_out_the_ranks(tmp_path: Path) -> None:
    port = free_port()
    script = "json.dump(dict(os.environ), open(f'{rank}.json', 'w')); print('rank', rank)"
    with launcher(tmp_path, script, *on_two_hosts(port, 1, 2)) as other:
        status, output, _ = launch(tmp_path, script, *on_two_hosts(port, 0, 1))
        assert (status, other.wait(timeout=PATIENCE)) == (0, 0)
    assert output.splitlines()[1:] == ["rank 0"]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [variables["LOCAL_RANK"] for variables in told] == ["0", "0", "1"]
    assert {variables["WORLD_SIZE"] for variables in told} == {"3"}


def test_a_rank_that_dies_on_another_host_ends_all_and_the_first_host_says_why(tmp_path: Path) -> None:
    port = free_port()
    script = f"if rank == 2: print('1 %\\r2 %\\rso sorry \\x1b[2J'); sys.exit(7){FOREVER}"
    with launcher(tmp_path, script, *on_two_hosts(port, 1, 2)) as other:
        status, _, errors = launch(tmp_path, script, *on_two_hosts(port, 0, 1))
        assert (status, other.wait(timeout=PATIENCE)) == (7, 7)
    assert "\nso sorry <U+001B>[2J\n" in errors  # a bar as it stood last, and nothing that steers
    assert f"error: rank 2 ({socket.gethostname()}) ended with exit status 7" in errors


@pytest.mark.parametrize(
    "victim", [0, pytest.param(1, marks=pytest.mark.long)]
)  # the first one is told in test_channel
def test_a_host_that_is_lost_ends_the_other(victim: int, tmp_path: Path) -> None:
    port = free_port()
    script = f"open(f'{{rank}}.ready', 'w').close(){FOREVER}"
    with (
        launcher(tmp_path, script, *on_two_hosts(port, 0, 1)) as first,
        launcher(tmp_path, script, *on_two_hosts(port, 1, 1)) as second,
    ):
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        lost, left = (first, second) if victim == 0 else (second, first)
        lost.kill()
        _, errors = left.communicate(timeout=PATIENCE)
        assert left.returncode != 0
    assert ("host 1" if victim == 1 else "the first host") in errors


def test_a_stop_on_one_host_is_a_stop_on_all(tmp_path: Path) -> None:
    port = free_port()
    with (
        launcher(tmp_path, f"open(f'{{rank}}.ready', 'w').close(){FOREVER}", *on_two_hosts(port, 0, 1)) as first,
        launcher(tmp_path, f"open(f'{{rank}}.ready', 'w').close(){FOREVER}", *on_two_hosts(port, 1, 1)) as second,
    ):
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
        assert second.wait(timeout=PATIENCE) == 128 + signal.SIGTERM


def test_first_host_of_a_slurm_list() -> None:
    lists = {"gpu[03-05,09],login": "gpu03", "a1,b[2-3]": "a1", "node7": "node7", "r[1-2]-x,r9": "r1-x"}
    assert {names: first_host(names) for names in lists} == lists


def test_a_slurm_task_becomes_the_launcher_of_its_host() -> None:
    task = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "4711"}
    task |= {"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_ID": "0"}
    place = slurm_plan(task, 8)
    assert (place.host, place.hosts, place.processes, place.address) == (1, 2, 8, "gpu03")
    assert slurm_plan(task | {"SLURM_PROCID": "0"}, 8).port == place.port
    with pytest.raises(UserError, match="8 Slurm tasks on 2 hosts"):
        slurm_plan(task | {"SLURM_STEP_NUM_TASKS": "8"}, 1)
    with pytest.raises(UserError, match="not a step of a Slurm job"):
        slurm_plan({}, 1)


@pytest.mark.parametrize(
    "line",
    ["node1", "node1 slots=0", "node1 slots=two", "-oProxyCommand=x slots=1", "a;b slots=1", "node1 slots=99999"],
)
def test_a_line_of_a_hostfile_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"# ours\nnode0 slots=2\n{line}\n")
    with pytest.raises(UserError, match="hosts:3: "):
        read_hostfile(tmp_path / "hosts")


def test_more_processes_than_a_host_has_use_for_are_refused_before_any_starts() -> None:
    with pytest.raises(UserError, match="1000000 processes on one host are too many"):
        HostPlan(0, 1, 1_000_000, "127.0.0.1", 20000)


def test_the_only_host_of_a_hostfile_is_this_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("user@192.0.2.1 slots=1\n", encoding="utf-8")
    status, output, errors = launch(tmp_path, "print('trained')", "--hostfile", "hosts")
    assert (status, output) == (2, "")
    assert "starts with user@192.0.2.1, which is not this host\n  fix: " in errors
    (tmp_path / "hosts").write_text(f"{socket.gethostname()} slots=1\n", encoding="utf-8")
    assert launch(tmp_path, "print('trained')", "--hostfile", "hosts")[:2] == (0, "trained\n")
