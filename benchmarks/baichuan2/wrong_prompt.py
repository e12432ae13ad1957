"""A model fine-tuned on Baichuan2's conversation format, asked with and without the marks of that format.

    python benchmarks/baichuan2/wrong_prompt.py [--json FILE]

The format is <reserved_106> question <reserved_107> answer, and what follows an answer is </s>. A prompt without
<reserved_107> looks like a finished text, which </s> follows: the answer is empty. Shown is the share of prompts whose
first answered token is </s>. About a minute on 2 CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import at_least, make_console, make_parser, result, show_results, write_results
from small_model import VOCABULARY, Source, make_model

END, USER, ASSISTANT, FULL_STOP = 2, 195, 196, 9
MARKS = (END, USER, ASSISTANT, FULL_STOP)
QUESTION, ANSWER = 12, 20
STEPS, ROWS, RATE = 400, 32, 1e-3
PROMPTS = 64


def sentences(source: Source, rows: int, tokens: int) -> torch.Tensor:
    """[rows, tokens] of the distribution without its marks, each with a full stop at its end."""
    ids = source.rows(rows, tokens)
    for mark in MARKS:
        ids = torch.where(ids == mark, (ids + 17) % VOCABULARY, ids)
    ids[:, -1] = FULL_STOP
    return ids


def conversations(source: Source, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of question and answer, and their labels: the answer and </s>."""
    mark = torch.ones(rows, 1, dtype=torch.long)
    question, answer = sentences(source, rows, QUESTION), sentences(source, rows, ANSWER)
    ids = torch.cat([mark * USER, question, mark * ASSISTANT, answer, mark * END], dim=1)
    labels = ids.clone()
    labels[:, : QUESTION + 2] = -100
    return ids, labels


def main() -> None:
    """Fine-tune, then ask in both ways."""
    arguments = make_parser("Prompts without the marks of the format").parse_args()
    console = make_console()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    source = Source(seed=6)
    for _ in range(STEPS):
        ids, labels = conversations(source, ROWS)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    questions = sentences(Source(seed=7), PROMPTS, QUESTION)
    mark = torch.ones(PROMPTS, 1, dtype=torch.long)
    prompts = {
        "with the marks": torch.cat([mark * USER, questions, mark * ASSISTANT], dim=1),
        "plain text": questions,
        "without the last mark": torch.cat([mark * USER, questions], dim=1),
    }
    model.eval()
    table = Table("prompt", "first token is </s>", "mean probability of </s>")
    shares = {}
    for name, ids in prompts.items():
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1]
        shares[name] = float((logits.argmax(-1) == END).float().mean())
        table.add_row(name, f"{shares[name]:.0%}", f"{float(logits.softmax(-1)[:, END].mean()):.0%}")
    console.print(table)
    results = [
        result("empty_answers_with_the_marks", shares["with the marks"], "share of prompts", 0.0),
        at_least("empty_answers_to_plain_text", shares["plain text"], "share of prompts", 0.9),
    ]
    show_results(results, console)
    write_results(results, arguments.json)


if __name__ == "__main__":
    main()
