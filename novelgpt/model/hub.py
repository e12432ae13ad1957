"""Where the files of a model are: a folder, or the Hugging Face hub, ModelScope and their caches."""

from __future__ import annotations

import functools
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from novelgpt.model.folder_checks import ADAPTER_CONFIG, CONFIG, check_model_folder
from novelgpt.model.small_bases import ensure_small_base
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.locks import host_lock, locked
from novelgpt.settings.remedies import environment_program, pip_install
from novelgpt.settings.small_bases import TINY
from novelgpt.settings.terminal import say

# Timeout of one request to the hub; the libraries below retry for minutes.
HUB_SECONDS = 10
# Files of a checkpoint; weights are safetensors, or pickles if there are none and they are allowed.
DESCRIPTIONS = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
SAFETENSORS, PICKLES, CODE = ["*.safetensors"], ["pytorch_model*.bin"], ["*.py"]


def locate(model: ModelArguments) -> str:
    """The model's folder as an absolute path, or its name on the Hugging Face hub, as from_pretrained takes them.

    Checkpoints and adapters record the path of their base, hence absolute. With `--hub modelscope`, a name is
    downloaded.

    Raises:
        UserError: the folder does not exist or is empty, or nothing can be downloaded.
    """
    if not model.model.strip():
        raise UserError("--model names nothing", "name a folder with config.json, weights and tokenizer, or a hub name")
    folder = Path(model.model)
    ensure_small_base(model.model)
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise UserError(f"model folder {model.model} is empty", "name one with config.json, weights and tokenizer")
        _refuse_unfinished_run(folder)
        check_model_folder(folder)
        return str(folder.absolute())
    if looks_like_path(model.model):
        raise _missing(model.model)
    if model.hub == "modelscope":
        return _download_from_modelscope(model.model, model.trust_remote_code, model.allow_pickles)
    check_hub(model.model)
    return model.model


def folder_of(model: ModelArguments, option: str) -> Path:
    """The model's own folder, to write results into.

    Args:
        model: a folder; hub names have none.
        option: that names a folder for models of a hub, for the error.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    if looks_like_path(model.model):
        return Path(locate(model))
    if Path(model.model).parent != Path() and Path(model.model).parent.is_dir():
        raise _missing(model.model)
    raise UserError(
        f"{model.model} is not a folder that results could be written into",
        f"if it is a hub's name, name {option} as well; if it is a folder, check its path",
    )


def looks_like_path(model: str) -> bool:
    """Whether a model's name can only be a folder: hub names have at most one slash and no leading dot."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists()


def cached_folder(name: str) -> str | None:
    """The folder of a model in the hub's cache; None if it is not there. Uses no network."""
    try:
        return snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


@functools.cache
def check_hub(name: str) -> None:
    """Ask the hub once whether it has a model, so that a missing network is reported immediately.

    If it cannot be reached and the cache has the model, this process and its children work offline from then on.

    Raises:
        UserError: the hub cannot be reached, or has no such model, and neither does the cache.
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
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HFValidationError as error:
        raise UserError(f"{name} is not a folder here, and not a name on the hub", "check --model") from error
    except GatedRepoError as error:
        if cached_folder(name) is None:
            raise UserError(
                f"the hub at {constants.ENDPOINT} asks for consent before it hands out {name}",
                "give it on the model's page, then HF_TOKEN",
            ) from error
    except RepositoryNotFoundError as error:
        if cached_folder(name) is None:  # else it was deleted or renamed, and the copy is still good
            raise UserError(
                f"the hub at {constants.ENDPOINT} has no model that this user may see named {name}",
                "check the name (OWNER/MODEL); private models need HF_TOKEN, those of ModelScope --hub modelscope, and "
                "folders a path that is there",
            ) from error
    except Exception as error:  # of the HTTP client, the resolver, a proxy, or a reply that is not JSON
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return  # a mirror that only serves files
        if cached_folder(name) is None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the hub at {constants.ENDPOINT} cannot be reached to fetch {name}: {reason:.200}",
                "check the network and HTTPS_PROXY; elsewhere: a mirror by HF_ENDPOINT=https://…, --hub modelscope, or "
                "a local folder as --model",
            ) from error
        say(f"the hub at {constants.ENDPOINT} cannot be reached: {name} is read from this host's cache", style="yellow")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def runs_own_code(model: ModelArguments) -> bool:
    """Whether the checkpoint has code that is needed to load it, and that `--trust_remote_code` allows to run.

    Code of architectures that transformers or this toolkit know never runs, whatever the flag says. The result is to
    be passed to transformers as `trust_remote_code`, which then does not ask on standard input.

    Raises:
        UserError: code is needed and not allowed.
    """
    source = locate(model)
    wanted = _needed_code(source)
    if wanted is None:
        return False
    if not model.trust_remote_code:
        raise UserError(
            f"{model.model} cannot be loaded without running its own code: {wanted}",
            f"read the .py files of {source}; if you trust them, add --trust_remote_code",
        )
    return True


def _needed_code(source: str) -> str | None:
    """The class that a checkpoint needs from its own code, with the reason; None if it needs none."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:  # an adapter, or only a tokenizer; loading reports what is missing
        config = {}
    if not isinstance(config, dict):  # transformers may accept it
        raise UserError(f"{source}: its config.json is not a mapping", "fetch the file again")
    kind: Any = config.get("model_type")
    known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401  its `get` finds nothing
    if known is None or known not in MODEL_FOR_CAUSAL_LM_MAPPING:
        named = config.get("auto_map") or {}
        for role in ("AutoModelForCausalLM", "AutoModel", "AutoConfig"):
            if role in named:
                return f"{_class_in_file(named[role])}, as model_type {kind!r} is not known here"
    tokenization = get_tokenizer_config(source)
    named = tokenization.get("auto_map") or {}
    classes = named if isinstance(named, list) else named.get("AutoTokenizer")
    name = tokenization.get("tokenizer_class")
    if classes and not (known is not None and known in TOKENIZER_MAPPING):
        if name is not None and tokenizer_class_from_name(name) is not None:
            return None
        # The fast one if there are two, as transformers chooses.
        chosen = [reference for reference in reversed(classes) if reference][0]
        return f"{_class_in_file(chosen)}, as the tokenizer {name!r} is not known here"
    return None


def _class_in_file(reference: str) -> str:
    """Describe a reference `repository--file.Class`, whose first part is optional."""
    repository, _, rest = reference.rpartition("--")
    file, _, name = rest.rpartition(".")
    return f"{name} in {file}.py" + (f" of {repository}" if repository else "")


def _missing(model: str) -> UserError:
    return UserError(
        f"model folder {model} does not exist",
        f"check the path; `{TINY}` is the name of the small base, which needs no file",
    )


def _refuse_unfinished_run(folder: Path) -> None:
    """Final weights are written last: without them, a run folder is not a model yet; the error names a checkpoint."""
    if not (folder / "run.json").is_file() or any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return
    numbers = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    steps = [int(number) for number in numbers if number.isdigit()]
    meanwhile = f", or name its newest checkpoint, {folder / f'checkpoint-{max(steps)}'}" if steps else ""
    raise UserError(
        f"the training run in {folder} has not finished: its final weights are not there",
        f"run its command again to resume it{meanwhile}",
    )


@functools.cache
def _download_from_modelscope(name: str, with_code: bool, with_pickles: bool) -> str:
    """The folder with configuration, weights and tokenizer of a model of modelscope.cn.

    Of several processes on a host, one downloads while the others wait for its files.
    """
    try:
        from modelscope import snapshot_download as download
    except ImportError as error:
        raise UserError("--hub modelscope needs the package modelscope", pip_install("modelscope")) from error
    patterns = DESCRIPTIONS + (CODE if with_code else [])
    try:
        with locked(host_lock("modelscope"), wait=True):
            folder = Path(download(name, allow_file_pattern=patterns + SAFETENSORS))
            if not any(folder.glob(SAFETENSORS[0])) and with_pickles:
                folder = Path(download(name, allow_file_pattern=patterns + PICKLES))
    except Exception as error:  # of the package, its HTTP client or the file system
        raise UserError(
            f"{name} cannot be downloaded from ModelScope: {reason_of(error)}",
            "check the name (OWNER/MODEL) and the connection, or download it yourself and name the folder",
        ) from error
    return str(folder.absolute())
