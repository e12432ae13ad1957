"""What became of the text: counts of rows and tokens, and one row with its trained tokens coloured."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
from rich.table import Table
from rich.text import Text
from tokenizers import pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from novelgpt.settings.console import VisibleConsole, make_console
from novelgpt.settings.terminal import one_line, visible
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.encoding import encode

# How a decoder shows bytes that are no whole character.
BROKEN = "\ufffd"
# Tokens in which any character that has begun is complete, and some more.
LOOKED_AHEAD = 16
# How a token of one byte is written by tokenizers whose other tokens are text.
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


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


def show_counts(counts: dict[str, TokenCounts], console: VisibleConsole | None = None) -> None:
    """Print the table of counts, a column a data set."""
    console = console or make_console()
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
            console.print(one_line(f"{name}: {number:,} {note}"), style="yellow")


def show_row(
    input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, most_tokens: int = 400,
    console: VisibleConsole | None = None,
) -> None:  # fmt: skip
    """Print one row, trained tokens green, the others dim."""
    console = console or make_console()
    text = Text()
    for span in row_spans(input_ids, labels, tokenizer, most_tokens):
        text.append(visible(span.text), style="green" if span.trained else "dim")
    if len(input_ids) > most_tokens:
        text.append(f" … ({len(input_ids) - most_tokens:,} more tokens)", style="dim italic")
    console.print(Text.assemble("One row (", ("trained", "green"), ", ", ("context", "dim"), "):"))
    console.print(text)
    console.print()


class Span(NamedTuple):
    """Neighbouring tokens of a row that are alike.

    text: what they say; trained: whether they have labels; special: whether they are marks of the template;
    begin: the first of them.
    """

    text: str
    trained: bool
    special: bool
    begin: int


def row_spans(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int | None = None,
    by_token: bool = False,
) -> Iterator[Span]:
    """A row in text, cut where tokens begin or cease to be trained or special; at every token with `by_token`.

    The texts of the trained spans, joined, are the decoded labels. A character whose bytes lie in several tokens is in
    the span of the last of them, as a rule.
    """
    # Where the two differ, the label is what is learnt (see EncodedRow).
    told = [token if label == IGNORE_INDEX else label for token, label in zip(input_ids, labels, strict=True)]
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [(label != IGNORE_INDEX, token in marks) for token, label in zip(told, labels, strict=True)]
    count = len(told) if most_tokens is None else min(most_tokens, len(told))
    # Decoded from a border before, as a text may lose a blank at its beginning; never from within a character.
    window, border, begin, shown = 0, 0, 0, ""
    for end in range(1, count + 1):
        if end < count and not by_token and kinds[end] == kinds[begin]:
            continue
        stable = decoded = str(tokenizer.decode(told[window:end]))
        if decoded.endswith(BROKEN):  # a part of a character, or this very one: what follows tells
            stable = os.path.commonprefix([decoded, str(tokenizer.decode(told[window : end + LOOKED_AHEAD]))])
        yield Span(stable[len(shown) :], *kinds[begin], begin)
        shown = max(shown, stable, key=len)
        if not decoded.endswith(BROKEN):
            window, border = border, end
            shown = str(tokenizer.decode(told[window:end]))
        begin = end


def trained_runs(labels: Sequence[int] | numpy.ndarray) -> list[tuple[int, int]]:
    """Begin and end (exclusive) of each run of trained tokens, in order; each answer of a conversation is one.

    >>> trained_runs([-100, 5, 6, -100, 7])
    [(1, 3), (4, 5)]
    """
    trained = numpy.pad(numpy.asarray(labels) != IGNORE_INDEX, 1)
    borders = numpy.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))


def trained_characters(dataset: Dataset[Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many characters the trained tokens of all rows stand for; special tokens stand for none.

    A character whose bytes lie in several tokens counts where it begins, so that blocks cut anywhere from a text count
    each of its characters once. (Older SentencePiece tokenizers put a blank before each text; it counts.)

    Args:
        dataset: rows with "labels", [tokens], as a list or on the CPU.
        tokenizer: what made the rows, byte-level or SentencePiece.
    """
    begun = _characters_begun(tokenizer)
    characters = 0
    for index in range(len(dataset)):  # type: ignore[arg-type]
        labels = numpy.asarray(dataset[index]["labels"])
        characters += int(begun[labels[labels != IGNORE_INDEX]].sum())
    return characters


def _characters_begun(tokenizer: PreTrainedTokenizerBase) -> numpy.ndarray:
    """[vocabulary] int64: how many characters begin in each token."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    byte_letters = _byte_letters()
    probe = "字é"
    byte_level = "".join(tokenizer.convert_ids_to_tokens(encode(probe, tokenizer))) == "".join(
        byte_letters[byte] for byte in probe.encode()
    )
    first_letters = {letter for byte, letter in enumerate(byte_letters) if _begins(byte)}
    begun = numpy.zeros(max(vocabulary.values()) + 1, dtype=numpy.int64)
    for token, number in vocabulary.items():
        if number in added:
            begun[number] = 0 if added[number].special else len(added[number].content)
        elif byte_level:
            begun[number] = sum(letter in first_letters for letter in token)
        else:
            byte_token = BYTE_TOKEN.fullmatch(token)
            begun[number] = _begins(int(byte_token[1], 16)) if byte_token else len(token)
    return begun


def _byte_letters() -> list[str]:
    """How byte-level tokenizers write each byte (GPT-2's way): as itself where printable, else as the next letter."""
    printable = pre_tokenizers.ByteLevel.alphabet()
    others = itertools.count(256)
    return [chr(byte) if chr(byte) in printable else chr(next(others)) for byte in range(256)]


def _begins(byte: int) -> bool:
    """Whether a byte of UTF-8 is the first of a character."""
    return byte & 0b1100_0000 != 0b1000_0000
