"""Data sets of the Hugging Face hub and of ModelScope: their names, and the version that a name stands for now.

    hf://OWNER/NAME   hf://OWNER/NAME:SUBSET   hf://OWNER/NAME:SUBSET:SPLIT@REVISION   ms://OWNER/NAME

Code of a data set never runs: `datasets` refuses scripts, and ModelScope's are not downloaded.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from novelgpt.settings.atomic_files import hash_json
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.locks import host_lock, locked
from novelgpt.settings.remedies import environment_program, pip_install
from novelgpt.settings.terminal import say

HUBS = ("hf", "ms")
TRAIN = "train"
# Timeout of one request to the hub; the libraries below retry for minutes.
HUB_SECONDS = 10
_NAME = re.compile(
    r"(hf|ms)://(?:datasets/(?=[^/]+/))?([\w.-]+(?:/[\w.-]+)?)(?::([^:@/#]*))?(?::([^:@/#]+))?(?:@([^@#\s]+))?"
)


@dataclass(frozen=True)
class HubData:
    """A data set of a hub.

    Attributes:
        hub: `hf` or `ms`.
        repository: OWNER/NAME.
        subset: its configuration; "" for the default one.
        split: of its rows.
        revision: branch, tag or commit; "" for the newest.
        folder: of its files; "" for all.
    """

    hub: Literal["hf", "ms"]
    repository: str
    subset: str
    split: str
    revision: str
    folder: str = ""

    def __str__(self) -> str:
        """The name, for errors."""
        parts = f"{self.hub}://{self.repository}"
        if self.subset or self.split != TRAIN:
            parts += f":{self.subset}" + (f":{self.split}" if self.split != TRAIN else "")
        return parts + (f"@{self.revision}" if self.revision else "")


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a data set on a hub."""
    return name.startswith(tuple(f"{hub}://" for hub in HUBS))


def read_hub_name(name: str, folder: str = "") -> HubData:
    """The data set of a name, without its part.

    Raises:
        UserError: it is not written as a hub's name is.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(
            f"{name} is not a name of a data set on a hub",
            "write hf://OWNER/NAME, with :SUBSET, :SUBSET:SPLIT and @REVISION behind it where they are needed",
        )
    hub, repository, subset, split, revision = found.groups(default="")
    return HubData(cast(Literal["hf", "ms"], hub), repository, subset, split or TRAIN, revision, folder)


@functools.cache
def find_commit(data: HubData) -> str:
    """The commit that a data set of the Hugging Face hub has now; of what is cached, where there is no network.

    Raises:
        UserError: there is no such data set, it asks for consent, it has only code, or it can be reached neither on the
            hub nor in the cache; after seconds, not minutes.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode  # not before: files need no hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if is_offline_mode():
        return _cached_commit(data, "HF_HUB_OFFLINE=1 keeps it from being downloaded")
    try:
        info = HfApi().dataset_info(data.repository, revision=data.revision or None, timeout=HUB_SECONDS)
    except HFValidationError as error:
        raise UserError(f"{data} is not a name of a data set on a hub", "write hf://OWNER/NAME") from error
    except GatedRepoError as error:
        raise UserError(
            f"the hub at {constants.ENDPOINT} asks for consent before it hands out {data}",
            "give it on the data set's page, then HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{data.hub}://{data.repository} has no revision {data.revision!r}",
            "take a branch, a tag or a commit of it",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub at {constants.ENDPOINT} has no data set that this user may see named {data.repository}",
            "check the name (OWNER/NAME); private ones need HF_TOKEN, those of ModelScope start with ms://",
        ) from error
    except Exception as error:  # of the HTTP client, the resolver, a proxy, or a reply that is not JSON
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise UserError(f"{data} cannot be read: {reason_of(error):.200}", "check the name and HF_TOKEN") from error
        commit = _cached_commit(data, f"the hub at {constants.ENDPOINT} cannot be reached: {reason_of(error):.200}")
        say(f"the hub at {constants.ENDPOINT} cannot be reached: {data} is read from this host's cache", style="yellow")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        return commit
    script = f"{data.repository.rpartition('/')[2]}.py"
    files = {file.rfilename for file in info.siblings or []}
    if script in files:
        raise UserError(
            f"{data} is made by code, {script}, which is not run here",
            f"take its rows as the hub has converted them: hf://{data.repository}@refs/convert/parquet; or write them "
            "to a file",
        )
    return str(info.sha)


def _cached_commit(data: HubData, why: str) -> str:
    """The commit of a data set that `datasets` has in its cache.

    Raises:
        UserError: there is none, or only one of another revision.
    """
    import datasets

    datasets.config.HF_HUB_OFFLINE = True  # it has a copy of the hub's own switch
    try:
        builder = datasets.load_dataset_builder(
            data.repository, data.subset or None, data_dir=data.folder or None
        )  # the newest in the cache
    except Exception as error:
        raise UserError(
            f"{data} is in no cache of this host, and {why}",
            "check the network, HTTPS_PROXY and HF_HUB_OFFLINE; elsewhere: a mirror by HF_ENDPOINT=https://…, or "
            f"{environment_program('hf')} download --repo-type dataset {shlex.quote(data.repository)} --local-dir "
            "FOLDER, and name the folder",
        ) from error
    commit = str(builder.hash)
    if data.revision not in ("", "main", commit):
        raise UserError(
            f"this host's cache has {data.hub}://{data.repository} as of {commit}, not {data.revision}, and {why}",
            f"name that one, …@{commit}, or fetch the other where there is a network",
        )
    return commit


@functools.cache
def fetch_from_modelscope(data: HubData) -> Path:
    """The folder with the files of a data set of ModelScope, none of them code.

    Of several processes on a host, one downloads while the others wait for its files.

    Raises:
        UserError: the package modelscope is missing, or the data set cannot be downloaded.
    """
    try:
        from modelscope import dataset_snapshot_download
    except ImportError as error:
        raise UserError(f"{data} needs the package modelscope", pip_install("modelscope")) from error
    try:
        with locked(host_lock("modelscope"), wait=True):
            folder = dataset_snapshot_download(
                data.repository, revision=data.revision or None, ignore_file_pattern=["*.py"]
            )
    except Exception as error:  # of the package, its HTTP client or the file system
        raise UserError(
            f"{data} cannot be downloaded from ModelScope: {reason_of(error):.200}",
            "check the name (OWNER/NAME) and the connection, or download it yourself and name the folder",
        ) from error
    return Path(folder).absolute()


@functools.cache
def version_of(data: HubData) -> str:
    """What tells the present rows of a data set from others of its name: the commit, or the hash of its files.

    Raises:
        UserError: what `find_commit` or `fetch_from_modelscope` raises.
    """
    if data.hub == "hf":
        return find_commit(data)
    folder = fetch_from_modelscope(data)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return hash_json([[str(path.relative_to(folder)), content_hash(path)[0]] for path in files])
