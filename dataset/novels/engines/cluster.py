"""One function over many files on an engine that spans machines: datatrove's executors for Slurm, Ray and processes.

The function leaves an artefact on a file system that all machines share and does nothing for a file whose artefact
exists, so a task may run twice, anywhere, and an interrupted run is simply started again.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import counted

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

# Engine -> packages that it needs, and what to install for them.
ENGINES = {
    "local": (("datatrove",), "datatrove"),
    "slurm": (("datatrove",), "datatrove"),
    "ray": (("datatrove", "ray"), "datatrove[ray]"),
}
TASKS_PER_WORKER = 4


@dataclass(frozen=True)
class FilesOfTask:
    """A step of a datatrove pipeline: the function on every file of a task.

    Attributes:
        files: of all tasks; a task takes every n-th of them.
        function: file -> artefact; can be pickled, and is defined in a module that all machines have.
    """

    files: tuple[Path, ...]
    function: Callable[[Path], Path]

    def __call__(self, data: object, rank: int, world_size: int) -> Iterator[Path]:
        """What datatrove calls in each task, and exhausts.

        Args:
            data: of an earlier step: nothing.
            rank: of the task, from 0.
            world_size: number of tasks.
        """
        yield from map(self.function, self.files[rank::world_size])

    def __repr__(self) -> str:
        """One line, as it goes into the log of every task."""
        return f"{counted(len(self.files), 'file')}"


def run_on(
    engine: str,
    files: Sequence[Path],
    function: Callable[[Path], Path],
    logging_folder: Path,
    workers: int,
    tasks: int = 0,
    slurm: Mapping[str, str] | None = None,
) -> None:
    """Call a function on every file, and return when all calls have returned.

    Args:
        engine: one of ENGINES.
        files: absolute, or relative to the working folder, under the same path on all machines.
        function: file -> artefact; it must be safe to call twice.
        logging_folder: on the shared file system; each call makes a folder in it for its logs and completion marks.
        workers: how many tasks run at the same time.
        tasks: into how many tasks the files are divided [default: four per worker]; a task that fails is repeated
            whole.
        slurm: sbatch's long options, such as {"partition": "cpu", "time": "04:00:00"}.

    Raises:
        UserError: a package or program is missing, an option is wrong, or tasks did not finish.
    """
    if engine not in ENGINES:
        raise UserError(f"no engine {engine!r}", f"take one of {', '.join(ENGINES)}")
    packages, requirement = ENGINES[engine]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the engine {engine} needs the package {package}", pip_install(requirement))
    if not files:
        return
    # Largest first: the tasks come out about equal, and none of the long ones is the last to start.
    ordered = sorted((path.absolute() for path in files), key=lambda path: (-path.stat().st_size, path))
    step = FilesOfTask(tuple(ordered), function)
    workers = min(workers, len(files))
    tasks = min(tasks or workers * TASKS_PER_WORKER, len(files))
    folder = new_run_folder(logging_folder.absolute())
    executor = _executor(engine, step, tasks, workers, folder, slurm or {})
    problem = ""
    try:
        executor.run()
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        raise UserError("there is no sbatch on this machine", "start from a login node of the cluster") from error
    except subprocess.CalledProcessError as error:
        problem = f"sbatch ended with status {error.returncode}; "
    # Marks of this call alone: its folder is new.
    left = executor.get_incomplete_ranks(skip_completed=True)
    if left or problem:
        raise UserError(
            f"{problem}{len(left)} of {counted(tasks, 'task')} did not finish: {', '.join(map(str, left[:10]))}"
            f"{_last_log_line(folder, left)}",
            f"see the logs in {folder}, then run the same command again: files that are done stay done",
        )


def _executor(
    engine: str, step: FilesOfTask, tasks: int, workers: int, folder: Path, slurm: Mapping[str, str]
) -> PipelineExecutor:
    from datatrove.io import DataFolder
    from fsspec.implementations.local import LocalFileSystem

    logs = DataFolder(str(folder), LocalFileSystem())  # whatever its name looks like: "a::b" is not an address here
    if engine == "slurm":
        from dataset.novels.engines.slurm import slurm_executor

        return slurm_executor(step, tasks, workers, logs, slurm)
    if engine == "local":
        from datatrove.executor.local import LocalPipelineExecutor

        return LocalPipelineExecutor([step], tasks, workers, logs, skip_completed=False)
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        # The cluster that RAY_ADDRESS names or that runs on this machine; else processes of this machine.
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, include_dashboard=False)
    return RayPipelineExecutor([step], tasks, workers, logging_dir=logs, skip_completed=False)


def _last_log_line(folder: Path, ranks: Sequence[int]) -> str:
    """The last line of the log of the first of these tasks that has one: its error."""
    for rank in ranks:
        log = folder / "logs" / f"task_{rank:05d}.log"
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            return f"; task {rank}: {next((line for line in reversed(lines) if line.strip()), '')[:400]}"
    return ""


def new_run_folder(logging_folder: Path) -> Path:
    """run-0001, run-0002, …: the next one, which only this user can write to.

    datatrove skips tasks that a mark in the folder says are done, even if their files have changed since: a new folder
    has none. Code is unpickled from it, so nobody else may write to it.
    """
    logging_folder.mkdir(parents=True, exist_ok=True)
    number = 1 + sum(1 for _ in logging_folder.glob("run-*"))
    while True:
        folder = logging_folder / f"run-{number:04d}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return folder


def read_slurm_options(options: Sequence[str]) -> dict[str, str]:
    """Options of a command line: ["partition=cpu", "exclusive"] -> {"partition": "cpu", "exclusive": ""}."""
    return {name: value for name, _, value in (option.removeprefix("--").partition("=") for option in options)}
