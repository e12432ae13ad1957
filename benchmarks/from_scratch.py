"""What models of random weights reach in minutes: loss, bits per character and sample texts of each small ready size.

    python benchmarks/from_scratch.py --held_out PREPARED --tokenizer FOLDER --folder WORK
        [--minutes 10] [--only NAME …] [--docs docs] [--json FILE]

PREPARED is a folder of `dataset novels` with held-out works. Every ready size of at most 10.5 M weights is trained with
`python -m pretrain --config_name SIZE` and the settings of pretrain/configs/from_scratch.yaml: a few steps tell its
speed, and so how many steps fill the minutes. A hundredth and a tenth of the steps are runs of their own, so that their
learning rate has come down as well; all three write 200 characters after the openings of held-out chapters, sampled at
temperature 0.8 and top-p 0.8, and are evaluated in bits per character on the held-out works.

Sizes that have a WORK/SIZE.json are not trained again. All that are there must have been measured alike: for as long,
on as many cores, with one vocabulary. --docs writes them, in both languages, between the `measured` marks of
from_scratch.md and zh/from_scratch.md of that folder, and from_scratch.png beside. For larger sizes the pages get an
estimate, marked as such: the time to the compute-optimal point, at the FLOP/s that the small ones sustained.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Processes that are started do not get the folder of this file by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from held_out_bits import bits_of_works, load, read_works, weights_of
from matplotlib.figure import Figure
from results import make_console, make_parser, write_results
from tiny_base import SAMPLED, openings, quietly
from transformers import AutoConfig, PreTrainedTokenizerBase

from novelgpt.checks.scale import OPTIMAL_TOKENS_PER_WEIGHT
from novelgpt.model.card import code, table
from novelgpt.model.random_config import random_config
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import atomic_write, hash_json
from novelgpt.settings.charts import COLOURS, LINES, figure_png
from novelgpt.settings.errors import UserError, exit_on_user_error, reason_of
from novelgpt.settings.hardware import usable_cores
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.paths import ROOT
from novelgpt.settings.random_weights import SIZES, RandomWeights
from novelgpt.settings.terminal import visible
from predict.__main__ import main as predict_main

MOST_WEIGHTS = 10_500_000
SHARES = (0.01, 0.1, 1.0)
CALIBRATION_STEPS = 12
ROWS, LENGTH = 8, 512
STEP_TOKENS = ROWS * LENGTH
EVALUATED_CHARACTERS, EVALUATED_CONTEXT = 20_000, 512
SAMPLES, SAMPLE_TOKENS, SAMPLE_CHARACTERS = 2, 300, 200
FLOP_PER_WEIGHT_AND_TOKEN = 6  # of training, arXiv:2001.08361
# What figures have in common that stand in one table.
FACTS = ("minutes", "cores", "vocabulary", "characters", "precision", "tokenizer", "train_files")
SECTION = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("What models of random weights reach in minutes")
    parser.add_argument("--held_out", type=Path, required=True, metavar="PREPARED", help="folder of `dataset novels`")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--folder", type=Path, required=True, metavar="WORK", help="for tokens, runs and figures")
    parser.add_argument("--train_files", nargs="+", default=[], metavar="FOLDER",
                        help="tokens to train on, in place of those made of PREPARED")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, of each size")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="measure some of the sizes")
    parser.add_argument("--precision", default="auto", help="as in training")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="pages to write the figures into")
    return parser.parse_args(argv)


def weights_with(size: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Weights of a ready size with the vocabulary of a tokenizer."""
    settings = read_object(size)
    return weights_of(random_config(RandomWeights(size.stem, settings, {}, "", 1, 0, Path()), tokenizer))["all"]


def listed_weights(size: Path) -> int:
    """Weights of a ready size with its own vocabulary, as the pages list them."""
    return weights_of(AutoConfig.for_model(**read_object(size) | {"pad_token_id": None}))["all"]


def run(module: str, *words: str) -> None:
    """A command of the toolkit in a process of its own; what it says is shown only where it fails."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", module, *words], env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module}: {done.stdout[-1500:]}{done.stderr[-1500:]}")


def pretrain(size: str, steps: int, out: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Train from random weights; the entries of metrics.jsonl. What had been interrupted is done again."""
    shutil.rmtree(out, ignore_errors=True)
    run("pretrain", "--config_name", size, "--output_dir", str(out), "--max_steps", str(steps), "--max_length",
        str(LENGTH), "--per_device_train_batch_size", str(ROWS), "--save_strategy", "no", *words)  # fmt: skip
    return [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]


def speed(entries: Sequence[Mapping[str, Any]]) -> float:
    """Tokens a second; the first figures include warming up."""
    speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    return float(statistics.median_high(speeds))


def sample_texts(model: Path, rows: Path, work: Path) -> list[str]:
    """What a model writes after each opening."""
    out = work / "samples"
    shutil.rmtree(out, ignore_errors=True)
    words = ["--model", str(model), "--data_files", str(rows), "--output_dir", str(out)]
    quietly(predict_main, *words, "--max_new_tokens", str(SAMPLE_TOKENS), *SAMPLED)
    lines = (out / "predictions.jsonl").read_bytes().splitlines()
    return [json.loads(line)["prediction"][:SAMPLE_CHARACTERS] for line in lines]


def measure(size: Path, arguments: argparse.Namespace, train: Sequence[str], valid: str) -> dict[str, Any]:
    """Train a size for the minutes, and for parts of its steps; all that is known of it then."""
    work = arguments.folder / size.stem
    work.mkdir(parents=True, exist_ok=True)
    words = ["--tokenizer_name", str(arguments.tokenizer), "--train_files", *train, "--valid_files", valid]
    words += ["--precision", arguments.precision, "--max_eval_share", "0.05"]
    quiet = ["--eval_strategy", "no", "--eval_on_start", "False", "--logging_steps", "4"]
    rate = speed(pretrain(size.stem, CALIBRATION_STEPS, work / "calibration", [*words, *quiet]))
    steps = max(1, round(arguments.minutes * 60 * rate / STEP_TOKENS))
    rows = openings(arguments.held_out, SAMPLES, 42, work)
    works = read_works(arguments.held_out, EVALUATED_CHARACTERS)
    found: dict[str, Any] = {"name": size.stem, "parts": []}
    for share in SHARES:
        part = max(1, round(steps * share))
        out = work / f"{share:g}"
        eval_steps = str(0.1 if part >= 10 else 1.0)
        options = [*words, "--eval_steps", eval_steps, "--logging_steps", str(max(1, part // 100))]
        entries = pretrain(size.stem, part, out, options)
        loaded = load(out)
        bits = bits_of_works(loaded, works, EVALUATED_CONTEXT)
        texts = sample_texts(out, work / "openings.jsonl", work)
        written = [{"id": row["id"], "opening": row["text_prompt"].rstrip()[-60:], "text": text}
                   for row, text in zip(rows, texts, strict=True)]  # fmt: skip
        found["parts"].append({"share": share, "steps": part, "tokens": part * STEP_TOKENS, "bits": bits["all"],
                               "loss": bits["loss"], "samples": written})  # fmt: skip
        if share == SHARES[-1]:
            found |= curve_of(entries) | {"tokens_per_second": speed(entries)}
            found["weights"] = weights_of(loaded.model.config)
    return found


def curve_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"losses": of training, "evaluations"}, each with the tokens read and the seconds of the run so far."""
    losses, evaluations, seconds = [], [], 0.0
    for entry in entries:
        seconds = entry.get("seconds", seconds)
        place = {"tokens": entry["step"] * STEP_TOKENS, "seconds": seconds}
        if "loss" in entry:
            losses.append(place | {"loss": entry["loss"]})
        elif "eval_bits_per_character" in entry:
            evaluations.append(place | {"loss": entry["eval_loss"], "bits": entry["eval_bits_per_character"]})
    return {"losses": losses, "evaluations": evaluations}


def sustained(found: Sequence[Mapping[str, Any]]) -> float:
    """FLOP/s of the sizes that were measured, their median."""
    return statistics.median(
        FLOP_PER_WEIGHT_AND_TOKEN * one["weights"]["all"] * one["tokens_per_second"] for one in found
    )


def hours_to_optimum(weights: int, speed: float) -> float:
    """Hours to the compute-optimal point of so many weights, at a speed in FLOP/s."""
    return FLOP_PER_WEIGHT_AND_TOKEN * weights * OPTIMAL_TOKENS_PER_WEIGHT * weights / speed / 3600


def check_alike(described: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether figures may stand in one table.

    Args:
        described: FACTS, by what they are of.

    Raises:
        UserError: they were not measured alike.
    """
    (first, facts), *others = described.items()
    for other, own in others:
        pairs = {name: (facts.get(name), own.get(name)) for name in FACTS}
        differing = ", ".join(f"{name} {one} and {two}" for name, (one, two) in pairs.items() if one != two)
        if differing:
            raise UserError(f"{first} and {other} differ: {differing}", "name another --folder")


WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "lead": "Measured by `python benchmarks/from_scratch.py`: about {minutes:g} minutes of training each, on "
        "{cores} CPU cores, with a vocabulary of {vocabulary:,} tokens. Loss and bits per character are those on the "
        "first {characters:,} characters of each held-out work. A hundredth and a tenth of the steps are runs of "
        "their own.",
        "measured": ["Size", "Weights", "Tokens/s", "Seconds", "Tokens", "Nats per token", "Bits per character"],
        "curve": "Evaluations of the longest runs",
        "larger": "These sizes sustained {speed:.1e} FLOP/s (median; 6 x weights x tokens/s). At that speed, larger "
        "ones would reach the compute-optimal point after these times, **not measured here**. Larger matrices do "
        "better.",
        "estimated": ["Size", "Time at that speed"],
        "hours": "{:,.0f} h",
        "samples": "What they write after the opening of a held-out chapter, sampled at temperature 0.8 and top-p 0.8, "
        "unselected:",
        "trained": "{}, {:.2f} M tokens",
    },
    "zh": {
        "lead": "用 `python benchmarks/from_scratch.py` 实测：{cores} 个 CPU 核，每种规模训练约 {minutes:g} 分钟，"
        "词表 {vocabulary:,}。loss 和每字比特是在留出作品上测的，每部取开头 {characters:,} 字。"
        "百分之一、十分之一的步数各自单独训练，跑完整个学习率计划。",
        "measured": ["规模", "参数", "token/s", "秒", "token 数", "每 token loss", "每字比特"],
        "curve": "各规模最长一次训练的评估",
        "larger": "以上规模实际达到 {speed:.1e} FLOP/s（中位数，按 6 x 参数 x token/s 计）。按这个速度，"
        "更大的规模训练到计算最优需要下列时间，**未实测**；矩阵越大，实际越快。",
        "estimated": ["规模", "按此速度所需时间"],
        "hours": "{:,.0f} 小时",
        "samples": "接着留出章节的开头往下写，采样（温度 0.8，top-p 0.8），未经挑选：",
        "trained": "{}，{:.2f} M token",
    },
}


def section(language: str, found: Sequence[Mapping[str, Any]], estimated: Mapping[str, float]) -> str:
    """The Markdown of a page.

    Args:
        language: en or zh.
        found: of every small size, measured alike.
        estimated: hours to the compute-optimal point, by larger size.
    """
    words = WORDS[language]
    rows = []
    for one in found:
        for part in one["parts"]:
            seconds = part["tokens"] / one["tokens_per_second"]
            rows.append([code(one["name"]), f"{one['weights']['all'] / 1e6:.2f} M", f"{one['tokens_per_second']:,.0f}",
                         f"{seconds:,.0f}", f"{part['tokens'] / 1e6:.2f} M", f"{part['loss']:.2f}",
                         f"{part['bits']:.2f}"])  # fmt: skip
    picture = "from_scratch.png" if language == "en" else "../from_scratch.png"
    lines = [words["lead"].format(**found[0]), table(words["measured"], rows), f"![{words['curve']}]({picture})"]
    if estimated:
        times = [[code(name), words["hours"].format(hours)] for name, hours in estimated.items()]
        lines += [words["larger"].format(speed=sustained(found)), table(words["estimated"], times)]
    lines.append(words["samples"])
    for one in found:
        for part in one["parts"]:
            sample = part["samples"][0]
            text = visible(f"…{sample['opening']}\n→ {sample['text']}").replace("```", "'''")
            trained = words["trained"].format(code(one["name"]), part["tokens"] / 1e6)
            lines.append(f"{trained}\n\n```text\n{text}\n```")
    return "\n\n".join(lines) + "\n"


def draw(found: Sequence[Mapping[str, Any]]) -> bytes:
    """Bits per character over seconds, as a PNG file."""
    figure = Figure(figsize=(6, 3.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(found):
        evaluations = one["evaluations"][1:]  # before training there is nothing to see
        seconds = [each["tokens"] / one["tokens_per_second"] for each in evaluations]
        axes.plot(seconds, [each["bits"] for each in evaluations], color=COLOURS[number % len(COLOURS)],
                  linestyle=LINES[number % len(LINES)], label=one["name"])  # fmt: skip
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per character, held-out works")
    axes.grid(alpha=0.4)
    axes.legend(frameon=False)
    return figure_png(figure)


def split_pages(folder: Path) -> dict[str, tuple[Path, str, str]]:
    """{language: (page, what stands before the figures, what stands after them)}.

    Raises:
        UserError: a page cannot be read, or has no place for the figures.
    """
    pages = {}
    for language, path in (("en", folder / "from_scratch.md"), ("zh", folder / "zh" / "from_scratch.md")):
        try:
            page = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {reason_of(error)}", "name a folder like docs after --docs") from error
        marks = SECTION.search(page)
        if marks is None:
            raise UserError(f"{path} has no <!-- measured --> and <!-- /measured --> to write the figures between",
                            "add these two lines where the figures are to stand")  # fmt: skip
        pages[language] = (path, page[: marks.end(1)], page[marks.start(2) :])
    return pages


def write_docs(folder: Path, found: Sequence[Mapping[str, Any]], estimated: Mapping[str, float]) -> None:
    """Put the figures into both pages, and the picture beside them.

    Raises:
        UserError: as split_pages; nothing is written then.
    """
    for language, (path, before, after) in split_pages(folder).items():
        atomic_write(path, f"{before}{section(language, found, estimated)}{after}")
    atomic_write(folder / "from_scratch.png", draw(found))


def facts_of(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """FACTS of what is measured now."""
    values = (arguments.minutes, usable_cores(), len(tokenizer), EVALUATED_CHARACTERS, arguments.precision,
              hash_json(sorted(tokenizer.get_vocab().items())), arguments.train_files)  # fmt: skip
    return dict(zip(FACTS, values, strict=True))


def study(
    arguments: argparse.Namespace, small: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """The figures of each size that is asked for or has been measured before, in the order of `small`.

    Raises:
        UserError: --only names another size, there is none, the pages would lack one, or figures were not measured
            alike.
    """
    vocabulary = len(tokenizer)
    if not small:
        raise UserError(f"with {vocabulary:,} tokens, each ready size has more than {MOST_WEIGHTS / 1e6:g} M weights",
                        "take a tokenizer with fewer tokens")  # fmt: skip
    if unknown := [name for name in arguments.only if name not in small]:
        raise UserError(f"--only {' '.join(unknown)}: no ready size of at most {MOST_WEIGHTS / 1e6:g} M weights",
                        f"name some of {', '.join(small)}")  # fmt: skip
    paths = {name: arguments.folder / f"{name}.json" for name in small}
    stored = {name: read_object(path) for name, path in paths.items() if path.is_file()}
    missing = [name for name in arguments.only or small if name not in stored]
    lacking = [name for name in small if name not in stored and name not in missing]
    if arguments.docs and lacking:
        raise UserError(
            f"--docs: the pages would lack {', '.join(lacking)}", "measure these as well, or leave --docs out"
        )
    facts = facts_of(arguments, tokenizer)
    check_alike({str(paths[name]): one for name, one in stored.items()} | ({"this run": facts} if missing else {}))
    if missing:
        tokens = str(arguments.folder / "tokens")
        run("dataset", "tokens", str(arguments.held_out), tokens, "--model", str(arguments.tokenizer))
    for name, size in small.items():
        if name in missing:
            stored[name] = measure(size, arguments, arguments.train_files or [tokens], tokens) | facts
            atomic_write(paths[name], json.dumps(stored[name], ensure_ascii=False, indent=1) + "\n")
        if name in stored:
            yield stored[name]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Measure what is not known yet, a size after the other; then the pages."""
    arguments = read_arguments(argv)
    console = make_console()
    if arguments.docs:
        split_pages(arguments.docs)  # before hours of training
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = load_tokenizer(ModelArguments(str(arguments.tokenizer)))
    sizes = sorted(SIZES.glob("*.json"), key=lambda size: (weights_with(size, tokenizer), size))
    small = {size.stem: size for size in sizes if weights_with(size, tokenizer) <= MOST_WEIGHTS}
    found = []
    for one in study(arguments, small, tokenizer):
        found.append(one)
        parts = ", ".join(f"{part['tokens'] / 1e6:.2f} M tokens: {part['bits']:.3f}" for part in one["parts"])
        console.print(f"{one['name']}: {one['tokens_per_second']:,.0f} tokens/s; bits per character after {parts}")
    speed = sustained(found)
    larger = sorted((listed_weights(size), size.stem) for size in sizes if size.stem not in small)
    estimated = {name: hours_to_optimum(weights, speed) for weights, name in larger}
    if arguments.docs:
        write_docs(arguments.docs, found, estimated)
    write_results([], arguments.json, sizes=found, estimated_hours=estimated)


if __name__ == "__main__":
    main()
