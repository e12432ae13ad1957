"""Launchers of several hosts among strangers: who joins, who does not, and what becomes of the run."""

import contextlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from novelgpt.launch.first_host import Listener
from novelgpt.launch.hosts import local_addresses
from novelgpt.launch.messages import Link, LinkFault, Welcome
from novelgpt.launch.secret import forget_secret, read_secret
from novelgpt.settings.errors import UserError
from tests.hostile_launchers import HELLO, NESTED, Wire, flood, hostile, join, silent
from tests.launch.test_launch import SECRET, free_port, launch, launcher, on_two_hosts, wait_for
from tests.launched import PATIENCE

WORK = """
json.dump(dict(os.environ), open(f'{rank}.json.part', 'w'))
os.rename(f'{rank}.json.part', f'{rank}.json')
while not os.path.exists('go'): time.sleep(0.01)
"""


def on_hosts(hosts: int, port: int, host: int) -> list[str]:
    return ["--hosts", str(hosts), "--host", str(host), "--address", "127.0.0.1", "--port", str(port)]


def until_listening(port: int) -> tuple[str, int]:
    place = ("127.0.0.1", port + 1)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(place) as connection:
            if connection.getsockname() != place:  # of the ports that connections are given, it may be this one
                return place
        time.sleep(0.05)
    raise AssertionError("the first host does not listen")


def test_strangers_disturb_no_run_while_hosts_gather_nor_while_they_train(tmp_path: Path) -> None:
    port = free_port()
    with launcher(tmp_path, WORK, *on_hosts(3, port, 0)) as first:
        place = until_listening(port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", place[1]))  # where nobody looks for it, it does not listen
        recorded = join(place, SECRET)
        after: list[Callable[[Wire], object]] = [
            lambda wire: wire.put(os.urandom(100)),
            lambda wire: wire.put(struct.pack("!I", 2**32 - 1) + bytes(32)),
            lambda wire: wire.put(wire.frame(json.dumps(HELLO).encode())),  # once more, signed as the first time
            lambda wire: wire.say(HELLO, 1),
            lambda wire: wire.say({"kind": "done"}, 1),
            lambda wire: wire.put(wire.frame(NESTED, 1)),
            lambda wire: wire.say({"kind": "report", "who": "rank 1", "status": 10**9, "tail": ""}, 1),
        ]
        member = recorded
        for misbehave in after:
            misbehave(member)
            assert member.hung_up()
            member = join(place, SECRET)
        member.socket.close()
        flood(place, 2000, seed=1)
        wires = list(hostile(place, SECRET, recorded))
        assert len(wires) > 30
        assert all(wire.hung_up() for wire in wires)
        idle = silent(place, 100)
        with (
            launcher(tmp_path, WORK, *on_hosts(3, port, 1)) as second,
            launcher(tmp_path, WORK, *on_hosts(3, port, 2)) as third,
        ):
            wait_for(*(tmp_path / f"{rank}.json" for rank in range(3)))
            flood(place, 2000, seed=2)
            for hosts, reason in ((3, "taken"), (4, "hosts")):
                refused = Wire(place, SECRET).greet().say(HELLO | {"hosts": hosts})
                assert refused.hear() == {"kind": "refused", "reason": reason, "hosts": 3}
            wires = list(hostile(place, SECRET, recorded))
            assert all(wire.hung_up() for wire in wires)
            idle += silent(place, 100)
            (tmp_path / "go").touch()
            _, errors = first.communicate(timeout=PATIENCE)
            assert (first.returncode, second.wait(timeout=PATIENCE), third.wait(timeout=PATIENCE)) == (0, 0, 0), errors
        assert all(wire.hung_up() for wire in idle)
    for rank in range(3):
        variables = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (variables["RANK"], variables["WORLD_SIZE"]) == (str(rank), "3")
        assert not {"SECRET_FILE", "NOVELGPT_SECRET"} & variables.keys()
    # Of more than 4,000 strangers, each thing is said once; and each time that a host had joined.
    *lines, last = errors.splitlines()
    assert re.fullmatch(rf"port {place[1]}: 4,\d+ connections of others than this run's hosts were dropped", last)
    assert {line for line in lines if "has left" not in line} == {
        "a launcher at 127.0.0.1 has another secret: it may not join",
        "a launcher at 127.0.0.1 runs another version of this toolkit: it may not join",
    }
    assert len(lines) == 2 + len(after)


def test_with_another_secret_nobody_joins(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "go").touch()
    with launcher(tmp_path, WORK, *on_two_hosts(port, 0, 1)) as first:
        status, _, errors = launch(
            tmp_path, WORK, *on_two_hosts(port, 1, 1), SECRET_FILE="", NOVELGPT_SECRET="that of another run"
        )
        assert (status, list(tmp_path.glob("*.json"))) == (2, [])
        assert f"error: the first host, at 127.0.0.1 port {port + 1}, has another secret than this one" in errors
        assert "\n  fix: give all hosts the same SECRET_FILE or NOVELGPT_SECRET" in errors
        status, _, _ = launch(
            tmp_path, WORK, *on_two_hosts(port, 1, 1), SECRET_FILE="", NOVELGPT_SECRET=SECRET.decode() + "\n"
        )
        _, errors = first.communicate(timeout=PATIENCE)
        assert (status, first.returncode) == (0, 0)
    assert errors.splitlines()[0] == "a launcher at 127.0.0.1 has another secret: it may not join"


MISBEHAVIOUR: dict[str, Callable[[Wire], object]] = {
    "was not signed": lambda wire: wire.put(os.urandom(100)),
    "does not know": lambda wire: wire.say({"kind": "end", "status": 0}, 1),
    "connection is cut": lambda wire: wire.socket.shutdown(socket.SHUT_WR),
}


@pytest.mark.parametrize("why", MISBEHAVIOUR)
def test_a_host_that_misbehaves_during_the_run_counts_as_lost(why: str, tmp_path: Path) -> None:
    port = free_port()
    with launcher(tmp_path, WORK, *on_two_hosts(port, 0, 1)) as first:
        wire = join(until_listening(port), SECRET, hosts=2, name="node2")
        start = {"kind": "start", "first_rank": 1, "world_size": 2, "port": port, "heals": False}
        assert wire.hear(1) == start
        wait_for(tmp_path / "0.json")
        MISBEHAVIOUR[why](wire)
        assert wire.hung_up()
        (tmp_path / "go").touch()  # the rank ends as it should; the run has lost a host all the same
        _, errors = first.communicate(timeout=PATIENCE)
        assert first.returncode == 1
    assert "error: host 1 (node2, 127.0.0.1) is gone: " in errors
    assert why in errors


@contextmanager
def impostor(greet: Callable[[bytes], bytes]) -> Iterator[int]:
    """Something that answers where the first host should; yields the port of the ranks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=answer, args=(listener, greet), daemon=True)
        answering.start()
        yield listener.getsockname()[1] - 1
        answering.join(PATIENCE)


def answer(listener: socket.socket, greet: Callable[[bytes], bytes]) -> None:
    connection, _ = listener.accept()
    with connection:
        greeting = connection.recv(42, socket.MSG_WAITALL)
        connection.sendall(greet(greeting))
        hello = connection.recv(1 << 16)
        if hello:
            connection.sendall(hello)  # signed by the member itself
            connection.recv(1)


IMPOSTORS: dict[str, Callable[[bytes], bytes]] = {
    "has another secret": lambda greeting: greeting,
    "runs another version": lambda greeting: greeting[:8] + struct.pack("!H", 4) + greeting[10:],
    "is not a launcher": lambda greeting: b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("why", IMPOSTORS)
def test_what_does_not_know_the_secret_is_no_first_host(why: str, tmp_path: Path) -> None:
    with impostor(IMPOSTORS[why]) as port:
        status, _, errors = launch(tmp_path, WORK, *on_two_hosts(port, 1, 1))
    assert (status, list(tmp_path.glob("*.json"))) == (2, [])
    assert why in errors.splitlines()[0]
    assert errors.splitlines()[1].startswith("  fix: ")


def test_several_hosts_without_a_secret_are_refused(tmp_path: Path) -> None:
    status, _, errors = launch(tmp_path, WORK, *on_two_hosts(free_port(), 0, 1), SECRET_FILE="")
    assert status == 2
    assert errors.splitlines()[0] == "error: several hosts need a secret, by which they authenticate each other"
    command = errors.partition("(")[2].partition(")")[0]
    (tmp_path / "secret").unlink()
    subprocess.run(["bash", "-c", f"({command})"], cwd=tmp_path, check=True)
    assert len(read_secret("", str(tmp_path / "secret"), slurm=False)) == 44  # 32 bytes as base64
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    step |= {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_ID": "0"}
    status, _, errors = launch(tmp_path, WORK, "--slurm", SECRET_FILE="", **step)
    assert status == 2
    assert "  fix: set it before srun, as scripts/slurm.sh does: export NOVELGPT_SECRET=" in errors


def test_a_secret_is_read_from_a_file_that_nobody_else_can_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"

    def read(**variables: str) -> bytes:
        given = forget_secret(variables)
        assert variables == {}
        return read_secret(*given, slurm=False)

    path.write_bytes(b" 0123456789abcdef\n")
    path.chmod(0o600)
    assert read(SECRET_FILE=str(path), NOVELGPT_SECRET="something else") == b"0123456789abcdef"
    for mode in (0o640, 0o604, 0o622):
        path.chmod(mode)
        with pytest.raises(UserError, match="can be read or changed by others"):
            read(SECRET_FILE=str(path))
    path.chmod(0o600)
    for content in (b"", b"0123456789abcde \n", bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a secret has 16 to 4096 bytes"):
            read(SECRET_FILE=str(path))
    with pytest.raises(UserError, match="NOVELGPT_SECRET: a secret has 16 to 4096 bytes, not 15"):
        read(NOVELGPT_SECRET="0123456789abcde\n")
    os.mkfifo(tmp_path / "pipe", 0o600)  # into which nobody writes
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="SECRET_FILE="):
            read(SECRET_FILE=str(wrong))


def test_where_a_name_leads_only_to_the_host_itself_it_listens_for_others(tmp_path: Path) -> None:
    """As Debian's /etc/hosts has it for a host's own name."""
    (tmp_path / "names").write_text("127.0.0.1 localhost\n127.0.1.1 node1.example node1\n")
    own = f'mount --bind "{tmp_path}/names" /etc/hosts && exec "$@"'
    prefix = ("unshare", "--mount", "bash", "-c", own, "own")
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    port = free_port()
    (tmp_path / "go").touch()
    words = ["--hosts", "2", "--host", "0", "--address", "node1", "--port", str(port)]
    with launcher(tmp_path, WORK, *words, prefix=prefix) as first:
        assert launch(tmp_path, WORK, *on_two_hosts(port, 1, 1))[0] == 0
        _, errors = first.communicate(timeout=PATIENCE)
    assert (first.returncode, errors) == (
        0, f"node1 leads only to this host itself: listening at port {port + 1} of all its interfaces\n"
    )  # fmt: skip


def test_on_all_interfaces_it_listens_for_hosts_of_both_kinds_of_addresses() -> None:
    if not local_addresses("::"):
        pytest.skip("there is no IPv6 here")
    port = free_port()
    with contextlib.closing(Listener("nowhere.invalid", port, SECRET)) as door:
        for name in ("127.0.0.1", "::1"):
            with socket.create_connection((name, port)) as connection:
                while not select.select([connection], [], [], 0)[0]:
                    assert door.arrivals(0.05) == []
                assert connection.recv(8) == b"novelgpt"


def test_the_first_host_waits_for_nobody_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("novelgpt.launch.messages.SEND_SECONDS", PATIENCE)
    ends = socket.socketpair()
    first, member = (Link(end, SECRET, first=end is ends[0]) for end in ends)
    while not (first.greeted and member.greeted):
        assert first.receive() == member.receive() == []
    while first.fault is None:
        first.send(Welcome())
    assert first.fault is LinkFault.GONE
    first.close()
    told = member.receive()
    while member.fault is None:
        told += member.receive()
    assert told and set(told) == {Welcome()}  # whole ones alone
    member.close()


def test_long_words_of_many_ranks_reach_the_first_host(tmp_path: Path) -> None:
    """Each of 6,000 characters that take six bytes on the way."""
    port = free_port()
    script = """
if rank == 0: sys.exit()
print('\\x01' * 6000, end='', flush=True)
open(f'{rank}.ready', 'w').close()
while not all(os.path.exists(f'{other}.ready') for other in range(1, 9)): time.sleep(0.01)
os._exit(7)
"""
    with launcher(tmp_path, script, *on_two_hosts(port, 1, 8)) as other:
        status, _, errors = launch(tmp_path, script, *on_two_hosts(port, 0, 1))
        assert (status, other.wait(timeout=PATIENCE)) == (7, 7)
    assert "<U+0001>" * 6000 in errors
