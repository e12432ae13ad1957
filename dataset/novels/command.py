"""A folder of novels to clean chapters, without repeats, split by book, and a report.

    python -m dataset novels RAW_FOLDER OUT

Every source file becomes an artefact, then come duplicates and the split, then the files that training reads. Run
again, it does what is new or changed. OUT/cache/files/ holds the artefacts, OUT/cache/next/ the files being written;
the files in OUT itself are complete if there is a manifest.json.
"""

from __future__ import annotations

import functools
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dataset.novels.collection import CollectionOptions, CollectionResult, read_records, write_collection
from dataset.novels.engines.cluster import read_slurm_options, run_on
from dataset.novels.engines.workers import map_files
from dataset.novels.held_out.works import SHIPPED, HeldOutWorks, load_held_out_works
from dataset.novels.manifest import HashedFile, hash_files, is_up_to_date, publish, write_manifest
from dataset.novels.prepare import FileOptions, artefact_of, code_digest, file_options, prepare_file
from dataset.novels.shards import FORMATS
from dataset.novels.sources.series import Series, find_series
from dataset.novels.sources.sources import list_folder
from dataset.novels.terminal import Display
from novelgpt.settings.atomic_files import exclusive_folder, hash_json
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.remedies import python_module, run_pipeline
from novelgpt.settings.small_bases import TINY
from novelgpt.settings.terminal import say

INTERRUPTED = 130
VERSION = 1
ENGINES = ("local", "datatrove", "slurm", "ray")


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
                        "--held_out or --held_out_works names some]")  # fmt: skip
    parser.add_argument("--held_out_works", default="", metavar="LIST",
                        help="works that are kept out of training wherever they occur, in whatever edition: "
                        f"{', '.join(SHIPPED)}, or a file that `{python_module('dataset held_out')}` made")  # fmt: skip
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
    named = args.held_out or args.held_out_works
    share = args.held_out_share if args.held_out_share is not None else 0.0 if named else 0.05
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
        listed = load_held_out_works(args.held_out_works) if args.held_out_works else None
        result = prepare_novels(args.raw, args.out, files, collection, engine, display, listed)
        if result is None:
            say("nothing to do: the same files, rules and options 无需处理")
        else:
            display.show_results(result)
        say(f"report 报告: {args.out / 'report.html'}")
        say(f"next 下一步: {run_pipeline('pretrain', f'--train_files {shlex.quote(str(args.out))}')}")
        say(f"  with the model that you train 换成要训练的模型; --model {TINY} tries it on the small base")
    except KeyboardInterrupt:
        say("interrupted 已中断: run the same command again to resume; files that are done stay done", stderr=True)
        raise SystemExit(INTERRUPTED) from None


@dataclass(frozen=True)
class EngineOptions:
    """Where the files are prepared; does not affect the result.

    Attributes:
        engine: one of ENGINES.
        workers: how many files are prepared at a time.
        slurm: options of sbatch.
    """

    engine: str = "local"
    workers: int = 1
    slurm: Mapping[str, str] = field(default_factory=dict)


def prepare_novels(
    raw: Path,
    out: Path,
    files: FileOptions,
    collection: CollectionOptions,
    engine: EngineOptions,
    display: Display,
    listed: HeldOutWorks | None = None,
) -> CollectionResult | None:
    """Bring `out` up to date with `raw`; works in `listed` are kept out of training.

    Returns:
        The collection; None if there was nothing to do.

    Raises:
        UserError: nothing usable in `raw`, a folder that cannot be used, another run in `out`, a full disk, a dead
            worker.
    """
    raw, out = raw.resolve(), out.resolve()
    artefacts = out / "cache" / "files"
    if out == raw or raw in out.parents:
        raise UserError(f"{out} lies in the folder of novels", "name a folder outside of it for what is prepared")
    taken = out.is_dir() and any(out.iterdir()) and not artefacts.is_dir()
    if taken or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} holds something else", "name a new folder")
    with exclusive_folder(out, artefacts):
        return _run(raw, out, files, collection, engine, display, listed)


def _run(
    raw: Path,
    out: Path,
    files: FileOptions,
    collection: CollectionOptions,
    engine: EngineOptions,
    display: Display,
    listed: HeldOutWorks | None,
) -> CollectionResult | None:
    paths, skipped = list_folder(raw)
    hashed: dict[str, HashedFile] = {}
    total = sum(path.stat().st_size for path in paths if path.exists())
    with display.files("reading 读取", len(paths), total) as advance:
        for file in hash_files(paths, engine.workers):
            source = file.path.relative_to(raw).as_posix()
            if file.problem:
                skipped.append((source, file.problem))
            else:
                hashed[source] = file
            advance(file.size)
    works = f"{listed.name}, sha256 {listed.digest}" if listed else ""
    options = {"to_simplified": files.to_simplified, **asdict(collection), "held_out_works": works}
    origin = {
        "version": VERSION,
        "code": code_digest(all_steps=True),
        "rules": files.rules_digest,
        "options": options,
        "inputs": [{"source": name, "sha256": file.sha256, "bytes": file.size} for name, file in hashed.items()],
        "skipped": skipped,
    }
    files = replace(files, series=tuple(find_series([file.path for file in hashed.values()], raw, raw.name)))
    artefacts = {
        file: artefact_of(file.sha256, source, out / "cache" / "files", files)
        for source, file in _join_series(hashed, files.series)
    }
    up_to_date = is_up_to_date(out, origin, engine.workers)
    if not up_to_date:
        finished = out / "cache" / "next"
        shutil.rmtree(finished, ignore_errors=True)
        _prepare_files(artefacts, raw, out / "cache", files, engine, display)
        say("comparing books and chapters, and writing what is left 查重、划分、写出", stderr=True)
        sources = read_records(artefacts.values())
        books = [book for records in sources.values() for book in records]
        if all(book.refused for book in books):
            display.show_refused(books)
            raise UserError(f"nothing usable in {raw}", "name a folder with novels in Chinese")
        finished.mkdir()
        shown = {**options, "rules": files.rules_digest[:12]}
        sha256_of = {source: file.sha256 for source, file in hashed.items()}
        result = write_collection(sources, skipped, collection, shown, finished, listed, sha256_of)
        write_manifest(finished, origin, result.rows_of, engine.workers)
    # Artefacts of files that are gone or have changed, and what a killed run left.
    for folder in set((out / "cache" / "files").iterdir()).difference(artefacts.values()):
        shutil.rmtree(folder)
    if up_to_date:
        return None
    publish(finished, out)
    return result


def _join_series(hashed: Mapping[str, HashedFile], series: Sequence[Series]) -> Iterator[tuple[str, HashedFile]]:
    """(source, file) of each book to prepare: of files that are one book the first one, which represents all."""
    series_of = {member: one for one in series for member in one.members}
    for source, file in hashed.items():
        members = [hashed[member] for member in series_of[source].members] if source in series_of else [file]
        if len(members) == 1:
            yield source, file
        elif members[0] is file:
            sha256 = hash_json([one.sha256 for one in members])
            yield source, HashedFile(file.path, sha256, sum(one.size for one in members))


def _prepare_files(
    artefacts: Mapping[HashedFile, Path],
    raw: Path,
    work: Path,
    options: FileOptions,
    engine: EngineOptions,
    display: Display,
) -> None:
    """Make the missing artefacts, largest first, so that no worker is left alone with a long one at the end."""
    missing = {file: artefact for file, artefact in artefacts.items() if not artefact.is_dir()}
    sizes = {file.path: file.size for file in sorted(missing, key=lambda file: (-file.size, file.path))}
    function = functools.partial(prepare_file, folder=raw, work=work / "files", options=options)
    if engine.engine != "local":
        name = "local" if engine.engine == "datatrove" else engine.engine
        run_on(name, list(sizes), function, work / "logs", engine.workers, slurm=engine.slurm)
    else:
        with display.files("preparing 处理", len(sizes), sum(sizes.values())) as advance:
            for path, _ in map_files(function, list(sizes), engine.workers):
                advance(sizes[path])
    for file, artefact in missing.items():
        if not artefact.is_dir():
            raise UserError(f"{file.path} changed while it was read", "run the same command again")
