"""A launcher that starts its ranks again, with ranks that are small scripts: after what, how often, what it tells."""

import json
import signal
import socket
from pathlib import Path

import psutil
import pytest

from novelgpt.launch.start import plan_start
from novelgpt.settings.errors import UserError
from tests.launch.test_launch import free_port, launch, launcher, on_two_hosts, wait_for
from tests.launched import PATIENCE, Launched

THIS = socket.gethostname()
# What the ranks of every start do: count the starts, and tell how far they come.
COUNT = """
from pathlib import Path
from novelgpt.settings.run_record import this_attempt
start = sum(1 for _ in Path('.').glob(f'start-*-{rank}'))
json.dump(dict(os.environ), open(f'start-{start}-{rank}', 'w'))
def die(status):
    Path(f'dying-{start}').touch()
    if status < 0: os.kill(os.getpid(), -status)
    sys.exit(status)
def wait_for(name):
    while not Path(name).exists(): time.sleep(0.01)
def lack_the_other():
    wait_for(f'dying-{start}'); time.sleep(0.3); sys.exit(1)
attempt = this_attempt()
"""
LACK = "\nlack_the_other()"
HEALS = ["--processes", "2", "--max_restarts", "3"]


def told(folder: Path, start: int, rank: int) -> dict[str, str]:
    variables: dict[str, str] = json.loads((folder / f"start-{start}-{rank}").read_text())
    return variables


def starts(folder: Path) -> int:
    return len(list(folder.glob("start-*-0")))


@pytest.mark.long
def test_a_killed_rank_starts_all_again_until_they_end_well(tmp_path: Path) -> None:
    """Each start goes on in the folder that the first one has begun, and is told of those before it."""
    script = COUNT + (
        "json.dump([attempt.record.folder, attempt.record.reached], open(f'told-{start}-{rank}', 'w'))\n"
        "if rank == 0: attempt.begin(Path('run').absolute(), None); attempt.reach(10 + start)\n"
        "Path('run', f'checkpoint-{start + 9}').mkdir(parents=True, exist_ok=True)\n"
        "if rank == 0: json.dump(attempt.restarts(None), open('restarts', 'w'))\n"
        "if start == 2: print('done', rank); sys.exit(0)\n"
        f"time.sleep(0.5)\nif rank == 1 - start: die(-9){LACK}"
    )
    status, output, errors = launch(tmp_path, script, *HEALS)
    assert (status, output) == (0, "done 0\n"), errors
    run = str(tmp_path / "run")
    assert [json.loads((tmp_path / f"told-{start}-0").read_text()) for start in range(3)] == [
        [None, 0], [run, 10], [run, 11],
    ]  # fmt: skip
    assert errors.splitlines() == [
        f"rank 1 ({THIS}) was killed by SIGKILL after step 10; restart 1 of 3 from checkpoint-9, in 1 s",
        f"rank 0 ({THIS}) was killed by SIGKILL after step 11; restart 2 of 3 from checkpoint-10, in 2 s",
    ]
    entries = json.loads((tmp_path / "restarts").read_text())
    assert [(entry["who"], entry["signal"], entry["step"]) for entry in entries] == [
        (f"rank 1 ({THIS})", "SIGKILL", 10), (f"rank 0 ({THIS})", "SIGKILL", 11),
    ]  # fmt: skip
    ports = [{told(tmp_path, start, rank)["MASTER_PORT"] for rank in (0, 1)} for start in range(3)]
    assert all(len(of_start) == 1 for of_start in ports) and len(set.union(*ports)) == 3
    assert not [told for told in (told(tmp_path, 0, 1),) if "NOVELGPT_ATTEMPT" in told]


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("if rank == 1: print('error: no\\n  fix: yes', file=sys.stderr); die(2)", 2, "error: no\n  fix: yes\n"),
        ("if rank == 1: die(143)", 143, ""),  # a rank that was told to end, and has saved
        ("if rank == 1: die(-signal.SIGTERM)", 143, f"rank 1 ({THIS}) was killed by SIGTERM"),
        ("if rank == 0: attempt.reach(3); open(f'told-{start}', 'w')\n"
         "if rank == 1: wait_for(f'told-{start}'); die(-9)", 137,
         "not restarted: the same fault as before, after step 3"),
        pytest.param(
            "if rank == 1: die(7)", 7, "not restarted: the same fault as before, before training began",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "if rank == 0: attempt.reach(start); open(f'told-{start}', 'w')\n"
            "if rank == 1: wait_for(f'told-{start}'); die(7)", 7,
            "not restarted: 1 restart made, and none is left", marks=pytest.mark.long,
        ),
    ],
    ids=["an error of use", "a rank that stops", "SIGTERM", "the same step", "before the first step", "too often"],
)  # fmt: skip
def test_what_is_not_started_again(ending: str, status: int, words: str, tmp_path: Path) -> None:
    repeats = "not restarted" in words
    most = "1" if "none is left" in words else "3"
    script = f"{COUNT}{ending}{LACK}"
    ended, _, errors = launch(tmp_path, script, "--processes", "2", "--max_restarts", most)
    assert (ended, starts(tmp_path)) == (status, 2 if repeats else 1), errors
    assert words in errors
    if repeats:
        assert errors.splitlines()[-2].startswith(f"error: rank 1 ({THIS})")


@pytest.mark.long
def test_the_last_words_of_a_rank_are_shown_before_it_is_started_again(tmp_path: Path) -> None:
    script = COUNT + "if start == 0 and rank == 1: Path('dying-0').touch(); raise ValueError('it is broken')\n"
    script += "if start == 0: lack_the_other()"
    status, _, errors = launch(tmp_path, script, *HEALS)
    assert (status, starts(tmp_path)) == (0, 2)
    assert errors.count("ValueError: it is broken") == 1
    assert errors.splitlines()[-1] == (
        f"rank 1 ({THIS}) ended with exit status 1 before training began; restart 1 of 3, in 1 s"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_between_two_starts_ends_the_run(number: signal.Signals, tmp_path: Path) -> None:
    script = COUNT + "if rank == 0: attempt.reach(start); open(f'told-{start}', 'w')\n"
    script += f"if rank == 1: wait_for(f'told-{{start}}'); die(-9){LACK}"
    with launcher(tmp_path, script, *HEALS) as process:
        assert process.stderr is not None
        while "restart 2 of 3" not in process.stderr.readline():  # 2 s from now
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert process.stderr.read() == (
            f"stopped by {number.name} between two starts; the same command resumes from there\n"
        )
    assert starts(tmp_path) == 2


@pytest.mark.long
def test_what_a_killed_rank_had_started_holds_nothing_any_more(tmp_path: Path) -> None:
    """Processes that load rows inherit the lock on the run folder, and outlive the rank by seconds."""
    script = COUNT + (
        "import fcntl, subprocess\n"
        "if rank == 1: sys.exit(0)\n"
        "lock = open('lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "if start == 1: sys.exit(0)\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(600)\n"
        "open('child', 'w').write(str(child)); os.kill(os.getpid(), 9)"
    )
    status, _, errors = launch(tmp_path, script, *HEALS)
    assert status == 0, errors
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.long
def test_a_single_process_heals_without_being_a_rank(tmp_path: Path) -> None:
    script = COUNT + "if start == 0: die(-9)"
    status, _, errors = launch(tmp_path, script, "--single", "--max_restarts", "1")
    assert (status, starts(tmp_path)) == (0, 2), errors
    assert not {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & told(tmp_path, 1, 0).keys()


@pytest.mark.parametrize("number", ["two", *(pytest.param(text, marks=pytest.mark.long) for text in ("-1", "1.5", ""))])
def test_what_is_no_number_of_restarts_is_refused(number: str, tmp_path: Path) -> None:
    status, _, errors = launch(tmp_path, COUNT, f"--max_restarts={number}")
    assert (status, len(errors.splitlines())) == (2, 2)
    assert f"{number!r} is not a number of restarts" in errors
    assert starts(tmp_path) == 0


def test_the_script_refuses_what_is_no_number_of_restarts(tmp_path: Path) -> None:
    with Launched("pretrain", log=tmp_path / "log", variables={"MAX_RESTARTS": "two"}) as run:
        assert run.ends() == 2
        assert run.text().startswith("error: MAX_RESTARTS=two is not a number of restarts\n  fix: ")


def test_what_is_started_with_restarts() -> None:
    """A single process has a launcher then, as has the only process of one of several hosts; a rank has one already."""
    heals, meeting = {"MAX_RESTARTS": "3"}, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    launch = ["-m", "novelgpt.launch"]
    assert plan_start("pretrain", ["--x"], heals, 0).args == [
        *launch,
        "--single",
        "--max_restarts",
        "3",
        "pretrain",
        "--x",
    ]
    assert plan_start("pretrain", [], heals | {"NPROC": "2"}, 0).args[:6] == [*launch, "--processes", "2", *HEALS[2:]]
    operator = meeting | {"RANK": "1", "WORLD_SIZE": "2"}
    assert plan_start("pretrain", [], operator, 0).args[:2] == ["-m", "pretrain"]
    assert plan_start("pretrain", [], heals | operator, 0).args[:6] == [*launch, "--processes", "1", *HEALS[2:]]
    assert plan_start("pretrain", [], {"MAX_RESTARTS": "0"}, 0).args == ["-m", "pretrain"]
    with pytest.raises(UserError, match="has no effect: this rank was started by something else"):
        plan_start("pretrain", [], heals | operator | {"LOCAL_RANK": "0"}, 0)


# Of a start that ends well only once it is the second.
ONCE = (
    COUNT + "if start == 0:\n    Path(f'ready-{rank}').touch()\n    while True: time.sleep(0.01)\nprint('done', rank)"
)


@pytest.mark.long
def test_a_rank_of_another_host_that_is_killed_starts_all_hosts_again(tmp_path: Path) -> None:
    """The first host says so; the other one has it from there, and the same port is used again."""
    port = free_port()
    script = COUNT + "if start == 0:\n    if rank == 1: die(-9)\n    lack_the_other()\nprint('done', rank)"
    with launcher(tmp_path, script, *on_two_hosts(port, 1, 1)) as other:
        status, output, errors = launch(tmp_path, script, *on_two_hosts(port, 0, 1), "--max_restarts", "3")
        assert (status, other.wait(timeout=PATIENCE)) == (0, 0), errors
        assert other.communicate() == ("", "")
    assert output.splitlines()[1:] == ["done 0"]
    assert f"rank 1 ({THIS}) was killed by SIGKILL before training began; restart 1 of 3, in 1 s\n" in errors
    assert {told(tmp_path, start, rank)["MASTER_PORT"] for start in (0, 1) for rank in (0, 1)} == {str(port)}


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_host_whose_launcher_was_killed_comes_back(victim: int, tmp_path: Path) -> None:
    """Started by hand, or by what a platform has for that."""
    port, heals = free_port(), ["--max_restarts", "3"]
    with (
        launcher(tmp_path, ONCE, *on_two_hosts(port, 0, 1), *heals) as first,
        launcher(tmp_path, ONCE, *on_two_hosts(port, 1, 1), *heals) as second,
    ):
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        lost, left = (first, second) if victim == 0 else (second, first)
        lost.kill()
        status, _, errors = launch(tmp_path, ONCE, *on_two_hosts(port, victim, 1), *heals)
        assert status == 0, errors
        output, errors = left.communicate(timeout=PATIENCE)
        assert left.returncode == 0, errors
    assert starts(tmp_path) == 2
    if victim == 0:
        assert "the first host is gone: its launcher was killed, or the connection is cut; waiting for it" in errors
    else:
        assert output.endswith("done 0\n")
        assert f"host 1 ({THIS}, 127.0.0.1) is gone: its launcher was killed, or the connection is cut," in errors


def test_an_error_of_use_on_another_host_ends_all(tmp_path: Path) -> None:
    port, heals = free_port(), ["--max_restarts", "3"]
    script = COUNT + "if rank == 1: print('error: no\\n  fix: yes'); die(2)\nlack_the_other()"
    with launcher(tmp_path, script, *on_two_hosts(port, 1, 1)) as other:
        status, _, errors = launch(tmp_path, script, *on_two_hosts(port, 0, 1), *heals)
        assert (status, other.wait(timeout=PATIENCE), starts(tmp_path)) == (2, 2, 1), errors
    assert errors == "error: no\n  fix: yes\n"


@pytest.mark.long
@pytest.mark.parametrize("host", [0, 1])
def test_a_signal_to_one_host_between_two_starts_ends_all(host: int, tmp_path: Path) -> None:
    port = free_port()
    script = COUNT + "if rank == 0: attempt.reach(start); open(f'told-{start}', 'w')\n"
    script += f"if rank == 1: wait_for(f'told-{{start}}'); die(-9){LACK}"
    with (
        launcher(tmp_path, script, *on_two_hosts(port, 0, 1), "--max_restarts", "3") as first,
        launcher(tmp_path, script, *on_two_hosts(port, 1, 1)) as second,
    ):
        assert first.stderr is not None
        while "restart 2 of 3" not in first.stderr.readline():
            assert first.poll() is None
        (first, second)[host].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=PATIENCE) for process in (first, second)] == [128 + signal.SIGTERM] * 2
    assert starts(tmp_path) == 2
