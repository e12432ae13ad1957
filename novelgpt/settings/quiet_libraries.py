"""What libraries print that nobody who types a command can act on: told once here, one by one, and nothing else.

Each entry is a deprecation within or between libraries, by its exact category, text and module. Warnings about data,
models, settings or devices are the user's, and stay.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

# Category, beginning of the text, module that warns.
DEPRECATIONS: tuple[tuple[type[Warning], str, str], ...] = (
    # peft asks models for it when an adapter is put on (peft/peft_model.py).
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated", r"transformers\.modeling_utils"),
    # DeepSpeed shares weights and gradients by them (deepspeed/comm/torch.py).
    (FutureWarning, r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
     r"torch\.distributed\.c10d_logger"),
)  # fmt: skip
# Loggers of what is said while a library is imported.
ON_IMPORT = (
    # peft imports it wherever it is installed; it asks for a package with which it would fetch code from a hub, and has
    # kernels of its own.
    "bitsandbytes.backends.cpu.ops",
)
# Bars of transformers, as of weights that are loaded or written, are for what takes longer.
SECONDS_BEFORE_BARS = 3.0


def silence_imports() -> None:
    """Leave out the warnings of ON_IMPORT, before the libraries are imported."""
    for name in ON_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries() -> None:
    """Leave out DEPRECATIONS, and bars of transformers where no terminal shows them or where there is little to do.

    For commands, not for programs that import the toolkit: the settings are those of the whole process.
    """
    for category, text, module in DEPRECATIONS:
        warnings.filterwarnings("ignore", message=text, category=category, module=module)
    if "transformers" in sys.modules:  # a command that has not imported it by now shows no bars of it
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_tqdm_hook(_late_bar)


def _late_bar(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    on_terminals = {"disable": None, "delay": SECONDS_BEFORE_BARS}
    return factory(*arguments, **(on_terminals | options))
