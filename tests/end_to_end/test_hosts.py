"""Two hosts, each a network namespace with an address of its own, train what two ranks on one host train."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launched import ROOT, Launched

ADDRESSES = ("10.213.77.1", "10.213.77.2")
# What ssh does, between namespaces: the words before the last two are its options.
SSH = """#!/bin/bash
host="${@: -2:1}"
exec ip netns exec "NAME-${host##*.}" bash -c "${@: -1}"
"""
# What srun does with one task a host: its status is the highest of theirs.
SRUN = """#!/bin/bash
for task in 0 1; do
  SLURM_PROCID=$task ip netns exec "NAME-$((task + 1))" "$@" &
  tasks[task]=$!
done
wait "${tasks[0]}" || highest=$?
wait "${tasks[1]}" || highest=$?
exit "${highest:-0}"
"""
NOVEL = "第一章 海\n" + "他站在船头，看着远处的灯塔慢慢亮了起来。海上没有风。\n" * 60
QUICK = ["--max_length", "64", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--max_steps", "4"]
QUICK += ["--eval_on_start", "False", "--guards", "False", "--save_strategy", "no", "--eval_strategy", "no"]
QUICK += ["--learning_rate", "1e-3"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[str]:
    """Two namespaces, NAME-1 and NAME-2, that reach each other and nothing else; yields NAME."""
    name = f"host{os.getpid()}"
    names = [f"{name}-{number}" for number in (1, 2)]
    made = []
    try:
        try:
            for namespace in names:
                ip("netns", "add", namespace)
                made.append(namespace)
            ends = [f"v{os.getpid()}{number}" for number in (1, 2)]
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for namespace, end, address in zip(names, ends, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", namespace)
                ip("-n", namespace, "addr", "add", f"{address}/24", "dev", end)
                ip("-n", namespace, "link", "set", end, "up")
                ip("-n", namespace, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("network namespaces cannot be made here")
        yield name
    finally:
        for namespace in made:
            ip("netns", "delete", namespace)


@pytest.fixture
def words(base_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "novel.txt").write_text(NOVEL, encoding="utf-8")
    return ["pretrain", "--model", str(base_folder), "--train_files", str(tmp_path / "novel.txt"), *QUICK]


def inside(name: str, number: int) -> tuple[str, ...]:
    return ("ip", "netns", "exec", f"{name}-{number}")


def by_hostfile(name: str, words: list[str], folder: Path) -> None:
    """Started on the first host, which starts the other through ssh."""
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(SSH.replace("NAME", name), encoding="utf-8")
    (folder / "bin" / "ssh").chmod(0o755)
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES), encoding="utf-8")
    variables = {"HOSTFILE": str(folder / "hosts"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    with Launched(*words, log=folder / "log", prefix=inside(name, 1), variables=variables, warm=True) as run:
        assert run.ends() == 0, run.text()[-3000:]
        assert f"2 hosts, 2 processes, meeting at {ADDRESSES[0]}" in run.text()


def by_slurm(name: str, words: list[str], folder: Path) -> None:
    """A Slurm job, whose srun starts a task on each host."""
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN.replace("NAME", name), encoding="utf-8")
    (folder / "bin" / "srun").chmod(0o755)
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid())}
    step |= {"SLURM_STEP_NODELIST": ",".join(ADDRESSES), "SLURM_STEP_ID": "0", "NPROC": "1", "MODEL": ""}
    step |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    with Launched(*words, log=folder / "log", script="slurm.sh", variables=step, warm=True) as job:
        assert job.ends() == 0, job.text()[-3000:]
        assert job.text().count("Done. eval loss") == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", [by_hostfile, pytest.param(by_slurm, marks=pytest.mark.long)])
def test_two_hosts_train_what_one_host_with_two_ranks_does(
    way: Callable[[str, list[str], Path], None], hosts: str, words: list[str], tmp_path: Path
) -> None:
    with Launched(
        *words, "--output_dir", str(tmp_path / "one"), log=tmp_path / "log", variables={"NPROC": "2"}, warm=True
    ) as run:
        assert run.ends() == 0, run.text()[-3000:]
    expected = load_file(tmp_path / "one" / "model.safetensors")
    (tmp_path / "two").mkdir()
    way(hosts, [*words, "--output_dir", str(tmp_path / "two" / "run")], tmp_path / "two")
    weights = load_file(tmp_path / "two" / "run" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def secret_file(folder: Path) -> str:
    (folder / "secret").touch(mode=0o600)
    (folder / "secret").write_bytes(os.urandom(32))
    return str(folder / "secret")


@pytest.mark.long
def test_strangers_disturb_no_training_of_hosts_that_are_started_by_hand(
    hosts: str, words: list[str], tmp_path: Path
) -> None:
    """From an address of its own, and from that of a host; one with another secret does not get in."""
    words = [*words, "--max_steps", "40", "--output_dir"]
    with Launched(*words, str(tmp_path / "one"), log=tmp_path / "log", variables={"NPROC": "2"}, warm=True) as run:
        assert run.ends() == 0, run.text()[-3000:]
    expected = load_file(tmp_path / "one" / "model.safetensors")
    place = (ADDRESSES[0], "20501")
    meeting = {"HOSTS": "2", "NPROC": "1", "MASTER_ADDR": place[0], "MASTER_PORT": "20500"}
    meeting["SECRET_FILE"] = secret_file(tmp_path)
    words += [str(tmp_path / "two")]
    stranger = [*inside(hosts, 2), sys.executable, "-m", "tests.hostile_launchers", *place, meeting["SECRET_FILE"]]

    def start(host: int, **variables: str) -> Launched:
        log, told = tmp_path / f"log{host}{len(variables)}", meeting | {"HOST": str(host)} | variables
        return Launched(*words, log=log, prefix=inside(hosts, host + 1), variables=told, warm=True)

    with start(0) as first:
        with start(1, SECRET_FILE="", NOVELGPT_SECRET="that of another run") as other:
            assert other.ends() == 2
            assert "has another secret than this one" in other.text()
        first.until(rf"a launcher at {ADDRESSES[1]} has another secret")
        with start(1) as second:
            first.until("2 hosts, 2 processes")
            for _ in range(3):
                assert subprocess.run(stranger, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            assert first.process.poll() is None, "the training is over already"
            assert (first.ends(), second.ends()) == (0, 0), first.text()[-3000:]
    weights = load_file(tmp_path / "two" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_hosts_that_do_not_share_the_run_folder_are_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    words = [*words, "--output_dir", str(tmp_path / "out" / "run")]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    meeting = {"HOSTS": "2", "NPROC": "1", "ZERO": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meeting["SECRET_FILE"] = secret_file(tmp_path)
    # The second host has a file system of its own there.
    own = ("unshare", "--mount", "bash", "-c", f'mount -t tmpfs none "{tmp_path}/out" && exec "$@"', "own")
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    with (
        Launched(*words, log=tmp_path / "log0", variables=meeting | {"HOST": "0"}, warm=True) as first,
        Launched(*words, log=tmp_path / "log1", variables=meeting | {"HOST": "1"}, prefix=own, warm=True) as second,
    ):
        assert (first.ends(), second.ends()) == (2, 2), first.text()[-3000:] + second.text()[-3000:]
        assert f"does not see what the first host writes into {tmp_path}/out\n" in first.text()
        assert (first.text() + second.text()).count("error: ") == 1
    assert list((tmp_path / "out").iterdir()) == []
