"""Continued training on a model's own distribution, with the faults that Baichuan2's training forward had.

    python benchmarks/baichuan2/training_forward.py [--picture FILE] [--json FILE]

A model that goes on with the very data it was trained on has nothing to learn: its evaluation loss must stay where it
is. The faults change the forward pass of training alone, evaluation is right in all: ALiBi left out, and attention's
output not transposed back (both in the 13B code of 2023-09-06). A further curve has the right forward pass and a
learning rate far too high. About 3 minutes on 2 CPU cores.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import at_least, make_console, make_parser, result, show_results, write_results
from small_model import Source, evaluation_loss, pretrained_model, train

STEPS, EVALUATE_EVERY = 80, 10
RATE, HIGH_RATE = 2e-4, 3e-2
HELD_OUT_ROWS = 64
SMOOTHED = 5
# Rise of the evaluation loss over the run, in nats: none to speak of, or one to see.
FLAT, CLIMB = 0.02, 0.05


def without_alibi(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Training sees a causal mask without biases."""
    if not module.training:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    # The biases are in the mask.
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2).contiguous(), None


def without_transposition(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Training reads [rows, heads, tokens, head_dim] as if it were [rows, tokens, heads, head_dim]."""
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    if module.training:
        output = output.transpose(1, 2).contiguous().view(output.shape)
    return output, None


FAULTS = {"without_alibi": without_alibi, "without_transposition": without_transposition}
for name, function in FAULTS.items():
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)

CASES = {
    "right": ("sdpa", RATE),
    "ALiBi left out in training": ("without_alibi", RATE),
    "output not transposed back in training": ("without_transposition", RATE),
    f"right, learning rate {HIGH_RATE:g}": ("sdpa", HIGH_RATE),
}


def draw(curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """Training losses, evaluation losses of the faults beside the right forward, and those of the high rate."""
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    training, faults, rates = figure.subplots(1, 3)
    high = f"right, learning rate {HIGH_RATE:g}"
    for number, (name, (losses, evaluations)) in enumerate(curves.items()):
        style = {"color": f"C{number}", "label": name, "linewidth": 2.4 if name == "right" else 1.5}
        windows = [losses[max(0, end - SMOOTHED) : end] for end in range(1, len(losses) + 1)]
        training.plot(range(1, len(losses) + 1), [sum(window) / len(window) for window in windows], **style)
        for axes, left_out in ((faults, high), (rates, None)):
            if name != left_out and (axes is faults or name in ("right", high)):
                axes.plot(range(0, STEPS + 1, EVALUATE_EVERY), evaluations, "o-", markersize=4, **style)
    titles = (
        f"training loss (mean of {SMOOTHED} steps)",
        "evaluation loss: faults in training",
        "evaluation loss: rate",
    )
    for axes, title in zip((training, faults, rates), titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("step of continued training")
        axes.grid(alpha=0.3)
    training.set_ylabel("nats per token")
    training.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Pretrain once, then a run for each case."""
    parser = make_parser("Faults of Baichuan2's training forward")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the curves to FILE, a PNG")
    arguments = parser.parse_args()
    console = make_console()
    base = pretrained_model()
    held_out = Source(seed=3).rows(HELD_OUT_ROWS)
    console.print(f"pretrained: evaluation loss {evaluation_loss(base, held_out):.4f}")
    curves = {}
    table = Table("training forward", "training loss, first and last ten steps", "evaluation loss, every ten steps")
    for name, (attention, rate) in CASES.items():
        model = copy.deepcopy(base)
        model.set_attn_implementation(attention)
        curves[name] = train(model, Source(seed=4), STEPS, rate, evaluate_every=EVALUATE_EVERY, held_out=held_out)
        losses, evaluations = curves[name]
        table.add_row(name, f"{sum(losses[:10]) / 10:.3f} … {sum(losses[-10:]) / 10:.3f}",
                      " ".join(f"{loss:.3f}" for loss in evaluations))  # fmt: skip
    console.print(table)
    rises = [evaluations[-1] - evaluations[0] for _, evaluations in curves.values()]
    results = [result("evaluation_loss_rises_right_forward", rises[0], "nats", FLAT)]
    results += [
        at_least(f"evaluation_loss_rises_{fault}", rise, "nats", CLIMB)
        for fault, rise in zip(FAULTS, rises[1:], strict=False)
    ]
    show_results(results, console)
    write_results(results, arguments.json)
    if arguments.picture:
        draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
