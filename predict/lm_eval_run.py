"""Standard benchmarks with lm-evaluation-harness, and a table of before and after.

    python -m predict.lm_eval_run --model output/finetune --tasks cmmlu,ceval-valid
    python -m predict.lm_eval_run --compare output/base/lm_eval output/finetune/lm_eval

The harness gets models as prediction loads them: Baichuan and Qwen v1 with this toolkit's classes, adapters merged in
memory, no code from a checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field

from novelgpt.export.full_checkpoint import PICKLES_HELP
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.hub import folder_of
from novelgpt.model.loading import BASE_HELP
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console, number_table
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parsed_files import check_fields, read_object
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import say
from novelgpt.text.encoding import document_begin_ids

GENERAL_TASKS = "cmmlu,ceval-valid"
CERTAIN = 1.96  # standard errors


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the harness, or compare two of its results."""
    parser = CommandParser(
        prog="python -m predict.lm_eval_run",
        description="Standard benchmarks. Options that are not listed go to lm_eval as they are: `lm_eval run --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="full checkpoint, adapter folder or hub name; tiny is the small base")
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--tasks", default=GENERAL_TASKS, help=f"comma-separated names [default: {GENERAL_TASKS}]")
    parser.add_argument("--num_fewshot", help="solved examples in each prompt [default: the task's]")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask in the chat template")
    parser.add_argument("--limit", help="only so many questions per task, for a quick try")
    parser.add_argument("--batch_size", default="8", help="questions at once, or auto [default: 8]")
    parser.add_argument("--include_path", type=from_home, help="folder with tasks of your own")
    parser.add_argument("--allow_pickles", action="store_true", help=PICKLES_HELP)
    parser.add_argument("--output_path", type=Path, help="folder of the results [default: MODEL/lm_eval]")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"),
                        help="two results, or folders, whose newest result is taken")  # fmt: skip
    args, further = parser.parse_known_args(argv)
    if args.compare:
        if further:
            raise UserError(f"--compare does not take {further[0]}", "name two results only")
        _compare(*args.compare)
        return
    if not args.model:
        raise UserError("no model is named", "--model FOLDER, or --compare BEFORE AFTER")
    output = args.output_path or folder_of(ModelArguments(args.model), "--output_path") / "lm_eval"
    model = f"pretrained={args.model}"
    model += ",allow_pickles=True" if args.allow_pickles else ""
    model += f",base={args.base}" if args.base else ""
    options = {
        "--model": "novelgpt", "--model_args": model, "--tasks": args.tasks, "--batch_size": args.batch_size,
        "--device": "cuda" if torch.cuda.is_available() else "cpu", "--output_path": str(output),
        "--num_fewshot": args.num_fewshot, "--limit": args.limit, "--include_path": args.include_path,
    }  # fmt: skip
    chosen = [arg for option in options.items() if option[1] is not None for arg in option]
    _run_harness(["run", *chosen, *["--apply_chat_template"] * args.apply_chat_template, *further])
    say(f"results in {output}")


def _run_harness(argv: list[str]) -> None:
    """Run lm_eval's own command line, which knows the model type "novelgpt" besides its own.

    Raises:
        UserError: the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"the harness cannot be loaded: {error}", pip_install("lm_eval")) from error

    @register_model("novelgpt")
    class Checkpoint(HFLM):
        """A model as prediction loads it."""

        def __init__(
            self,
            pretrained: str,
            device: str | None = None,
            allow_pickles: bool = False,
            base: str | None = None,
            **further: Any,
        ) -> None:
            chosen = ModelArguments(pretrained, "sdpa", allow_pickles=bool(allow_pickles))
            tokenizer = load_tokenizer(chosen)
            model = load_for_inference(chosen, tokenizer, base)
            # As in training, texts start with the tokenizer's start token (Llama, Gemma).
            further.setdefault("add_bos_token", bool(document_begin_ids(tokenizer)))
            # Thinking is off, as in training on answers without thoughts.
            super().__init__(model, backend="causal", tokenizer=tokenizer, enable_thinking=False, **further)

    before, sys.argv = sys.argv, ["lm_eval", *argv]  # which it reads
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _compare(before_path: Path, after_path: Path) -> None:
    before, after = _read_results(before_path), _read_results(after_path)
    for name in ("n-shot", "n-samples", "versions"):
        shared = before.get(name, {}).keys() & after.get(name, {}).keys()
        if different := [task for task in sorted(shared) if before[name][task] != after[name][task]]:
            task = different[0]
            raise UserError(
                f"{task} was asked in two ways: {name} {before[name][task]} and {after[name][task]}",
                "run both models with the same settings",
            )
    if bool(before.get("chat_template")) != bool(after.get("chat_template")):
        raise UserError("only one of the two was asked in a chat template", "run both models with the same settings")
    title = f"{after['model_name']} against {before['model_name']}"
    headings = ("task", "score", "before", "after", "difference", "standard error")
    table = number_table(title, *headings, labels=2)
    members = {task for tasks in before.get("group_subtasks", {}).values() for task in tasks}
    shown = [task for task in before["results"] if task in after["results"] and task not in members]
    if not shown:
        raise UserError(f"{before_path} and {after_path} share no task", "run both models on the same --tasks")
    for task in shown:
        for score, first, second, error in _pairs(before["results"][task], after["results"][task]):
            style = "bold" if error and abs(second - first) > CERTAIN * error else ""
            cell = "" if error is None else f"{error:.4f}"
            table.add_row(task, score, f"{first:.4f}", f"{second:.4f}", f"{second - first:+.4f}", cell, style=style)
    make_console().print(table)
    say(
        "standard error: of the difference, as if the two had answered different questions, which is conservative. "
        f"bold: more than {CERTAIN} of them."
    )


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, float, float, float | None]]:
    """(score, before, after, standard error of the difference if known) of one task."""
    pairs = []
    for name, value in first.items():
        score, _, filtered = name.partition(",")
        both = value, second.get(name)
        if score.endswith("_stderr") or not all(isinstance(number, (int, float)) for number in both) or not filtered:
            continue
        errors = [side.get(f"{score}_stderr,{filtered}") for side in (first, second)]
        known = [float(error) for error in errors if isinstance(error, (int, float))]
        label = score if filtered == "none" else f"{score} ({filtered})"
        pairs.append((label, float(value), float(second[name]), math.hypot(*known) if len(known) == 2 else None))
    return pairs


class _Results(BaseModel):
    results: dict[str, dict[str, Any]]
    group_subtasks: dict[str, list[str]] = {}
    shots: dict[str, Any] = Field({}, alias="n-shot")
    samples: dict[str, Any] = Field({}, alias="n-samples")
    versions: dict[str, Any] = {}


def _read_results(path: Path) -> dict[str, Any]:
    """Results of a file, or of the newest in a folder.

    Raises:
        UserError: there are none.
    """
    files = sorted(path.rglob("results_*.json"), key=lambda file: file.name) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no results_….json", "run the harness first")
    remedy = "name a results_….json or its folder"
    results = read_object(files[-1], remedy)
    check_fields(_Results, results, f"{files[-1]} holds no results of lm_eval", remedy)
    return {"model_name": str(path), **results}


if __name__ == "__main__":
    main()
