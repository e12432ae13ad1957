"""Where names of models are looked up when the command line does not say: as other tools decide it, by a variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from novelgpt.settings.errors import UserError

# Read by LLaMA-Factory as well, whose users have it in their shells.
VARIABLE = "USE_MODELSCOPE_HUB"
_ON, _OFF = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off", "")


def default_hub(environment: Mapping[str, str] = os.environ) -> Literal["huggingface", "modelscope"]:
    """The hub that USE_MODELSCOPE_HUB chooses; Hugging Face's where it is not set.

    Args:
        environment: variables of the process.

    Raises:
        UserError: the variable says neither yes nor no.
    """
    value = environment.get(VARIABLE, "")
    if value.strip().lower() in _ON:
        return "modelscope"
    if value.strip().lower() not in _OFF:
        raise UserError(f"{VARIABLE}={value} is neither yes nor no", f"{VARIABLE}=1, or 0; or say it by --hub")
    return "huggingface"
