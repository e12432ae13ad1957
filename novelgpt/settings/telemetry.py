"""What the libraries below would report home of their own accord is off, unless the user has decided otherwise."""

from __future__ import annotations

from collections.abc import MutableMapping

# Any of the two, and one of huggingface_hub's own, decides for several libraries at once.
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


def switch_off(environment: MutableMapping[str, str]) -> None:
    """Set what is not set yet. To be called before any of the libraries is imported, as they look once."""
    if not DECIDED_BY & environment.keys():
        environment.update(SHARED)
    for name, value in SINGLE.items():
        environment.setdefault(name, value)
