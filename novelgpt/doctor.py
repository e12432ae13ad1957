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

from novelgpt.checks import machine, versions
from novelgpt.checks.findings import Check, Finding, any_problem, attempt, run_check, show, write_json
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import OUTPUT, TINY, from_home
from novelgpt.settings.signals import importing
from novelgpt.settings.terminal import counted, say

PIPELINES = ("pretrain", "finetune", "finetune_lora")
Section = tuple[str, list[tuple[str, Check]]]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the checks, print what they find, and exit with 2 where there is a problem."""
    begin = time.perf_counter()
    parser = _parser()
    options, further = parser.parse_known_args(argv)
    about_run = [*further, *["--train_files"] * bool(options.train_files), *["--max_length"] * bool(options.max_length)]
    in_file = any(word.split("=")[0] == "--config" for word in further)  # which may name the model
    if options.model is None and about_run and not in_file:
        raise UserError(
            f"{about_run[0]} is about a run, and no model is named", f"add --model MODEL, or --model {TINY}"
        )
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no such folder", "name a file in a folder that is there")
    if options.time_limit <= 0:
        raise UserError(f"--time_limit {options.time_limit} is no time", "take a number of seconds above 0")
    environment = dict(os.environ)
    _quiet()
    output = Path(options.output_dir or OUTPUT)
    findings: list[Finding] = []
    terminal = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    words = _words(options.model, options.train_files, options.max_length, options.output_dir) + further
    sections = [*general_sections(environment, output)]
    if options.model is not None or in_file:
        sections.append(
            ("Model and run 模型与训练", [("run", partial(check_run, options.pipeline, words, options.time_limit))])
        )
    try:
        for heading, checks in sections:
            found = [finding for name, check in checks for finding in _silent(name, check)]
            show(heading, found, terminal)
            findings += found
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    problems = sum(finding.mark == "problem" for finding in findings)
    notes = sum(finding.mark == "note" for finding in findings)
    say("", f"{counted(problems, 'problem')}, {counted(notes, 'note')}, {time.perf_counter() - begin:.0f} s")
    if options.json is not None:
        write_json(options.json, findings, time.perf_counter() - begin)
    if any_problem(findings):
        raise SystemExit(2)


def general_sections(environment: dict[str, str], output: Path) -> list[Section]:
    """What is looked at whatever the run: headings, and the checks below them by name.

    Args:
        environment: as it was when the command began.
        output: the folder of runs.
    """
    return [
        ("Versions 版本", [("python", versions.check_python), ("packages", versions.check_packages)]),
        ("Devices 设备", [("torch", check_devices)]),
        (
            "Machine 机器",
            [
                ("port", machine.check_port),
                ("disk", partial(machine.check_disk_space, output)),
                ("shared memory", machine.check_shared_memory),
                ("open files", machine.check_open_files),
                ("hub", partial(machine.check_switches, environment)),
            ],
        ),
    ]


def check_devices() -> Iterator[Finding]:
    """Host, GPUs, number format and compilers; a problem where torch cannot even be imported."""
    with importing():
        from novelgpt.checks import devices

    checks = {"host": devices.check_host, "gpu": devices.check_gpus, "precision": devices.check_precision}
    for name, check in {**checks, "compilers": devices.check_toolchain}.items():
        yield from run_check(name, check)


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
        from novelgpt.checks import trial
        from novelgpt.checks.devices import check_precision
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
        yield from run_check(trial.NAME, partial(trial.check_trial, run, estimate, pipeline, args, time_limit))
    else:
        yield Finding(trial.NAME, "note", "not tried", "fix the problems above first")


def _silent(name: str, check: Check) -> list[Finding]:
    """What the check finds, without what libraries print meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run_check(name, check)


def _quiet() -> None:
    """No downloads, no warnings and no log of libraries: what counts is told as a finding."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _words(model: str | None, files: Sequence[str], max_length: int | None, output: str | None) -> list[str]:
    """The pipeline's words for the options that this command names as well."""
    words = [] if model is None else ["--model", model]
    words += ["--train_files", *files] if files else []
    words += [] if max_length is None else ["--max_length", str(max_length)]
    return words + ([] if output is None else ["--output_dir", output])


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m novelgpt.doctor",
        description="Look at the installation, the machine and a run before it starts. Nothing is downloaded.",
        epilog="Further options are those of the pipeline, as --config, --per_device_train_batch_size, --precision.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="look at this base too: a folder, a hub name that is in the cache, or tiny")
    parser.add_argument("--pipeline", choices=PIPELINES, default="finetune", help="which training [%(default)s]")
    parser.add_argument("--train_files", nargs="+", default=[], metavar="FILE", help="what it trains on [its samples]")
    parser.add_argument("--max_length", type=int, metavar="TOKENS", help="tokens of the longest row [2048]")
    parser.add_argument("--output_dir", type=from_home, metavar="FOLDER", help="run folder [output/PIPELINE]")
    parser.add_argument("--time_limit", type=float, default=40, metavar="S", help="for the longest batch [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there as well")
    return parser


if __name__ == "__main__":
    main()
