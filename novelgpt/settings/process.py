"""Which of several processes this is; one process where no launcher says otherwise."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"
