"""Checks the installation, the machine and, with --model, a run before it starts. Nothing is downloaded.

    python -m novelgpt.doctor
    python -m novelgpt.doctor --model MODEL --pipeline finetune_lora --train_files my.jsonl --max_length 4096

Further options are those of the pipeline. The exit status is 0 without a problem and 2 with one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from novelgpt.checks import machine
from novelgpt.checks.findings import Check, Finding, any_problem, attempt, run_check, show, write_json
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import OUTPUT, from_home
from novelgpt.settings.signals import importing
from novelgpt.settings.small_bases import TINY
from novelgpt.settings.terminal import counted, say

# Beside --model: a file may do so, too.
NAMING_A_MODEL = ("--config", "--config_name")
PIPELINES = ("pretrain", "finetune", "finetune_lora")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the checks, print what they find, and exit with 2 if there is a problem."""
    start = time.perf_counter()
    options, args = _parser().parse_known_args(argv)
    has_run = options.model is not None or any(word.split("=")[0] in NAMING_A_MODEL for word in args)
    if args and not has_run:
        raise UserError(
            f"{args[0]} is an option of a run, and no model is named", f"add --model MODEL, or --model {TINY}"
        )
    if options.model is not None:
        args += ["--model", options.model]
    if options.output_dir is not None:
        args += ["--output_dir", options.output_dir]
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no such folder", "name a file in an existing folder")
    if options.time_limit <= 0:
        raise UserError(f"--time_limit {options.time_limit} is too small", "use a number of seconds above 0")
    environment = dict(os.environ)
    sections: dict[str, list[tuple[str, Check]]] = {
        "Versions 版本": [("python", machine.check_python), ("packages", machine.check_packages)],
        "Devices 设备": [("torch", check_devices)],
        "Machine 机器": [
            ("port", machine.check_port),
            ("disk", partial(machine.check_disk_space, Path(options.output_dir or OUTPUT))),
            ("shared memory", machine.check_shared_memory),
            ("open files", machine.check_open_files),
            ("hub", partial(machine.check_switches, environment)),
        ],
    }
    if has_run:
        sections["Model and run 模型与训练"] = [("run", partial(check_run, options.pipeline, args, options.time_limit))]
    _silence_libraries()
    terminal = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    findings: list[Finding] = []
    try:
        for heading, checks in sections.items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = [finding for name, check in checks for finding in run_check(name, check)]
            show(heading, found, terminal)
            findings += found
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    marks, seconds = [finding.mark for finding in findings], time.perf_counter() - start
    say("", f"{counted(marks.count('problem'), 'problem')}, {counted(marks.count('note'), 'note')}, {seconds:.0f} s")
    if options.json is not None:
        write_json(options.json, findings, seconds)
    if any_problem(findings):
        raise SystemExit(2)


def check_devices() -> Iterator[Finding]:
    """Check host, GPUs, precision and compilers; a problem where torch cannot even be imported."""
    with importing():
        from novelgpt.checks import devices

    yield from run_check("host", devices.check_host)
    yield from run_check("gpu", devices.check_gpus)
    yield from run_check("precision", devices.check_precision)
    yield from run_check("compilers", devices.check_toolchain)


def check_run(pipeline: str, args: Sequence[str], time_limit: float) -> Iterator[Finding]:
    """Check a run: its settings, files, tokenizer, memory, disk, and one pass of its longest batch.

    Args:
        pipeline: one of PIPELINES.
        args: of its command line.
        time_limit: seconds for loading the model and trying the batch.
    """
    with importing():
        from novelgpt.budget.disk import saved_bytes
        from novelgpt.budget.memory import compute_dtype
        from novelgpt.checks.devices import check_precision
        from novelgpt.checks.longest_batch import NAME, check_trial
        from novelgpt.checks.run import (
            check_checkpoints,
            check_ends,
            check_files,
            check_memory,
            check_settings,
            check_template,
            check_vocabulary,
            estimate_run,
            parse_run,
            settle_folder,
        )
        from novelgpt.model.tokenizer import load_tokenizer

    run = parse_run(pipeline, args)
    settled, settings = attempt("settings", partial(settle_folder, run))
    if settled is not None:
        run = settled
        settings += run_check("data", partial(check_settings, run))
    if compute_dtype(run.training) is not None:
        settings += run_check("precision", partial(check_precision, run.training))
    files = run_check("model files", partial(check_files, run))
    yield from [*settings, *files]
    if any_problem(files):
        return
    tokenizer, found = attempt("tokenizer", partial(load_tokenizer, run.model))
    if tokenizer is not None:
        for check in (check_vocabulary, check_ends, check_template):
            found += run_check("tokenizer", partial(check, run, tokenizer))
    yield from found
    sound = not any_problem([*settings, *found])
    estimate, found = attempt("memory", partial(estimate_run, run))
    if estimate is not None:
        run = estimate.run
        found += run_check("memory", partial(check_memory, estimate))
    size = 0 if tokenizer is None else saved_bytes(tokenizer)
    yield from [*found, *run_check("checkpoints", partial(check_checkpoints, estimate, size))]
    if sound:
        yield from run_check(NAME, partial(check_trial, run, estimate, pipeline, args, time_limit))
    else:
        yield Finding(NAME, "note", "not tried", "fix the problems above first")


def _silence_libraries() -> None:
    """Let libraries download nothing, and print and log no warnings: findings report what matters."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m novelgpt.doctor",
        description="Check the installation, the machine and a run before it starts. Nothing is downloaded.",
        epilog="Further options are those of the pipeline, such as --train_files, --max_length, --config, "
        "--per_device_train_batch_size, --precision.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="check this base as well: a folder, a hub name in the cache, or tiny")
    parser.add_argument("--pipeline", choices=PIPELINES, default="finetune", help="which training [%(default)s]")
    parser.add_argument("--output_dir", type=from_home, metavar="FOLDER", help="run folder [output/PIPELINE]")
    parser.add_argument("--time_limit", type=float, default=40, metavar="S", help="for the longest batch [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there as well")
    return parser


if __name__ == "__main__":
    main()
