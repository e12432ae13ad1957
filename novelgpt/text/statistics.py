"""Token counts of the data, and rows printed with their trained tokens in colour."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy
from rich.table import Table
from rich.text import Text
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from novelgpt.settings.console import VisibleConsole, make_console, number_table
from novelgpt.settings.mix import format_weight
from novelgpt.settings.terminal import one_line, visible
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.origins import TracedRows
from novelgpt.text.token_bytes import BROKEN, CONTINUATIONS, token_bytes

# So many tokens complete any character that has started, with a margin.
LOOKAHEAD = 16
# Rows whose labels are looked at together.
ROWS_AT_ONCE = 256


@dataclass
class TokenCounts:
    """Counts of one data set. tokens_in == trained + context + dropped.

    Attributes:
        rows: rows (conversations or blocks) that training sees.
        tokens_in: tokens of the source text, including those of the template and end tokens.
        trained: tokens with a label.
        context: tokens that are read and not trained: prompts, and the first token of each document.
        dropped: tokens that training never sees, those that pseudo-repetitions replace among them.
        lengths: [rows] int64, tokens per row. Counts are equal whatever these are.
        notes: number of rows affected, by description.
    """

    rows: int = 0
    tokens_in: int = 0
    trained: int = 0
    context: int = 0
    dropped: int = 0
    lengths: numpy.ndarray = field(default_factory=lambda: numpy.zeros(0, numpy.int64), compare=False)
    notes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Counts of the rows of both."""
        return TokenCounts(
            self.rows + other.rows,
            self.tokens_in + other.tokens_in,
            self.trained + other.trained,
            self.context + other.context,
            self.dropped + other.dropped,
            numpy.concatenate([self.lengths, other.lengths]),
            self.notes + other.notes,
        )


class SourceCounts(NamedTuple):
    """Training rows of one source.

    Attributes:
        name: of the source.
        rows: that training sees.
        tokens: of these rows.
        trained: tokens with a label.
        passes: over the source, in an epoch.
    """

    name: str
    rows: int
    tokens: int
    trained: int
    passes: Fraction


def show_counts(counts: dict[str, TokenCounts], console: VisibleConsole | None = None, title: str = "Data") -> None:
    """Print the table of counts, one column per data set."""
    console = console or make_console()
    table = Table("", title=title, title_justify="left")
    for name in counts:
        table.add_column(name, justify="right")
    columns = list(counts.values())
    table.add_row("rows", *(f"{c.rows:,}" for c in columns))
    table.add_row("tokens in", *(f"{c.tokens_in:,}" for c in columns))
    for label, values in (
        ("tokens trained", [c.trained for c in columns]),
        ("tokens of context", [c.context for c in columns]),
        ("tokens dropped", [c.dropped for c in columns]),
    ):
        shares = (f"{value:,} ({value / max(1, c.tokens_in):.1%})" for value, c in zip(values, columns, strict=True))
        table.add_row(label, *shares)
    table.add_row("tokens per row: p10 / median / p90 / max", *(
        " / ".join(f"{q:.0f}" for q in numpy.quantile(c.lengths, (0.1, 0.5, 0.9, 1.0))) if len(c.lengths) else "-"
        for c in columns
    ))  # fmt: skip
    console.print(table)
    for name, count in counts.items():
        for note, number in count.notes.items():
            console.print(one_line(f"{name}: {number:,} {note}"), style="yellow")


def show_sources(counts: Sequence[SourceCounts], epochs: float, console: VisibleConsole | None = None) -> None:
    """Print a table of the training rows by source.

    Args:
        counts: of each source.
        epochs: of the run.
        console: that prints.
    """
    passes = ("passes per epoch", "passes of the run")
    table = number_table(
        "Training data by source", "source", "rows", "tokens", "tokens trained", *passes, "share of the tokens"
    )
    read = float(sum(count.tokens * count.passes for count in counts))
    for count in counts:
        table.add_row(
            count.name, f"{count.rows:,}", f"{count.tokens:,}", f"{count.trained:,}",
            format_weight(count.passes), f"{float(count.passes) * epochs:.2f}",
            f"{float(count.tokens * count.passes) / max(1.0, read):.1%}",
        )  # fmt: skip
    (console or make_console()).print(table)


def show_first_row(rows: TracedRows, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 400) -> None:
    """Print the first row, trained tokens green behind a weight other than 1, the others dim."""
    columns = {name: values.tolist() for name, values in rows[0].items()}
    input_ids, labels, loss_weights = columns["input_ids"], columns["labels"], columns.get("loss_weights")
    console = make_console()
    text = Text()
    weight = 0.0
    for span in row_spans(input_ids, labels, tokenizer, loss_weights, max_tokens):
        if span.weight not in (weight, 0, 1):
            text.append(f"×{span.weight:g}", style="yellow")
        weight = span.weight
        text.append(visible(span.text), style="green" if span.trained else "dim")
    if len(input_ids) > max_tokens:
        text.append(f" … ({len(input_ids) - max_tokens:,} more tokens)", style="dim italic")
    console.print(Text.assemble("One row (", ("trained", "green"), ", ", ("context", "dim"), "):"))
    console.print(text)
    console.print()


class TokenSpan(NamedTuple):
    """Neighbouring tokens of a row that are alike.

    text: their text; trained: whether they have labels; special: whether they are special tokens; weight: that of their
    loss, 0 without labels; begin: index of the first of them.
    """

    text: str
    trained: bool
    special: bool
    weight: float
    begin: int


def row_spans(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    loss_weights: Sequence[float] | None = None,
    max_tokens: int | None = None,
    by_token: bool = False,
) -> Iterator[TokenSpan]:
    """Decode a row in spans, cut where tokens start or cease to be trained or special, or to have one weight; at every
    token with `by_token`.

    The texts of the trained spans, joined, are the decoded labels. A character whose bytes lie in several tokens is in
    the span of the last of them, as a rule.
    """
    # Where the two differ, the label is what is learnt (see EncodedRow).
    shown = [token if label == IGNORE_INDEX else label for token, label in zip(input_ids, labels, strict=True)]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    weights = [float(label != IGNORE_INDEX) for label in labels] if loss_weights is None else loss_weights
    kinds = [
        (label != IGNORE_INDEX, token in special, weight)
        for token, label, weight in zip(shown, labels, weights, strict=True)
    ]
    count = len(shown) if max_tokens is None else min(max_tokens, len(shown))
    # Decodes from an earlier boundary, as a text may lose a space at its start; never from within a character.
    window, boundary, begin, decoded_before = 0, 0, 0, ""
    for end in range(1, count + 1):
        if end < count and not by_token and kinds[end] == kinds[begin]:
            continue
        stable = decoded = str(tokenizer.decode(shown[window:end]))
        if decoded.endswith(BROKEN):  # part of a character, or U+FFFD itself: the next tokens decide
            stable = os.path.commonprefix([decoded, str(tokenizer.decode(shown[window : end + LOOKAHEAD]))])
        yield TokenSpan(stable[len(decoded_before) :], *kinds[begin], begin)
        decoded_before = max(decoded_before, stable, key=len)
        if not decoded.endswith(BROKEN):
            window, boundary = boundary, end
            decoded_before = str(tokenizer.decode(shown[window:end]))
        begin = end


def row_lengths(rows: Dataset[Any]) -> numpy.ndarray:
    """[rows] int64, tokens of each row. Rows that do not know theirs are read, one by one."""
    if isinstance(rows, TracedRows):
        return rows.lengths.astype(numpy.int64, copy=False)
    if isinstance(rows, Subset):
        return row_lengths(rows.dataset)[numpy.asarray(rows.indices)]
    count = len(rows)  # type: ignore[arg-type]
    return numpy.fromiter((len(rows[index]["input_ids"]) for index in range(count)), numpy.int64, count)


def trained_runs(labels: Sequence[int] | numpy.ndarray) -> list[tuple[int, int]]:
    """Begin and end (exclusive) of each run of trained tokens, in order; each answer of a conversation is one.

    >>> trained_runs([-100, 5, 6, -100, 7])
    [(1, 3), (4, 5)]
    """
    trained = numpy.pad(numpy.asarray(labels) != IGNORE_INDEX, 1)
    boundaries = numpy.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(boundaries[::2], boundaries[1::2], strict=True))


def trained_characters(dataset: Dataset[Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of characters in the trained tokens of all rows; special tokens have none.

    A character whose bytes lie in several tokens counts where it starts, so that blocks cut anywhere from a text count
    each of its characters once. (Older SentencePiece tokenizers put a space before each text; it counts.)

    Args:
        dataset: rows with "labels", [tokens], as a list or on the CPU.
        tokenizer: that made the rows, byte-level or SentencePiece.
    """
    # Of UTF-8, all bytes but those that continue a character start one.
    started = numpy.array([len((data or b"").translate(None, CONTINUATIONS)) for data in token_bytes(tokenizer)])
    characters, rows = 0, len(dataset)  # type: ignore[arg-type]
    for begin in range(0, rows, ROWS_AT_ONCE):
        block = range(begin, min(rows, begin + ROWS_AT_ONCE))
        labels = numpy.concatenate([numpy.asarray(dataset[index]["labels"]) for index in block])
        characters += int(started[labels[labels != IGNORE_INDEX]].sum())
    return characters
