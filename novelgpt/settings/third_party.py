"""What libraries read or print by themselves, settled for all rooms: telemetry, variables and warnings.

Standard library only, as the first part is settled before anything else is imported.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, MutableMapping

from novelgpt.settings.hardware import threads_each

# Each of these switches off the telemetry of several libraries, unless the user has set one of DECIDED_BY.
SHARED = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
DECIDED_BY = {*SHARED, "DISABLE_TELEMETRY"}
SINGLE = {
    # transformers asks a service to convert pickled weights of the hub, in the background.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    # datasets counts uses of files that are there already.
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Variables of every training process.
ALWAYS = {
    "TOKENIZERS_PARALLELISM": "true",
    # glibc would hand the large blocks of each step back to the system and ask for them again.
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    # Lines appear as they are written, in files and pipes too.
    "PYTHONUNBUFFERED": "1",
}
# Warnings that no user can act on: deprecations within or between libraries, each by category, start of the text and
# module that warns. Warnings about data, models, settings or devices are the user's, and stay.
DEPRECATIONS: tuple[tuple[type[Warning], str, str], ...] = (
    # peft asks models for it when an adapter is put on (peft/peft_model.py).
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated", r"transformers\.modeling_utils"),
    # DeepSpeed shares weights and gradients by them (deepspeed/comm/torch.py).
    (FutureWarning, r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
     r"torch\.distributed\.c10d_logger"),
)  # fmt: skip
# The same, of a logger. transformers warns where a row ends in padding and no attention mask comes with it: packed rows
# say where their documents end instead, and padding is a document of its own.
LOGGED = {"transformers.modeling_utils": "We strongly recommend passing in an `attention_mask`"}
# Loggers that warn while a library is imported: peft imports bitsandbytes wherever it is installed, which asks for a
# package to fetch code from a hub with, and has kernels of its own.
ON_IMPORT = ("bitsandbytes.backends.cpu.ops",)
# Progress bars of transformers, as for loading or writing weights, are for what takes longer.
SECONDS_BEFORE_BARS = 3.0


def disable_telemetry(environment: MutableMapping[str, str]) -> None:
    """Switch off what libraries report home, unless the user has decided otherwise; before any of them is imported."""
    if not DECIDED_BY & environment.keys():
        environment.update(SHARED)
    for name, value in SINGLE.items():
        environment.setdefault(name, value)


def process_defaults(environment: Mapping[str, str], processes: int | None, gpus: int) -> dict[str, str]:
    """Variables that libraries read once, when a training process starts, without those that the user has set.

    Args:
        environment: the variables that are set.
        processes: that share the cores of this host; None where that is settled later, host by host.
        gpus: that this process may use.
    """
    wanted = dict(ALWAYS)
    if gpus == 0:
        wanted["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for others
    if processes is not None:
        wanted["OMP_NUM_THREADS"] = str(threads_each(processes))
    return {name: value for name, value in wanted.items() if not environment.get(name)}


def silence_imports() -> None:
    """Leave out the warnings of ON_IMPORT, before the libraries are imported."""
    for name in ON_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries() -> None:
    """Leave out DEPRECATIONS, LOGGED, and transformers' bars where no terminal shows them or there is little to do.

    For commands, not for programs that import the toolkit: the settings are those of the whole process.
    """
    for category, text, module in DEPRECATIONS:
        warnings.filterwarnings("ignore", message=text, category=category, module=module)
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_for_users)
    if "transformers" in sys.modules:  # a command that has not imported it by now shows no bars of it
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_tqdm_hook(
            lambda factory, args, options: factory(*args, **{"disable": None, "delay": SECONDS_BEFORE_BARS, **options})
        )


def _is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED[record.name])
