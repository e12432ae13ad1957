"""How fp16 turns a Baichuan2 into one that answers nothing, and a training loss into 0.

    python benchmarks/baichuan2/fp16_overflow.py [--json FILE]

Large models have a few channels whose activations pass 65,504, the largest number of fp16; bf16 and fp32 hold them.
Here one product of the MLP is scaled up until it does. The logits are then not a number, and greedy search takes the
first token of the vocabulary, <unk>, which decoding leaves out: an empty answer. The Trainer of transformers, unless
told otherwise, writes the mean of earlier losses, or 0, in place of a loss that is not a number.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import at_least, make_console, make_parser, result, show_results, write_results
from small_model import Source, make_model

# Of the products gate x up inside the MLP of the middle layer.
SCALE = 3e4
NEW_TOKENS = 16
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def answer(dtype: torch.dtype) -> tuple[bool, float, list[int]]:
    """Whether all logits are finite, the loss, and the tokens that greedy search gives."""
    model = make_model()
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight *= SCALE
    mlp.gate_proj.weight *= 10
    mlp.down_proj.weight /= SCALE * 10
    model = model.to(dtype).eval()
    rows = Source(seed=5).rows(rows=1, tokens=64)
    outputs = model(input_ids=rows, labels=rows)
    tokens = model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2
    )
    return bool(outputs.logits.isfinite().all()), float(outputs.loss), tokens[0, rows.shape[1] :].tolist()


def main() -> None:
    """A line for each precision."""
    arguments = make_parser("Baichuan2 in fp16").parse_args()
    console = make_console()
    table = Table("precision", "logits", "loss", "greedy answer, as ids")
    shares = {}
    for name, dtype in PRECISIONS.items():
        finite, loss, tokens = answer(dtype)
        shares[name] = sum(token == 0 for token in tokens) / len(tokens)
        table.add_row(name, "finite" if finite else "not a number", f"{loss:.4f}", " ".join(map(str, tokens)))
    console.print(table)
    results = [
        result("share_of_unk_in_bf16_answer", shares["bf16"], "share of tokens", 0.5),
        at_least("share_of_unk_in_fp16_answer", shares["fp16"], "share of tokens", 1.0),
    ]
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
