"""DeepSpeed is imported by the runs that train with it, and by no other."""

from __future__ import annotations

import sys

from accelerate.utils import other


def import_deepspeed_where_it_trains() -> None:
    """Let accelerate look for DeepSpeed's engine around a model only where DeepSpeed has been imported.

    It would import DeepSpeed at each save, wherever it is installed: seconds, lines of its own on the terminal, and on
    some machines a failure, for a wrapper that nothing but an imported DeepSpeed can have put there.
    """
    installed = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules and installed()
