"""The engines leave what a plain loop leaves, whatever happened before."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dataset.novels.engines.cluster import FilesOfTask, new_run_folder, read_slurm_options, run_on
from novelgpt.settings.errors import UserError

needs_datatrove = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")

# What the engines run: importable by its name, in other processes too. It leaves one file named by the content, and a
# line in `calls` for each file that it had to make.
STEP = """
import hashlib
from pathlib import Path

def leave(path: Path, out: Path) -> Path:
    data = path.read_bytes()
    if data == b"broken":
        raise ValueError(f"{path.name} is broken")
    artefact = out / f"{path.name}-{hashlib.sha256(data).hexdigest()[:16]}"
    if not artefact.exists():
        with (out / "calls").open("a") as calls:
            calls.write(path.name + "\\n")
        artefact.write_bytes(data[::-1])
    return artefact
"""

# Stand-ins for a cluster's programs: they run the job here, one element of the array after the other.
SBATCH = """#!{python}
import os, subprocess, sys
lines = [line[len("#SBATCH --"):].rstrip() for line in open(sys.argv[-1]) if line.startswith("#SBATCH --")]
options = dict(line.partition("=")[::2] for line in lines)
assert options["array"].split("%")[0].startswith("0-") and options["output"].startswith(('"/', "/"))
last = int(options["array"].split("%")[0].split("-")[1])
exports = dict(word.split("=", 1) for word in sys.argv[1].removeprefix("--export=ALL,").split(","))
print("Submitted batch job 17", flush=True)
if "wait" not in options:
    if os.fork():
        sys.exit(0)
    os.close(1)
status = 0
for element in range(last + 1):
    log = options["output"].strip('"').replace("%A", "17").replace("%a", str(element))
    job = dict(SLURM_ARRAY_TASK_ID=str(element), SLURM_NODELIST="node1", SLURM_JOB_ID="17", **exports)
    with open(log, "w") as file:
        done = subprocess.run(["bash", sys.argv[-1]], env=os.environ | job, stdout=file, stderr=file, cwd="/")
    status = max(status, done.returncode)
sys.exit(status if "wait" in options else 0)
"""
SRUN = '#!/bin/bash\nset -e\n[ "$1 $2 $3" = "-l -n 1" ]\nshift 3\nexec "$@"\n'
SCONTROL = '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && echo "$3"\n'


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "step_of_test.py").write_text(STEP)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    sys.modules.pop("step_of_test", None)
    return importlib.import_module("step_of_test")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(7):
        (folder / f"第{number}本.txt").write_text("风雪夜归人" * (1 + 37 * number % 50), encoding="utf-8")
    return sorted(folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "calls"}


def by_loop(step: ModuleType, files: list[Path], out: Path) -> dict[str, bytes]:
    out.mkdir()
    for path in files:
        step.leave(path, out)
    return tree(out)


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins, before anything else of that name."""
    folder.mkdir()
    for name, text in (("sbatch", SBATCH.replace("{python}", sys.executable)), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)


@pytest.mark.parametrize(("files_count", "tasks"), [(7, 3), (7, 7), (1, 1), (5, 2)])
def test_tasks_cover_every_file_once(files_count: int, tasks: int) -> None:
    files = tuple(Path(str(number)) for number in range(files_count))
    seen: list[Path] = []

    def note(path: Path) -> Path:
        seen.append(path)
        return path

    for rank in range(tasks):
        assert list(FilesOfTask(files, note)(None, rank, tasks)) == list(files[rank::tasks])
    assert sorted(seen) == sorted(files)


@needs_datatrove
def test_two_workers_leave_what_a_loop_leaves_and_redo_what_changed(
    step: ModuleType, files: list[Path], tmp_path: Path
) -> None:
    expected = by_loop(step, files, tmp_path / "loop")
    out, logs = tmp_path / "out", tmp_path / "logs"
    out.mkdir()
    leave = functools.partial(step.leave, out=out)
    run_on("local", files, leave, logs, workers=2, tasks=3)
    assert tree(out) == expected
    calls = (out / "calls").read_text().split()
    assert sorted(calls) == [path.name for path in files]

    # All tasks of the first run are marked as done; one input is another one now.
    files[3].write_text("改过的书", encoding="utf-8")
    run_on("local", files, leave, logs, workers=2, tasks=3)
    assert (out / "calls").read_text().split()[len(calls) :] == [files[3].name]
    assert expected.items() < tree(out).items()


@needs_datatrove
def test_an_error_comes_through_and_what_is_done_stays(step: ModuleType, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    leave = functools.partial(step.leave, out=out)
    files[2].write_bytes(b"broken")
    with pytest.raises(ValueError, match="is broken"):
        run_on("local", files, leave, tmp_path / "logs", workers=2, tasks=len(files))
    files[2].write_text("修好了", encoding="utf-8")
    run_on("local", files, leave, tmp_path / "logs", workers=2, tasks=len(files))
    assert tree(out) == by_loop(step, files, tmp_path / "loop")
    assert sorted((out / "calls").read_text().split()) == [path.name for path in files]


@needs_datatrove
@pytest.mark.parametrize("folder", ["plain", "with blank 和中文 $(touch hit) ;&"])
def test_slurm_jobs_leave_what_a_loop_leaves(
    step: ModuleType, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    put_on_path(tmp_path / "bin", monkeypatch)
    out, logs = tmp_path / "out", tmp_path / folder
    out.mkdir()
    leave = functools.partial(step.leave, out=out)
    run_on("slurm", files, leave, logs, workers=2, tasks=2, slurm={"partition": "cpu", "time": "00:10:00"})
    assert tree(out) == by_loop(step, files, tmp_path / "loop")
    script = (logs / "run-0001" / "launch_script.slurm").read_text(encoding="utf-8")
    assert "#SBATCH --partition=cpu\n" in script
    assert "#SBATCH --time=00:10:00\n" in script
    assert not list(tmp_path.rglob("hit")) and not Path("/hit").exists()


@needs_datatrove
def test_a_slurm_task_that_fails_is_named_and_can_be_repeated(
    step: ModuleType, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path / "bin", monkeypatch)
    out, logs = tmp_path / "out", tmp_path / "logs"
    out.mkdir()
    leave = functools.partial(step.leave, out=out)
    files = files[:2]
    files[0].write_bytes(b"broken")
    smaller = min(range(2), key=lambda place: files[place].stat().st_size)
    with pytest.raises(UserError) as caught:
        run_on("slurm", files, leave, logs, workers=2, tasks=2)
    rank = 1 if smaller == 0 else 0
    assert f"1 of 2 tasks did not finish: {rank}; task {rank}: ValueError: " in caught.value.cause
    assert caught.value.cause.endswith(f"{files[0].name} is broken")
    assert str(logs / "run-0001") in caught.value.remedy
    assert "is broken" in (logs / "run-0001" / "logs" / f"task_{rank:05d}.log").read_text(encoding="utf-8")
    files[0].write_text("修好了", encoding="utf-8")
    run_on("slurm", files, leave, logs, workers=2, tasks=2)
    assert tree(out) == by_loop(step, files, tmp_path / "loop")


@needs_datatrove
@pytest.mark.parametrize(
    ("slurm", "logs"),
    [
        ({"partition": "cpu\n#SBATCH --wrap=x"}, "logs"),
        ({"comment": "$(touch hit)"}, "logs"),
        ({"partition cpu": ""}, "logs"),
        ({"array": "0-99999"}, "logs"),
        ({}, "two\nlines"),
        ({}, 'a"quote'),
        ({}, "100%A"),
    ],
)
def test_what_cannot_stand_in_a_job_script_is_refused(
    step: ModuleType,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slurm: dict[str, str],
    logs: str,
) -> None:
    put_on_path(tmp_path / "bin", monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError):
        run_on("slurm", files, functools.partial(step.leave, out=out), tmp_path / logs, workers=2, slurm=slurm)
    assert not tree(out)


@needs_datatrove
def test_no_sbatch_is_an_error_of_use(
    step: ModuleType, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch"):
        run_on("slurm", files, functools.partial(step.leave, out=tmp_path), tmp_path / "logs", workers=2)


@pytest.mark.parametrize(
    ("engine", "package", "install"),
    [("local", "datatrove", "datatrove"), ("slurm", "datatrove", "datatrove"), ("ray", "ray", "'datatrove[ray]'")],
)
def test_a_missing_package_names_the_line_for_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package != "datatrove" and importlib.util.find_spec("datatrove") is None:
        pytest.skip("datatrove is not installed")
    with pytest.raises(UserError, match=f"needs the package {package}") as caught:
        run_on(engine, [Path(__file__)], Path.resolve, tmp_path, workers=1)
    assert caught.value.remedy.endswith(f"python -m pip install {install}")


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no engine 'spark'"):
        run_on("spark", [], Path.resolve, tmp_path, workers=1)


def test_each_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert [new_run_folder(tmp_path).name for _ in range(3)] == ["run-0001", "run-0002", "run-0003"]
    shutil.rmtree(tmp_path / "run-0001")
    assert new_run_folder(tmp_path).name == "run-0004"
    assert (tmp_path / "run-0004").stat().st_mode & 0o777 == 0o700


def test_slurm_options_are_read_from_words() -> None:
    assert read_slurm_options(["partition=cpu", "--gres=gpu:0", "exclusive", "comment=a=b"]) == {
        "partition": "cpu",
        "gres": "gpu:0",
        "exclusive": "",
        "comment": "a=b",
    }


@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("datatrove", "ray")), reason="ray is not installed"
)
def test_ray_leaves_what_a_loop_leaves(step: ModuleType, files: list[Path], tmp_path: Path) -> None:
    import ray

    out = tmp_path / "out"
    out.mkdir()
    try:
        run_on("ray", files, functools.partial(step.leave, out=out), tmp_path / "logs", workers=2, tasks=2)
    finally:
        ray.shutdown()
    assert tree(out) == by_loop(step, files, tmp_path / "loop")
