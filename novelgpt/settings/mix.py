"""Weights of training sources, as `--mix` gives them: NAME=WEIGHT words, or a YAML file of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_yaml

MOST = 1000
LINES = "write a line `name: weight` for each source"


def parse_mix(words: Sequence[str]) -> dict[str, Fraction]:
    """The weight of each source that is named: passes over it in an epoch, as exact as it is written.

    Args:
        words: NAME=WEIGHT, or YAML files of `name: weight` lines.

    Raises:
        UserError: a weight is no number from 0 to 1,000, or a source is named twice.
    """
    weights: dict[str, Fraction] = {}
    for name, weight, where in _pairs(words):
        exponent = weight.strip().lower().partition("e")[2]
        try:
            # A long exponent would be written out, digit by digit.
            passes = Fraction(weight.strip() if len(exponent) <= len("-99") else "nan")
        except (ValueError, ZeroDivisionError):
            passes = Fraction(-1)
        if not 0 <= passes <= MOST:
            raise UserError(f"{where}: the weight {weight!r} of {name} is not a number from 0 to {MOST:,}",
                            "write the passes over the source in an epoch, such as 2 or 0.3")  # fmt: skip
        if name in weights:
            raise UserError(f"{where} names {name} twice", "leave one of them out")
        weights[name] = passes
    return weights


def format_weight(weight: Fraction) -> str:
    """A weight as it is written: as a decimal number where that is exact.

    >>> format_weight(Fraction(3, 10)), format_weight(Fraction(1, 3))
    ('0.3', '1/3')
    """
    decimal = f"{float(weight):g}"
    return decimal if Fraction(decimal) == weight else str(weight)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, weight, where it is written) of each source."""
    for word in words:
        name, sign, weight = word.rpartition("=")
        if sign and name:
            yield name, weight, f"--mix {word}"
        elif Path(word).suffix.lower() in (".yaml", ".yml"):
            read: Any = read_yaml(Path(word), "name an existing file with --mix, or NAME=WEIGHT", LINES)
            if not isinstance(read, dict) or not read:
                raise UserError(f"{word} holds no `name: weight` lines", LINES)
            for key, value in read.items():
                yield str(key), str(value), word
        else:
            raise UserError(f"--mix {word} gives no weight", "write NAME=WEIGHT, such as novels.jsonl=2")
