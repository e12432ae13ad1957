"""A folder of novels to clean chapters, without repeats, split by book, and a report.

    python -m dataset novels RAW_FOLDER OUT

Run again, it does what is new or changed.
"""

from __future__ import annotations

from pathlib import Path

from dataset.novels.collection import CollectionOptions
from dataset.novels.engines.cluster import read_slurm_options
from dataset.novels.prepare import file_options
from dataset.novels.run import ENGINES, EngineOptions, prepare_novels
from dataset.novels.shards import FORMATS
from dataset.novels.terminal import Display
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import say

INTERRUPTED = 130


def make_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        prog="python -m dataset novels",
        description="A folder of novels -> clean chapters, without repeats, split by book, and a report. "
        "Run it again after a change or an interrupt: finished files are not done again.",
    )
    parser.add_argument("raw", type=Path, help="folder of .txt, .txt.gz, .zip, .epub and .jsonl files")
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="of the chapters [default: parquet]")
    parser.add_argument("--shard_size", type=int, default=256, metavar="MB", help="text per file [default: 256]")
    parser.add_argument("--rules", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
                        help="further cleaning rules, in the format of dataset/novels/cleaning/rules.yaml")  # fmt: skip
    parser.add_argument("--to_simplified", action="store_true", help="convert traditional characters to simplified")
    parser.add_argument("--held_out", nargs="+", action="extend", default=[], metavar="NAME",
                        help="books (name or file) that are kept out of training, for evaluation")  # fmt: skip
    parser.add_argument("--held_out_share", type=float, default=None, metavar="SHARE",
                        help="share of the books, chosen by the seed, that is held out [default: 0.05, and 0 where "
                        "--held_out names some]")  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="[default: 42]")
    parser.add_argument("--near_duplicate_threshold", type=float, default=0.8, metavar="SHARE",
                        help="similarity from which chapters are duplicates [default: 0.8]")  # fmt: skip
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes [default: one per core]")
    parser.add_argument("--engine", choices=ENGINES, default="local",
                        help="what prepares the files: processes of this machine, or datatrove's executors for "
                        "processes, Slurm or Ray [default: local]")  # fmt: skip
    parser.add_argument("--slurm", nargs="+", action="extend", default=[], metavar="OPTION=VALUE",
                        help="options of sbatch, such as partition=cpu time=04:00:00")  # fmt: skip
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Prepare the folder that the command line names."""
    args = make_parser().parse_args(argv)
    share = args.held_out_share if args.held_out_share is not None else 0.0 if args.held_out else 0.05
    for name, value, fits in (
        ("shard_size", args.shard_size, args.shard_size >= 1),
        ("workers", args.workers, args.workers >= 1),
        ("held_out_share", share, 0 <= share < 1),
        ("near_duplicate_threshold", args.near_duplicate_threshold, 0 < args.near_duplicate_threshold <= 1),
    ):
        if not fits:
            raise UserError(f"--{name} {value} is out of range", f"see `{python_module('dataset novels --help')}`")
    collection = CollectionOptions(
        format=args.format,
        shard_megabytes=args.shard_size,
        held_out=tuple(args.held_out),
        held_out_share=share,
        seed=args.seed,
        near_duplicate_threshold=args.near_duplicate_threshold,
    )
    engine = EngineOptions(args.engine, args.workers, read_slurm_options(args.slurm))
    display = Display()
    try:
        files = file_options(tuple(path.resolve() for path in args.rules), args.to_simplified)
        result = prepare_novels(args.raw, args.out, files, collection, engine, display)
        if result is None:
            say("nothing to do: the same files, rules and options 无需处理")
        else:
            display.show_results(result)
        display.show_next(args.out)
    except KeyboardInterrupt:
        say("interrupted 已中断: run the same command again to resume; files that are done stay done", stderr=True)
        raise SystemExit(INTERRUPTED) from None
