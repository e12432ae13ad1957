"""What ALiBi's biases do to attention when they are made in bf16, by row length: three ways to make them.

    python benchmarks/baichuan2/alibi_in_bf16.py [--json FILE]

The original 13B code evaluates with slope x key position, rounded to bf16. That equals slope x distance only before
rounding: at position 4,096 bf16 tells numbers 16 apart. Its training rounds slope x distance. Here, slopes and
positions are split into parts that bf16 holds exactly, and the kernel adds their products in fp32. Shown for the last
query of a row, with the products of queries and keys at zero, over the 40 heads of the 13B models: the largest error of
a bias among the nearest 64 keys, and the share of attention on wrong keys (total variation distance, mean of heads).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import make_console, make_parser, result, show_results, write_results
from rich.table import Table

from novelgpt.model.attention import with_alibi
from novelgpt.model.baichuan.modeling import alibi_slopes

HEADS, HEAD_DIM = 40, 128
LENGTHS = [512, 1_024, 2_048, 4_096]
NEAREST = 64
WAYS = ["positions", "distances", "split"]
# Of the attention that lands on wrong keys.
SPLIT_TARGET = 1e-4


def stored_biases(way: str, length: int) -> torch.Tensor:
    """[heads, keys] biases of the last query in bf16, as fp64."""
    slopes = alibi_slopes(HEADS)
    if way == "split":
        query = torch.zeros(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
        key = torch.zeros(1, HEADS, length, HEAD_DIM, dtype=torch.bfloat16)
        query, key, _ = with_alibi(query, key, key, slopes, HEAD_DIM**-0.5)
        return (query.float() @ key.float().transpose(-1, -2))[0, :, 0].double() * HEAD_DIM**-0.5
    counted = torch.arange(length) - (0 if way == "positions" else length - 1)
    return (slopes[:, None].double() * counted).bfloat16().double()


def errors(way: str, length: int) -> tuple[float, float]:
    """The largest bias error among the nearest keys, and the mean share of misplaced attention."""
    exact = alibi_slopes(HEADS).double()[:, None] * (torch.arange(length) - (length - 1))
    stored = stored_biases(way, length)
    # Softmax does not see what is added to all keys alike.
    shifted = stored - (stored[:, -1:] - exact[:, -1:])
    nearest = (shifted - exact)[:, -NEAREST:].abs().max()
    misplaced = (shifted.softmax(-1) - exact.softmax(-1)).abs().sum(-1) / 2
    return float(nearest), float(misplaced.mean())


def main() -> None:
    """A line for each length."""
    arguments = make_parser("ALiBi's biases in bf16").parse_args()
    console = make_console()
    table = Table("row length", *(f"{way}: {what}" for way in WAYS for what in ("bias error", "misplaced")))
    results = []
    for length in LENGTHS:
        found = {way: errors(way, length) for way in WAYS}
        cells = [cell for bias, misplaced in found.values() for cell in (f"{bias:.2g}", f"{misplaced:.3%}")]
        table.add_row(f"{length:,}", *cells)
        name = f"alibi_split_for_bf16_misplaced_attention_at_{length}"
        results.append(result(name, found["split"][1], "share of attention", SPLIT_TARGET))
    console.print(table)
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
