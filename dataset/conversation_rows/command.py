"""Papers or prepared novels to question and answer rows.

    python -m dataset conversations papers.jsonl rows.jsonl --task title_to_abstract
    python -m dataset conversations prepared/ rows.jsonl --task next_chapter continue_text

Each row of the output names its task; its wording is drawn when it is loaded. Rows that are left out go to
rows.rejected.jsonl, with the reason; rows of held-out books to rows.held_out.jsonl.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy
from rich.table import Table
from rich.text import Text

from dataset.conversation_rows.filters import REASONS, Limits, RowFilter
from dataset.conversation_rows.sources import ChunkLimits, Row, RowCandidate, find_splits, read_candidates, read_table
from dataset.instructions import BUILT_IN, Instructions, load_instructions
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.locks import make_and_lock, unlock
from novelgpt.settings.paths import from_home
from novelgpt.settings.terminal import say, visible

EXAMPLE_CHARACTERS = 300


@dataclass
class Tally:
    """Counts of one split: read == kept + sum(dropped.values())."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"question": [], "answer": []})
    example: Row | None = None


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the rows of the tasks that the command line names."""
    args = _parse(argv)
    output: Path = args.output
    if output.suffix != ".jsonl":
        raise UserError(f"{output} does not end in .jsonl", "name the output last, ending in .jsonl")
    if any(path.exists() and path.resolve() == output.resolve() for path in [*args.inputs, *args.exclude]):
        raise UserError(f"{output} is read and written", "name another output")
    instructions = load_instructions(args.instruction_templates, seed=args.instruction_seed)
    for task in args.task:
        instructions.wordings(task, "--task")
    measure = _token_counter(args.model) if args.model else len
    limits = Limits(
        (args.question_min, args.question_max), (args.answer_min, args.answer_max), args.max_characters,
        args.chinese_share, args.near_duplicates, args.drop_leaks,
    )  # fmt: skip
    filters = {split: RowFilter(limits, instructions, measure) for split in ("held_out", "train")}
    for path in args.exclude:
        for row_filter in filters.values():
            row_filter.exclude(read_table(path, args.columns), args.task)
    _show(_write(args, instructions, filters), instructions, "tokens" if args.model else "characters")
    for name, label in (("train", "rows    "), ("held_out", "held out"), ("rejected", "left out")):
        path = _output_paths(output)[name]
        if path.is_file():
            say(f"  {label}   {path}")


def _parse(argv: list[str] | None) -> Namespace:
    parser = CommandParser(prog="python -m dataset conversations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "inputs", type=Path, nargs="+", help="files of papers (.jsonl .json .csv .tsv .parquet) or prepared folders"
    )
    parser.add_argument("output", type=Path, help="rows, as .jsonl")
    tasks = ", ".join(load_instructions().tasks)
    parser.add_argument("--task", nargs="+", required=True, help=f"one or more of: {tasks}, or your own")
    parser.add_argument("--columns", nargs="+", default=[], help="names of the columns, in order, of .tsv and .csv "
                        "files without a header; _ leaves one out")  # fmt: skip
    parser.add_argument("--exclude", nargs="+", type=Path, default=[], help="files whose rows are excluded, "
                        "such as those of the evaluation")  # fmt: skip
    parser.add_argument("--max_characters", type=int, default=8000, help="of question and answer in the longest "
                        "wording; context is cut to fit [default: 8000]")  # fmt: skip
    parser.add_argument("--previous_chapters", type=int, default=1, help="next_chapter: max chapters of context "
                        "[default: 1]")  # fmt: skip
    parser.add_argument("--opening_characters", type=int, default=300, help="continue_text: min length of the text "
                        "before the answer [default: 300]")  # fmt: skip
    parser.add_argument("--question_min", type=int, default=2, help="min length of a question, without its wording")
    parser.add_argument("--question_max", type=int, help="max length of a question [default: no limit]")
    parser.add_argument("--answer_min", type=int, default=2, help="min length of an answer")
    parser.add_argument("--answer_max", type=int, help="max length of an answer [default: no limit]")
    parser.add_argument("--model", help="folder or hub name: measure the four lengths in its tokens")
    parser.add_argument("--chinese_share", type=float, default=0.3, help="min share of Chinese characters among the "
                        "letters [default: 0.3]")  # fmt: skip
    parser.add_argument("--near_duplicates", type=float, default=0.8, help="similarity from which rows are "
                        "duplicates; 0 is off [default: 0.8]")  # fmt: skip
    parser.add_argument("--drop_leaks", action="store_true", help="drop rows whose question contains the answer")
    parser.add_argument(
        "--instruction_templates", nargs="+", type=from_home, default=[], help="YAML files of wordings, as in training"
    )
    parser.add_argument("--instruction_seed", type=int, default=42, help="of the wording of the example that is shown")
    args = parser.parse_args(argv)
    for name, least in (("max_characters", 1), ("previous_chapters", 1), ("opening_characters", 1)):
        if vars(args)[name] < least:
            raise UserError(f"--{name} {vars(args)[name]} is too small", f"take at least {least}")
    for name in ("chinese_share", "near_duplicates"):
        if not 0 <= vars(args)[name] <= 1:
            raise UserError(f"--{name} {vars(args)[name]} is not a share", "take a number from 0 to 1")
    return args


def _token_counter(model: str) -> Callable[[str], int]:
    # The model libraries take seconds to load, and are needed only here.
    from novelgpt.model.tokenizer import load_tokenizer
    from novelgpt.settings.arguments import ModelArguments
    from novelgpt.text.encoding import encode

    tokenizer = load_tokenizer(ModelArguments(model))
    return lambda text: len(encode(text, tokenizer))


def _output_paths(output: Path) -> dict[str, Path]:
    beside = {name: output.with_name(f"{output.stem}.{name}.jsonl") for name in ("rejected", "held_out")}
    return beside | {"train": output}


def _write(args: Namespace, instructions: Instructions, filters: dict[str, RowFilter]) -> dict[str, Tally]:
    """Write the three files, which appear under their names when all are complete.

    Raises:
        UserError: another run writes them, they cannot be written, or no row is left.
    """
    splits = [find_splits(path) for path in args.inputs]
    limits = ChunkLimits(args.max_characters, args.previous_chapters, args.opening_characters)
    paths = _output_paths(args.output)
    partial = {name: path.with_name(path.name + ".partial") for name, path in paths.items()}
    tallies = {"held_out": Tally(), "train": Tally()}
    ids: Counter[str] = Counter()
    try:
        handle, _ = make_and_lock(args.output.absolute().parent, partial["train"].name)
    except BlockingIOError as error:
        raise UserError(f"another run writes {args.output}", "wait for its end, or name another output") from error
    except OSError as error:
        raise UserError(f"{args.output}: {error.strerror}", "name an output that can be written") from error
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for name, path in partial.items()
            }
            for split, tally in tallies.items():
                shards = [path for found in splits for path in found[split]]
                for task in args.task:
                    candidates = read_candidates(shards, task, instructions, limits, args.columns)
                    for row in _keep(candidates, filters[split], tally, files["rejected"], ids):
                        files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
                        if split == "held_out":
                            # Rows for evaluation are not trained on, whatever book contains them.
                            filters["train"].exclude([(row["source"], row)], [task])
        if not sum(tally.kept for tally in tallies.values()):
            dropped = sum((tally.dropped for tally in tallies.values()), Counter[str]())
            reasons = ", ".join(f"{number:,} {REASONS[reason]}" for reason, number in dropped.most_common())
            raise UserError(f"no row is left: {reasons or 'nothing was read'}", "loosen what drops most")
        for name, path in paths.items():
            if name != "rejected" and not tallies[name].kept:
                path.unlink(missing_ok=True)
            else:
                partial[name].replace(path)
    except OSError as error:
        raise UserError(f"{args.output}: {error.strerror}", "name an output that can be written") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
        unlock(handle)
    return tallies


def _keep(
    candidates: Iterable[RowCandidate], row_filter: RowFilter, tally: Tally, rejected: TextIO, ids: Counter[str]
) -> Iterator[Row]:
    """The rows that pass; the others are counted and written to `rejected`."""
    for candidate in candidates:
        row = candidate.row
        ids[row["id"]] += 1
        if ids[row["id"]] > 1:
            row["id"] += f"~{ids[row['id']]}"
        tally.read += 1
        reason, detail = row_filter.judge(candidate)
        if reason:
            tally.dropped[reason] += 1
            rejected.write(json.dumps({"reason": reason, "detail": detail, "row": row}, ensure_ascii=False) + "\n")
            continue
        tally.kept += 1
        for side, text in zip(("question", "answer"), row_filter.sides(row), strict=True):
            tally.lengths[side].append(row_filter.measure(text))
        tally.example = tally.example or row
        yield row


def _show(tallies: dict[str, Tally], instructions: Instructions, unit: str) -> None:
    """The closing table, one column per split, and one row in its wording."""
    console = make_console()
    shown = {name: tally for name, tally in tallies.items() if tally.read}
    table = Table("", title="Conversations 对话数据", title_justify="left")
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row("candidates 候选", *(f"{tally.read:,}" for tally in shown.values()))
    table.add_row(Text("kept 保留", style="green"), *(f"{tally.kept:,}" for tally in shown.values()))
    for reason, text in REASONS.items():
        if any(tally.dropped[reason] for tally in shown.values()):
            table.add_row(f"  {text} ({reason})", *(f"{tally.dropped[reason]:,}" for tally in shown.values()))
    for side in ("question", "answer"):
        cells = []
        for tally in shown.values():
            quantiles: Iterable[float] = numpy.quantile(tally.lengths[side], (0.1, 0.5, 0.9, 1.0)) if tally.kept else []
            cells.append(" / ".join(f"{value:.0f}" for value in quantiles) or "-")
        table.add_row(f"{unit} of {side}: p10 / median / p90 / max", *cells)
    console.print(table)
    example = next((tally.example for tally in reversed(shown.values()) if tally.example), None)
    if example is not None:
        say(f"One row, in a wording of {BUILT_IN.name} or yours, drawn by the seed:")
        for message in instructions.messages(example["task"], example, example["source"]):
            text = message["content"]
            if len(text) > EXAMPLE_CHARACTERS:
                text = f"{text[: EXAMPLE_CHARACTERS // 2]} … {text[-EXAMPLE_CHARACTERS // 2 :]}"
            style = "green" if message["role"] == "assistant" else "dim"
            console.print(Text.assemble((message["role"], "bold"), " ", (visible(text), style)))


if __name__ == "__main__":
    main()
