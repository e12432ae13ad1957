"""Numbers in words."""

from __future__ import annotations

GIGABYTE = 10**9


def gigabytes(size: float) -> str:
    """Bytes in words; megabytes where there are few."""
    return f"{size / GIGABYTE:.2f} GB" if size >= GIGABYTE / 10 else f"{size / 10**6:.1f} MB"


def counted(number: int, noun: str) -> str:
    """A number and what it counts: 0 rows, 1 row, 2,000 rows.

    Args:
        number: of them.
        noun: for one of them, whose plural is regular (`file`, `train row`, `process`, `pair of books`).
    """
    counts, of, rest = noun.partition(" of ")
    ending = "" if number == 1 else "es" if counts.endswith("s") else "s"
    return f"{number:,} {counts}{ending}{of}{rest}"
