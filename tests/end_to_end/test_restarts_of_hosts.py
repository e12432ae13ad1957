"""Two hosts, each a network namespace: a rank is killed twice, then a host; the run ends as if nothing had happened."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.test_hosts import ADDRESSES, SSH, hosts, inside, words
from tests.launched import OF_LAUNCHERS, PATIENCE, ROOT, Launched
from tests.warm_python import warm_python, warm_variables

__all__ = ["hosts", "words"]  # which are fixtures
# Every step is saved, so that none is done twice but the one in which something happens.
SAVED = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "8"]
ZERO_2 = ["--deepspeed", str(ROOT / "scripts" / "deepspeed" / "zero2.json")]


def launchers_through_ssh(folder: Path) -> list[int]:
    """The processes that ssh has started in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            started = b"--from_stdin" in (path / "cmdline").read_bytes().split(b"\0")
            if started and f"MARK={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.long
def test_a_rank_is_killed_twice_and_then_a_host(hosts: str, words: list[str], tmp_path: Path) -> None:
    """Under ZeRO-2, by a hostfile: the first host starts the lost one again through ssh."""
    variables = {"NPROC": "2", "ZERO": "2"}
    whole = [*words, *SAVED, "--output_dir", str(tmp_path / "undisturbed")]
    with Launched(*whole, log=tmp_path / "log", variables=variables, warm=True) as run:
        assert run.ends() == 0, run.text()[-3000:]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH.replace("NAME", hosts), encoding="utf-8")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES), encoding="utf-8")
    (tmp_path / "plan.json").write_text(json.dumps({"1": [3, 2]}), encoding="utf-8")
    environment = {name: value for name, value in warm_variables().items() if name not in OF_LAUNCHERS}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "MARK": str(tmp_path)}
    launch = ["-m", "novelgpt.launch", "--hostfile", str(tmp_path / "hosts"), "--max_restarts", "3"]
    dying = ["tests.faults.dying_process", str(tmp_path / "plan.json"), *words, *SAVED, *ZERO_2]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*inside(hosts, 1), warm_python(), *launch, *dying, "--output_dir", str(tmp_path / "run")],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        printed = ""
        while "step     5/8" not in printed.partition("restart 2 of 3")[2]:
            printed = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
            assert process.poll() is None and time.monotonic() < deadline, printed[-3000:]
            time.sleep(0.005)
        [other] = launchers_through_ssh(tmp_path)
        os.kill(other, signal.SIGKILL)
        assert process.wait(timeout=PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        process.kill()
        for left in launchers_through_ssh(tmp_path):
            os.kill(left, signal.SIGKILL)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "run"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    *ranks, host = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["restarts"]
    killed = (f"rank 1 ({socket.gethostname()})", "SIGKILL")
    assert [(rank["who"], rank["signal"], rank["step"], rank["checkpoint"]) for rank in ranks] == [
        (*killed, 2, "checkpoint-2"),
        (*killed, 3, "checkpoint-3"),
    ]
    assert host["checkpoint"] == f"checkpoint-{host['step']}"
    assert host["who"].startswith("host 1 (") and host["cause"].startswith("its launcher was killed")
