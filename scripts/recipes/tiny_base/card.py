"""The model card of a base that the recipe made, from recorded figures alone: python …/card.py OUT [LICENSE].

Reads made_from.json, parts/books.json, the run folders stable and decay, and evaluation.json of OUT; writes README.md
and curve.png into OUT/tiny.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from novelgpt.model.card import Card, code, table, use_section, write_card
from novelgpt.settings.atomic_files import atomic_write, hash_file
from novelgpt.settings.charts import COLOURS, figure_png
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.terminal import say, visible
from scripts.recipes.tiny_base.origin import recipe_hash, recorded

STAGES = ("stable", "decay")
PARTS = ("modern", "earlier", "held_out")
SAMPLES = 10
MAX_BYTES = 50_000_000


class Curve(NamedTuple):
    """Figures of one run: its evaluations after so many tokens of the whole training.

    `ditto` is the share of its blocks that are pseudo-repetitions.
    """

    name: str
    evaluations: list[dict[str, float]]
    tokens: int
    max_length: int
    tokens_per_second: float
    ditto: float
    run: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Of training on all tokens, in as many attempts as it took; without evaluations."""
        return self.tokens / self.tokens_per_second


def read_curve(folder: Path, before: int) -> Curve:
    """The figures of a finished run.

    Args:
        folder: of the run.
        before: tokens of earlier runs.

    Raises:
        UserError: the run has not finished.
    """
    run = read_object(folder / "run.json")
    if run.get("status") != "finished":
        raise UserError(f"{folder} is not finished", "run the recipe again: it resumes")
    training = run["arguments"]["training"]
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * run["processes"]
    step_tokens = rows * run["arguments"]["data"]["max_length"]
    entries = map(json.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    evaluations = {
        entry["step"]: {
            "tokens": before + entry["step"] * step_tokens,
            "loss": entry["eval_loss"],
            "bits": entry["eval_bits_per_character"],
        }
        for entry in entries
        if "eval_bits_per_character" in entry
    }
    results = run["results"]
    return Curve(
        folder.name, [evaluations[step] for step in sorted(evaluations)], training["max_steps"] * step_tokens,
        run["arguments"]["data"]["max_length"], results["tokens_per_second"],
        run["arguments"]["data"].get("ditto", 0.0), run,
    )  # fmt: skip


def curve_table(curves: Sequence[Curve]) -> str:
    """The evaluations of the training."""
    rows = [
        [f"{one['tokens'] / 1e6:.2f} M", f"{one['loss']:.3f}", f"{one['bits']:.3f}"]
        for curve in curves
        for one in curve.evaluations
    ]
    return table(["tokens 已训练 token 数", "nats per token 每 token loss", "bits per character 每字比特"], rows)


def bits_table(bits: Mapping[str, Any], characters: Mapping[str, int]) -> str:
    """A row per held-out work, a column per model.

    Args:
        bits: of each model, as benchmarks/tiny_base.py records them.
        characters: of each work that were read.
    """
    rows = [[code(work), f"{count:,}", *(f"{one['works'][work]:.3f}" for one in bits.values())]
            for work, count in characters.items()]  # fmt: skip
    rows.append(["all 合计", f"{sum(characters.values()):,}", *(f"{one['all']:.3f}" for one in bits.values())])
    tokens = [f"{one['characters_a_token']:.2f}" for one in bits.values()]
    rows.append(["characters per token 每 token 字数", "", *tokens])
    for label, name in (("weights, M 参数", "all"), ("embeddings of these, M 其中嵌入", "embeddings")):
        rows.append([label, "", *(f"{one['weights'][name] / 1e6:.2f}" for one in bits.values())])
    return table(["work 作品", "characters 字数", *map(code, bits)], rows)


def distance_of(sampled: Sequence[Mapping[str, Any]]) -> int:
    """Of neighbouring samples."""
    return max(1, len(sampled) // SAMPLES)


def sample_of(sampled: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Continuations at equal distances, without what would end a block of Markdown or control a terminal."""
    chosen = sampled[:: distance_of(sampled)][:SAMPLES]
    texts = [{"id": one["id"], "opening": one["opening"].rstrip()[-80:], "text": one["text"]} for one in chosen]
    return [{name: visible(text).replace("```", "'''") for name, text in one.items()} for one in texts]


def draw_curve(curves: Sequence[Curve]) -> bytes:
    """Bits per character against tokens, as a PNG file."""
    figure = Figure(figsize=(6, 3.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for curve, colour in zip(curves, COLOURS, strict=False):
        evaluations = curve.evaluations if curve.name != STAGES[0] else curve.evaluations[1:]  # random weights
        tokens, bits = ([one[name] for one in evaluations] for name in ("tokens", "bits"))
        label = f"blocks of {curve.max_length:,} tokens"
        axes.plot([number / 1e6 for number in tokens], bits, "o-", color=colour, markersize=3, label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("bits per character, held-out works")
    axes.grid(alpha=0.4)
    axes.legend(frameon=False)
    return figure_png(figure)


def render(out: Path, curves: Sequence[Curve], evaluation: dict[str, Any], license_name: str) -> Card:
    """The card, from the template beside this file.

    Args:
        out: folder of the recipe, with the list of its books.
        curves: of its runs.
        evaluation: what benchmarks/tiny_base.py recorded.
        license_name: of the weights, as hubs write it; "" where none is stated.
    """
    listed = read_object(out / "parts" / "books.json", max_bytes=MAX_BYTES)
    books = {part: [book for book in listed["books"] if book["part"] == part] for part in PARTS}
    recipe, settings = recorded(out)
    written = evaluation["continuations"]
    sampled = written.get("sampled", [])
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    template = environment.from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    text = template.render(
        own=next(iter(evaluation["bits"].values())), compared=len(evaluation["bits"]) > 2, curves=curves,
        books={part: sorted(of_part, key=itemgetter("title")) for part, of_part in books.items()},
        parts=listed["parts"], papers=listed["papers"], papers_file=listed["papers_file"],
        modern_copies=settings["MODERN"], paper_copies=int(settings["PAPER"]),
        use=use_section(False, "tiny", "qwen3", chat=False), recipe=recipe, recipe_now=recipe_hash(),
        weights=hash_file(out / "tiny" / "model.safetensors")[0],
        tokens=sum(curve.tokens for curve in curves), seconds=sum(curve.seconds for curve in curves),
        curve_table=curve_table(curves), bits_table=bits_table(evaluation["bits"], evaluation["characters"]),
        sampled=sampled, samples=sample_of(sampled), nth=distance_of(sampled),
        loops=sum(one["loops"] for one in sampled), greedy_loops=sum(one["loops"] for one in written.get("greedy", [])),
        broken=sum(one["broken"] for one in sampled), ended=sum(one["ended"] for one in sampled), code=code,
        millions=lambda number: f"{number / 1e6:,.2f}",
    )  # fmt: skip
    lead, *parts = text.strip("\n").split("\n## ")
    named = (part.partition("\n") for part in parts)
    metadata = {
        "library_name": "transformers", "pipeline_tag": "text-generation", "language": ["zh"],
        "tags": ["novelgpt", "from-scratch"], "metrics": ["perplexity"],
    }  # fmt: skip
    metadata |= {"license": license_name} if license_name else {}
    return Card(metadata, "tiny", {"": lead} | {name: body.strip("\n") for name, _, body in named})


def write(out: Path, license_name: str = "") -> None:
    """Write the card and its picture.

    Raises:
        UserError: a file is missing, or the folder has a card of someone else.
    """
    curves: list[Curve] = []
    for stage in STAGES:
        curves.append(read_curve(out / stage, sum(curve.tokens for curve in curves)))
    card = render(out, curves, read_object(out / "evaluation.json", max_bytes=MAX_BYTES), license_name)
    folder = out / "tiny"
    if not write_card(folder, card):
        raise UserError(f"{folder} has a README.md that somebody has edited", "move it away, and run this again")
    atomic_write(folder / "curve.png", draw_curve(curves))
    say(f"{folder / 'README.md'}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the card of the folder that the command line names."""
    out, *license_name = sys.argv[1:] if argv is None else argv
    write(Path(out), *license_name)


if __name__ == "__main__":
    main()
