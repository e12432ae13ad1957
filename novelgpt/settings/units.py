"""Numbers in words."""

from __future__ import annotations

GIGABYTE = 10**9


def gigabytes(size: float) -> str:
    """Bytes in words; megabytes where there are few."""
    return f"{size / GIGABYTE:.2f} GB" if size >= GIGABYTE / 10 else f"{size / 10**6:.1f} MB"
