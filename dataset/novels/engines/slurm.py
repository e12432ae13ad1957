"""datatrove's Slurm executor with a job script in which every path is quoted, and which waits for its job."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.io import DataFolder

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT

DEFAULTS = {"cpus-per-task": "1", "mem-per-cpu": "4G"}
OURS = ("array", "output", "error", "wait", "job-name", "requeue", "nodes", "chdir", "export", "dependency", "wrap")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_VALUE = re.compile(r"[\w.,:/=@%+|&*()\[\]-]*")


class WaitingSlurmExecutor(SlurmPipelineExecutor):
    """Submits an array job, one element per task, and waits until it has ended."""

    def get_launch_file_contents(self, sbatch_args: dict[str, str], run_script: str) -> str:
        """The job script.

        Args:
            sbatch_args: from `get_sbatch_args`.
            run_script: datatrove's own command, whose paths are not quoted; not used.
        """
        options = [f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in sbatch_args.items()]
        pickled = self.logging_dir.resolve_paths("executor.pik")
        command = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline", pickled]
        return "\n".join(
            [
                "#!/bin/bash",
                *options,
                "set -e",
                "export PYTHONUNBUFFERED=TRUE OMP_NUM_THREADS=1 MKL_NUM_THREADS=1",
                f"cd {shlex.quote(str(ROOT))}",
                f"srun -l -n 1 {shlex.join(command)}",
                "",
            ]
        )

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, str]:
        """sbatch's options: the array, the logs, the user's.

        Args:
            max_array: number of elements of the array.
        """
        logs = quote_for_sbatch(Path(self.logging_dir.resolve_paths("slurm-%A_%a.log")))
        return {
            "job-name": self.job_name,
            "array": f"0-{max_array - 1}%{self.workers}",
            "nodes": "1",
            "output": logs,
            "error": logs,
            "requeue": "",
            # sbatch returns when the job has ended, with the highest status of its tasks.
            "wait": "",
            **self._sbatch_args,
        }

    def launch_merge_stats(self) -> None:
        """No second job: datatrove's counts of documents and times say nothing here."""


def slurm_executor(
    step: Callable[..., object], tasks: int, workers: int, folder: DataFolder, options: Mapping[str, str]
) -> WaitingSlurmExecutor:
    """An executor that is ready to run.

    Args:
        step: of the pipeline; can be pickled.
        tasks: elements of the array.
        workers: how many of them run at the same time.
        folder: for logs, completion marks and the pickled step, on the shared file system.
        options: sbatch's long options without the dashes.

    Raises:
        UserError: an option is reserved or has a character that a script cannot hold; this is a Slurm job already.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError(
            "this is a task of a Slurm array", "start from a login node, or from a job that is not an array"
        )
    for name, value in options.items():
        if not _NAME.fullmatch(name) or name in OURS:
            raise UserError(
                f"--slurm {name}: not an option that can be set", "name a long option of sbatch without its dashes"
            )
        if not _VALUE.fullmatch(value):
            raise UserError(
                f"--slurm {name}={value}: a character in it cannot be written into a job script", "write it without"
            )
    return WaitingSlurmExecutor(
        [step],
        tasks,
        time="",
        partition="",
        workers=workers,
        job_name="prepare_novels",
        sbatch_args=DEFAULTS | dict(options),
        # Most clusters limit the size of an array: a larger one is submitted as several, one after the other.
        max_array_size=1000,
        logging_dir=folder,
        skip_completed=False,
    )


def quote_for_sbatch(path: Path) -> str:
    r"""A path as a line "#SBATCH --output=" takes it; %A and %a in its last part stay patterns.

    Raises:
        UserError: it has a sign that sbatch reads in its own way.
    """
    text = str(path)
    if re.search(r"[\x00-\x1f\"'\\#]", text) or "%" in str(path.parent):
        raise UserError(
            f"{str(path.parent)!r}: sbatch cannot take such a path",
            "choose a folder without quotes, %, #, or backslashes",
        )
    return f'"{text}"' if " " in text else text
