"""How many GPUs there are to use, without torch, whose import takes seconds."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping


def visible_gpus(environment: Mapping[str, str]) -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves in sight; all where it is not set.

    Args:
        environment: variables of the process that shall use them.
    """
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return 0
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        named = list(itertools.takewhile(_names_one, chosen.split(",")))
        return min(1, len(named)) if chosen.lstrip().startswith("MIG-") else len(named)  # of parts, CUDA has the first
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU") for line in listed.splitlines())


def _names_one(word: str) -> bool:
    """Whether CUDA takes a word for a device: a number or an identifier, not -1, which hides it and all that follow.

    Nor NoDevFiles, which schedulers write for none.
    """
    return re.match(r"\s*([0-9]|GPU-|MIG-)", word) is not None
