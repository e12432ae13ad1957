"""Names on the Hugging Face hub: what of them is on this host, and whether the hub can be reached for the rest."""

from __future__ import annotations

import functools
import os
import shlex

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import environment_program
from novelgpt.settings.terminal import say

# For one answer of the hub; the libraries below ask again and again, for minutes.
PATIENCE_SECONDS = 10


def cached_folder(name: str) -> str | None:
    """The folder of the hub's cache with what was downloaded of a model; None where nothing was. Asks no network."""
    try:
        return snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


@functools.cache
def check_hub(name: str) -> None:
    """Ask the hub once whether it has a model, so that a network that is not there is told at once.

    Where it cannot be reached and the cache holds the model, this process goes on without it.

    Raises:
        UserError: it cannot be reached, or has no such model, and the cache holds nothing of it.
    """
    if is_offline_mode():
        if cached_folder(name) is None:
            raise UserError(
                f"{name} is in no cache of this host, and HF_HUB_OFFLINE=1 keeps it from being downloaded",
                f"unset HF_HUB_OFFLINE, or fetch it where there is a network: {environment_program('hf')} download "
                f"{shlex.quote(name)}; a local folder needs no network",
            )
        return
    try:
        HfApi().model_info(name, timeout=PATIENCE_SECONDS)
    except HFValidationError as error:
        raise UserError(f"{name} is no folder here, and no hub's name", "check --model") from error
    except RepositoryNotFoundError as error:
        _refuse_unknown(name, error)
    except Exception as error:  # of the HTTP client, of the resolver, of a proxy, of an answer that is no JSON
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return  # a mirror that answers only requests for files
        _go_offline(name, error)


def _refuse_unknown(name: str, error: RepositoryNotFoundError) -> None:
    if cached_folder(name) is not None:
        return  # deleted, or renamed; what is here is still good
    gated = isinstance(error, GatedRepoError)
    what = "asks for consent before it hands out" if gated else "has no model that this user may see named"
    raise UserError(
        f"the hub at {constants.ENDPOINT} {what} {name}",
        "give it on the model's page, then HF_TOKEN"
        if gated
        else "check the name (OWNER/MODEL); private models need "
        "HF_TOKEN, those of ModelScope --hub modelscope, and folders a path that is there",
    ) from error


def _go_offline(name: str, error: Exception) -> None:
    """For the libraries below and the processes that are started from here, too."""
    if cached_folder(name) is None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the hub at {constants.ENDPOINT} cannot be reached to fetch {name}: {reason:.200}",
            "check the network and HTTPS_PROXY; elsewhere: a mirror by HF_ENDPOINT=https://…, --hub modelscope, or a "
            "local folder as --model",
        ) from error
    say(f"the hub at {constants.ENDPOINT} cannot be reached: {name} is read from this host's cache", style="yellow")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
