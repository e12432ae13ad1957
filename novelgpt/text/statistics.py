"""What became of the text: counts of rows and tokens, and one row with its trained tokens coloured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from novelgpt.text.conversation import IGNORED


@dataclass
class TokenCounts:
    """Counts of one data set. tokens_in == trained + context + dropped.

    Attributes:
        rows: rows (conversations or blocks) that training sees.
        tokens_in: tokens of the source text, markers of the template and end tokens included.
        trained: tokens with a label.
        context: tokens that are read and not trained: prompts, and the first token of each document.
        dropped: tokens that training never sees.
        lengths: tokens of each row.
        notes: what happened to rows, by description.
    """

    rows: int = 0
    tokens_in: int = 0
    trained: int = 0
    context: int = 0
    dropped: int = 0
    lengths: list[int] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def show_counts(counts: dict[str, TokenCounts], console: Console | None = None) -> None:
    """Print the table of counts, a column a data set."""
    console = console or Console()
    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for name in counts:
        table.add_column(name, justify="right")
    columns = list(counts.values())
    for label, values in (
        ("rows", [c.rows for c in columns]),
        ("tokens in", [c.tokens_in for c in columns]),
        ("tokens trained", [c.trained for c in columns]),
        ("tokens of context", [c.context for c in columns]),
        ("tokens dropped", [c.dropped for c in columns]),
    ):
        share = label.startswith("tokens ") and label != "tokens in"
        table.add_row(label, *(
            f"{value:,}" + (f" ({value / max(1, c.tokens_in):.1%})" if share else "")
            for value, c in zip(values, columns, strict=True)
        ))  # fmt: skip
    quantiles = [
        " / ".join(f"{q:.0f}" for q in numpy.quantile(c.lengths, (0.1, 0.5, 0.9, 1.0))) if c.lengths else "-"
        for c in columns
    ]
    table.add_row("tokens a row: 10 % / half / 90 % / most", *quantiles)
    console.print(table)
    for name, count in counts.items():
        for note, number in count.notes.items():
            console.print(f"[yellow]{name}: {number:,} {escape(note)}[/yellow]")


def show_row(
    input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, most_tokens: int = 400,
    console: Console | None = None,
) -> None:  # fmt: skip
    """Print one row, trained tokens green, the others dim."""
    console = console or Console()
    text = Text()
    shown = ""
    for index in range(min(most_tokens, len(input_ids))):
        trained = labels[index] != IGNORED
        last = index + 1 == min(most_tokens, len(input_ids))
        if last or (labels[index + 1] != IGNORED) != trained:
            # From the start each time: a character's bytes may lie in several tokens, on both sides of a border.
            decoded = str(tokenizer.decode(input_ids[: index + 1])).rstrip("\ufffd")
            text.append(decoded[len(shown) :], style="green" if trained else "dim")
            shown = decoded
    if len(input_ids) > most_tokens:
        text.append(f" … ({len(input_ids) - most_tokens:,} more tokens)", style="dim italic")
    console.print("One row ([green]trained[/green], [dim]context[/dim]):")
    console.print(text)
    console.print()
