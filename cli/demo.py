"""The whole workflow on the small base and the samples: pretrain, fine-tune, LoRA-fine-tune, predict, report, tables.

    novelgpt demo [FOLDER]

Each step is the real command, in its own process. No GPU, no model hub.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from novelgpt.launch.start import SETTLED, own_paths
from novelgpt.scoring.row_scores import RowScores
from novelgpt.scoring.score_table import CHARACTERS, NATS, TOKENS
from novelgpt.scoring.summary import Comparison, compare_rows
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console, number_table
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.hardware import visible_gpus
from novelgpt.settings.paths import OUTPUT, ROOT, SAMPLES, check_folder_can_be_made
from novelgpt.settings.remedies import environment_program
from novelgpt.settings.signals import STOP_SIGNALS
from novelgpt.settings.small_bases import TINY, copy_tiny
from novelgpt.settings.terminal import say
from novelgpt.settings.third_party import process_defaults

POLL_SECONDS = 0.1
RUNS = ("base", "pretrain", "finetune", "finetune_lora")
SUMMARY = "summary.json"  # {} until the demo ends; a folder without it is no demo's
MADE = (TINY, *RUNS, "report")
# The test rows are answered like this, by all models alike.
ANSWERS = (
    "--data_files", str(SAMPLES / "papers" / "test.jsonl"), "--batch_size", "128", "--max_new_tokens", "320",
    "--do_sample", "--temperature", "1", "--top_k", "50", "--top_p", "1",
)  # fmt: skip
MODELS = {"base": "base", "pretrain": "pretrained", "finetune": "full SFT", "finetune_lora": "LoRA SFT"}
ROUGE = ("rouge-1", "rouge-2", "rouge-l")
SHARES = ("stopped", "looped")
COMPARED = ("loss", "rouge-l")
# What these are computed from, of a row.
SCORED = ("rouge-l", NATS, TOKENS, CHARACTERS)
BITS = "eval_bits_per_character"


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run all steps into the folder that the command line names; stop at the first that fails, with its exit status."""
    parser = CommandParser(prog="python -m cli.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=OUTPUT / "demo", metavar="FOLDER",
        help="where everything goes; what an earlier demo left there is replaced [default: output/demo]",
    )  # fmt: skip
    demo = parser.parse_args(argv).folder.resolve()
    check_folder_can_be_made(demo, f"the folder {demo}")
    _clear(demo)
    base = demo / TINY  # a copy of its own: scores go into a model's card
    copy_tiny(base)

    say("", "== 1/5 The untouched base answers the held-out titles")
    _predict(base, "--output_dir", str(demo / "base"))

    say("", "== 2/5 Continued pretraining on one novel, evaluated on another")
    novels, papers = SAMPLES / "novels", SAMPLES / "papers"
    train = ("--train_files", str(novels / "deng_ta_xia_de_xin.txt"))
    _train("pretrain", base, demo / "pretrain", novels / "shan_zhong_yao_pu.txt", *train)
    _predict(demo / "pretrain")

    for step, (pipeline, title) in {
        3: ("finetune", "Full fine-tuning on title -> abstract pairs"),
        4: ("finetune_lora", "LoRA fine-tuning on the same pairs"),
    }.items():
        say("", f"== {step}/5 {title}")
        _train(pipeline, demo / "pretrain", demo / pipeline, papers / "valid.jsonl")
        _predict(demo / pipeline)

    say("", "== 5/5 Results")
    _run("predict.report", *(str(demo / name) for name in RUNS), "--output", str(demo / "report"))
    write_summary(demo)


def _clear(demo: Path) -> None:
    """Remove what an earlier demo left.

    Raises:
        UserError: the folder has something of the same name that no demo made.
    """
    found = [path for path in (demo / name for name in MADE) if path.exists() or path.is_symlink()]
    if found and not (demo / SUMMARY).is_file():
        names = ", ".join(path.name for path in found)
        raise UserError(f"{demo} has {names}, not of a demo, which would replace that", "name another folder")
    demo.mkdir(parents=True, exist_ok=True)
    atomic_write(demo / SUMMARY, "{}\n")
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _train(pipeline: str, model: Path, output: Path, valid: Path, *further: str) -> None:
    settings = ROOT / pipeline / "configs" / f"{TINY}.yaml"
    options = ["--model", str(model), "--config", str(settings), "--valid_files", str(valid)]
    _run("novelgpt.launch.start", pipeline, *options, "--output_dir", str(output), *further)


def _predict(model: Path, *further: str) -> None:
    _run("novelgpt.launch.start", "predict", "--model", str(model), *ANSWERS, *further)


def _run(*args: str) -> None:
    """Run a module to its end in its own session: it gets each signal once, from here, and handles it itself.

    Raises:
        SystemExit: with its status, where that is not 0.
    """
    environment = {name: value for name, value in os.environ.items() if name not in SETTLED}
    environment |= {"HF_HUB_OFFLINE": "1", **own_paths(environment)}
    environment |= process_defaults(environment, None, visible_gpus(environment))
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    process = subprocess.Popen([sys.executable, "-m", *args], env=environment, start_new_session=True)
    sent = 0
    while process.poll() is None:
        for new in received[sent:]:
            sent += 1
            with suppress(ValueError):  # some systems can send only few
                process.send_signal(new)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=POLL_SECONDS)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if process.returncode != 0:
        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    if received:
        raise SystemExit(128 + received[0])


def write_summary(demo: Path) -> None:
    """Write summary.json into the folder of a demo whose runs have ended, and print its tables.

    The base is not trained: its seconds and tokens per second are those of answering.
    """
    runs = {name: _read_json(demo / name / "run.json")["results"] for name in MODELS if name != "base"}
    summary: dict[str, Any] = {}
    for name in MODELS:
        scores = _read_json(_answers(demo, name) / "scores.json")
        figures = {metric: scores[metric] for metric in ("loss", "perplexity", *ROUGE, *SHARES)}
        figures["seconds"] = scores["seconds"] if name == "base" else runs[name]["train_runtime"]
        figures["tokens_per_second"] = runs.get(name, scores)["tokens_per_second"]
        summary[name] = figures
    before, after = (runs["pretrain"][name] for name in (f"start_{BITS}", BITS))
    summary["base"]["heldout_book_bits_per_character"] = before
    summary["pretrain"]["heldout_book_bits_per_character"] = after
    comparisons = compare_with_both(demo)
    summary["comparisons"] = [
        {"of": tuned, "with": other, **asdict(one)} for tuned, other, found in comparisons for one in found
    ]
    atomic_write(demo / SUMMARY, json.dumps(summary, indent=2) + "\n")
    console = make_console(soft_wrap=True)
    headings = ("model", "loss", *ROUGE, *SHARES, "seconds", "tokens/s")
    table = _plain_table("Held-out title -> abstract pairs", *headings)
    for name, label in MODELS.items():
        figures = summary[name]
        table.add_row(
            label,
            f"{figures['loss']:.3f}",
            *(f"{100 * figures[metric]:.2f}" for metric in ROUGE),
            *(f"{figures[share]:.2f}" for share in SHARES),
            f"{figures['seconds']:.0f}",
            f"{figures['tokens_per_second']:,.0f}",
        )
    console.print(table)
    table = _plain_table("Paired differences, with 95 % intervals", "", *COMPARED)
    for tuned, other, found in comparisons:
        cells = (_difference(one) for one in found)
        table.add_row(f"{MODELS[tuned]} - {MODELS[other]}", *cells)
    console.print(table)
    say(
        f"Held-out book: {before:.3f} -> {after:.3f} bits per character by pretraining.",
        "Loss in nats per token, ROUGE in %; stopped, looped: shares of the answers that the model ended by itself and "
        f"that fell into a loop; answers drawn: {_settings()}.",
        "seconds and tokens/s of training (base: of answering).",
        f"  curves        {demo}/*/loss.png",
        f"  predictions   {demo}/base/predictions.jsonl, {demo}/*/predict/predictions.jsonl",
        f"  figures       {demo / SUMMARY}",
        f"  all curves    {environment_program('tensorboard')} --logdir {shlex.quote(str(demo))}",
    )


def compare_with_both(demo: Path) -> list[tuple[str, str, list[Comparison]]]:
    """Compare each fine-tuned model of a demo with the base and with the pretrained one, row by row.

    Returns:
        Names of the two, and the scores `COMPARED`, of which `second` is the fine-tuned model's.
    """
    rows = {name: _rows_to_compare(_answers(demo, name) / "row_scores.jsonl") for name in MODELS}
    found = []
    for tuned in ("finetune", "finetune_lora"):
        for other in ("base", "pretrain"):
            scores = {one.name: one for one in compare_rows(rows[other], rows[tuned])}
            found.append((tuned, other, [scores[name] for name in COMPARED]))
    return found


def _rows_to_compare(path: Path) -> list[RowScores]:
    rows = map(json.loads, path.read_bytes().splitlines())
    return [{name: row[name] for name in SCORED} for row in rows]


def _difference(one: Comparison) -> str:
    scale, digits = (1, 3) if one.name == "loss" else (100, 2)
    numbers = [f"{scale * number:+.{digits}f}" for number in (one.second - one.first, one.low, one.high)]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _settings() -> str:
    """How answers are generated, as the command line says it."""
    words = ANSWERS[ANSWERS.index("--max_new_tokens") :]
    return " ".join(words)


def _answers(demo: Path, name: str) -> Path:
    return demo / name if name == "base" else demo / name / "predict"


def _plain_table(title: str, *headings: str) -> Table:
    table = number_table(title, *headings)
    table.box, table.show_edge, table.pad_edge, table.padding = SIMPLE_HEAD, False, False, (0, 1, 0, 0)
    return table


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
