"""Fine-tuning on a million rows: how fast they are read, how fast a run starts again, and what memory that takes.

    python benchmarks/rows_at_scale.py [--rows 1000000] [--only first_start second_start …] [--folder FOLDER]
        [--against CHECKOUT] [--trl_python PYTHON] [--llamafactory_python PYTHON] [--json FILE]

Rows of about 200 tokens are made from the sample novels, for the small base. Each part runs commands as a user does, in
processes of their own, with caches of their own:

* first_start: rows/s of reading, tokenising and packing with an empty cache on all cores, against the same of another
  version in a checkout (`--against`), or against one row after the other through the maker of labels, on one core;
* second_start: `python -m finetune` with a full cache, from its start to step 1, and the private memory (RssAnon) of
  its process, above 16 bytes a weight for the model in training, and against that with a tenth of the rows;
* ranks: two under the launcher: how many rows are tokenised, and the private memory of both against a tenth;
* peers: TRL's SFTTrainer and LLaMA-Factory up to where training would begin, packed, on 100,000 of the rows, twice;
* scoring: `python -m predict.score` on as many short rows, in the memory that a tenth of them takes as well;
* prediction: 20,000 rows from a server that answers at once, in the same way.

Files stay in --folder, where the next call finds them. All parts take about 45 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Processes that are started do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from made_rows import RowMaker, as_pair, as_prediction, write_rows
from peers.contest import PIP_LINES
from private_memory import Usage, run_measured
from results import at_least, make_console, make_parser, result, show_results, write_results
from rich.console import Console
from safetensors import safe_open

from novelgpt.model.tiny_random import build_tiny_random
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.paths import ROOT

PEERS = Path(__file__).resolve().parent / "peers"
TOKENS, MAX_LENGTH = 200, 2048
REFERENCE_ROWS, PEER_ROWS, PREDICTED_ROWS = 100_000, 100_000, 20_000
SPEED_TARGET, PEER_TARGET, START_TARGET, MEMORY_TARGET, FLAT_TARGET = 1.7, 1.0, 30.0, 1.2, 1.1
SAID_TARGET = 0.9  # of a few rows nothing is said
TRAINING_BYTES = 16  # of a weight, its gradient and AdamW's two moments in fp32
# Seconds on 2 cores: for a million rows, and for parts of a fixed number of rows.
EXPECTED = {"first_start": 300, "second_start": 450, "ranks": 400, "scoring": 1000}
EXPECTED_FIXED = {"peers": 120, "prediction": 150}
TOKENISED = re.compile(r"([\d,]+) rows? (?:is|are) tokenised once")


@dataclass
class Bench:
    """What all parts share.

    Attributes:
        folder: for rows, caches and runs.
        rows: number of them.
        maker: of rows.
        console: for what is said.
        arguments: of the command line.
    """

    folder: Path
    rows: int
    maker: RowMaker
    console: Console
    arguments: argparse.Namespace

    @property
    def tenth(self) -> int:
        """The number of rows that memory is compared with."""
        return self.rows // 10

    @property
    def model(self) -> Path:
        """The small base, with the template that all contenders can render."""
        return self.folder / "model"

    def alpaca(self, count: int) -> Path:
        """A file of the first rows, in Alpaca's shape."""
        path = self.folder / "rows" / f"alpaca-{count}.jsonl"
        return write_rows(path, itertools.islice(self.maker.rows(), count), dict)

    def cache(self, name: str, empty: bool) -> dict[str, str]:
        """Variables with a cache of this benchmark's own."""
        folder = self.folder / f"cache-{name}"
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
        return {"HF_DATASETS_CACHE": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def work(self, name: str) -> Path:
        """An empty folder."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def say(self, text: str) -> None:
        """A line of figures."""
        self.console.print(f"  {text}", markup=False)


def megabytes(usage: Usage) -> str:
    """The private memory of a command."""
    child = f", largest child {usage.child / 1e6:,.0f} MB" if usage.child else ""
    return f"{usage.own / 1e6:,.0f} MB private{child}"


def prepare(
    bench: Bench, script: str, python: str, cache: dict[str, str], task: dict[str, Any]
) -> tuple[dict[str, Any], Usage]:
    """What a script of benchmarks/peers says of reading rows, and what it took."""
    work = bench.work("reading")
    result_file, task_file = work / "result.json", work / "task.json"
    made = {"model": str(bench.model), "max_length": MAX_LENGTH, "output_dir": str(work / "out"), **task}
    made |= {"result_file": str(result_file), "workers": len(os.sched_getaffinity(0))}
    task_file.write_text(json.dumps(made), encoding="utf-8")
    usage = run_measured([python, str(PEERS / script), str(task_file)], work, work / "log.txt", cache)
    return json.loads(result_file.read_text(encoding="utf-8")), usage


def study_first_start(bench: Bench) -> list[dict[str, Any]]:
    """Rows a second with an empty cache, over those of the reference."""
    count = min(bench.rows, REFERENCE_ROWS)
    task = {"rows_file": str(bench.alpaca(count)), "plain": bench.arguments.against is None}
    variables = bench.cache("reference", empty=True)
    name = "one core, row by row"
    if bench.arguments.against is not None:
        variables["PYTHONPATH"] = str(bench.arguments.against.absolute())
        name = f"the version in {bench.arguments.against}"
    before, usage = prepare(bench, "novelgpt_rows.py", sys.executable, variables, task)
    reference = count / before["seconds"]
    bench.say(f"{name}: {count:,} rows, {reference:,.0f} rows/s, {megabytes(usage)}")
    rate = 0.0
    for number in sorted({count, bench.rows}):
        cache = bench.cache("first", empty=True)
        task = {"rows_file": str(bench.alpaca(number))}
        ours, usage = prepare(bench, "novelgpt_rows.py", sys.executable, cache, task)
        rate = number / ours["seconds"]
        bench.say(f"first start: {number:,} rows, {rate:,.0f} rows/s, {ours['packs']:,} packs, {megabytes(usage)}")
    return [at_least("rows/s of a first start / of the reference", rate / reference, "ratio", SPEED_TARGET)]


def finetune(bench: Bench, count: int, ranks: int, cache: dict[str, str], name: str) -> Usage:
    """A run of one step; `reached` is when metrics.jsonl tells of it."""
    work = bench.work(f"run-{name}-{count}")
    metrics = work / "run" / "metrics.jsonl"

    def first_step() -> bool:
        return metrics.is_file() and '"step": 1' in metrics.read_text(encoding="utf-8")

    words = ["--train_files", str(bench.alpaca(count)), "--output_dir", str(work / "run")]
    words += ["--max_length", str(MAX_LENGTH), "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"]
    words += ["--eval_strategy", "no", "--eval_on_start", "False", "--per_device_train_batch_size", "1"]
    if ranks == 1:
        command = [sys.executable, "-m", "finetune", "--model", str(bench.model), *words]
    else:
        command = [sys.executable, "-m", "novelgpt.launch.start", "finetune", *words]
        cache = cache | {"NPROC": str(ranks), "MODEL": str(bench.model), "CUDA_VISIBLE_DEVICES": "-1"}
    return run_measured(command, work, work / "log.txt", cache, first_step)


def study_second_start(bench: Bench) -> list[dict[str, Any]]:
    """Seconds to step 1 with a full cache, and private memory."""
    with safe_open(bench.model / "model.safetensors", "numpy") as weights:
        numbers = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118
    model = numbers * TRAINING_BYTES
    usages = {}
    for count in (bench.tenth, bench.rows):
        cache = bench.cache("first", empty=False)
        first = finetune(bench, count, 1, cache, "first")
        usages[count] = finetune(bench, count, 1, cache, "second")
        for words, usage in (("command before", first), ("second start", usages[count])):
            bench.say(f"{words}: {count:,} rows, step 1 after {usage.reached or -1:.1f} s, {megabytes(usage)}")
    large, small = usages[bench.rows], usages[bench.tenth]
    return [
        result("seconds from a second start to step 1", large.reached or float("inf"), "s", START_TARGET),
        result("private memory above the model's", (large.own - model) / 1e9, "GB", MEMORY_TARGET),
        result("private memory, all rows / a tenth", large.own / small.own, "ratio", FLAT_TARGET),
    ]


def study_ranks(bench: Bench) -> list[dict[str, Any]]:
    """Rows that two ranks tokenise, and what both hold for themselves."""
    usages, tokenised = {}, 0
    for count in (bench.tenth, bench.rows):
        usages[count] = finetune(bench, count, 2, bench.cache("ranks", empty=True), "ranks")
        log = (bench.folder / f"run-ranks-{count}" / "log.txt").read_text(encoding="utf-8")
        tokenised = sum(int(found.replace(",", "")) for found in TOKENISED.findall(log))
        private = usages[count].ranks / 1e6
        bench.say(f"2 ranks: {count:,} rows, {tokenised:,} tokenised, {private:,.0f} MB private of both ranks")
    ratio = usages[bench.rows].ranks / max(1, usages[bench.tenth].ranks)
    return [
        result("rows that 2 ranks tokenise / rows", tokenised / bench.rows, "ratio", 1.0),
        at_least("rows of which they say so / rows", tokenised / bench.rows, "ratio", SAID_TARGET),
        result("private memory of 2 ranks, all rows / a tenth", ratio, "ratio", FLAT_TARGET),
    ]


def study_peers(bench: Bench) -> list[dict[str, Any]]:
    """The same rows up to where training would begin, with an empty cache and with a full one."""
    count = min(bench.rows, PEER_ROWS)
    rows_file = bench.alpaca(count)
    pairs_file = write_rows(
        rows_file.with_name(f"pairs-{count}.jsonl"), itertools.islice(bench.maker.rows(), count), as_pair
    )
    info = {"rows": {"file_name": rows_file.name}}
    (rows_file.parent / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    task = {"rows_file": str(rows_file), "pairs_file": str(pairs_file), "dataset_dir": str(rows_file.parent),
            "dataset": "rows"}  # fmt: skip
    contenders = {
        "this toolkit": (sys.executable, "novelgpt_rows.py"),
        "TRL": (bench.arguments.trl_python, "trl_rows.py"),
        "LLaMA-Factory": (bench.arguments.llamafactory_python, "llamafactory_rows.py"),
    }
    seconds: dict[str, float] = {}
    for name, (python, script) in contenders.items():
        if python is None:
            bench.say(f"{name}: no interpreter is named; {PIP_LINES[name]} makes one")
            continue
        for words in ("first start", "second start"):
            cache = bench.cache(script.removesuffix(".py"), empty=words == "first start")
            found, usage = prepare(bench, script, python, cache, task)
            seconds.setdefault(name, found["seconds"])
            bench.say(
                f"{name}, {words}: {count:,} rows, {found['seconds']:.1f} s, {count / found['seconds']:,.0f} rows/s, "
                f"{found['packs']:,} packs, {megabytes(usage)}"
            )
    ours = seconds.pop("this toolkit")
    return [
        at_least(f"rows/s of a first start / {name}'s", theirs / ours, "ratio", PEER_TARGET)
        for name, theirs in seconds.items()
    ]


def study_scoring(bench: Bench) -> list[dict[str, Any]]:
    """Private memory of scoring short rows."""
    usages = []
    for count in (bench.tenth, bench.rows):
        rows = itertools.islice(bench.maker.rows(), count)
        file = write_rows(bench.folder / "rows" / f"predictions-{count}.jsonl", rows, as_prediction)
        work = bench.work(f"scores-{count}")
        command = [sys.executable, "-m", "predict.score", str(file), "--output", str(work / "scores.json")]
        usages.append(run_measured(command, work, work / "log.txt", bench.cache("scores", empty=False)))
        rate = count / usages[-1].seconds
        bench.say(f"scoring: {count:,} rows in {usages[-1].seconds:.1f} s, {rate:,.0f} rows/s, {megabytes(usages[-1])}")
    return [result("private memory of scoring, all / a tenth", usages[1].own / usages[0].own, "ratio", FLAT_TARGET)]


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    port_file = work / "port"
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("answering_server.py")), str(port_file)])
    try:
        while not port_file.exists() or not port_file.read_text(encoding="utf-8"):
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port_file.read_text(encoding='utf-8')}/v1"
    finally:
        process.kill()
        process.wait()


def study_prediction(bench: Bench) -> list[dict[str, Any]]:
    """Private memory of predicting through a server."""
    usages = []
    count = min(bench.rows, PREDICTED_ROWS)
    for number in (count // 10, count):
        work = bench.work(f"predicted-{number}")
        with serving(work) as url:
            command = [sys.executable, "-m", "predict", "--endpoint", url, "--data_files", str(bench.alpaca(number))]
            command += ["--output_dir", str(work / "out")]
            usages.append(run_measured(command, work, work / "log.txt", bench.cache("scores", empty=False)))
        rate = number / usages[-1].seconds
        bench.say(
            f"predicting: {number:,} rows in {usages[-1].seconds:.1f} s, {rate:,.0f} rows/s, {megabytes(usages[-1])}"
        )
    return [result("private memory of predicting, all / a tenth", usages[1].own / usages[0].own, "ratio", FLAT_TARGET)]


STUDIES = {
    "first_start": study_first_start,
    "second_start": study_second_start,
    "ranks": study_ranks,
    "peers": study_peers,
    "scoring": study_scoring,
    "prediction": study_prediction,
}


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("Fine-tuning on a million rows")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="folder of another version to compare with")
    parser.add_argument("--trl_python", metavar="PYTHON", help="interpreter that has trl")
    parser.add_argument("--llamafactory_python", metavar="PYTHON", help="interpreter that has llamafactory")
    parser.add_argument("--folder", type=Path, help="where rows, caches and runs stay; default: a temporary one")
    return parser.parse_args()


def main() -> None:
    """Run the parts asked for; then the targets."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    console = make_console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        if not (folder / "model").exists():
            build_tiny_random(folder / "model")
        tokenizer = load_tokenizer(ModelArguments(str(folder / "model")))
        maker = RowMaker(tokenizer, TOKENS)
        bench = Bench(folder, arguments.rows, maker, console, arguments)
        console.print(f"rows of {maker.mean_tokens(tokenizer):.0f} tokens, {maker.characters:.0f} characters")
        results = []
        for name in arguments.only:
            seconds = EXPECTED.get(name, 0) * arguments.rows / 1e6 + EXPECTED_FIXED.get(name, 60)
            console.print(f"{name}: about {seconds / 60:.0f} min")
            results += STUDIES[name](bench)
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
