"""Where a model's files lie, and whether code that lies with them may run."""

from __future__ import annotations

import functools
import getpass
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from novelgpt.model.cached import check_hub
from novelgpt.model.embedded_base import ensure_embedded_base
from novelgpt.model.folder_checks import check_model_folder
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.paths import EMBEDDED_BASE, TINY
from novelgpt.settings.remedies import pip_install

# What a checkpoint consists of; weights are safetensors, or pickles where there are none and they are allowed.
DESCRIPTIONS = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
CONFIGURATIONS = ("config.json", "adapter_config.json")
SAFETENSORS, PICKLES, CODE = ["*.safetensors"], ["pytorch_model*.bin"], ["*.py"]


def locate(model: ModelArguments) -> str:
    """The model's folder as an absolute path, or its name on the Hugging Face hub, as from_pretrained takes them.

    Checkpoints and adapters note where their base lies, hence absolute. With `--hub modelscope`, a name is downloaded.

    Raises:
        UserError: the folder does not exist or is empty, or nothing can be downloaded.
    """
    if not model.model.strip():
        raise UserError("--model names nothing", "name a folder with config.json, weights and tokenizer, or a hub name")
    folder = Path(model.model)
    if folder == EMBEDDED_BASE:
        ensure_embedded_base()
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
    """The model's own folder, for what is to be written beside it.

    Args:
        model: a folder, or a name that none can be known of.
        option: that names a folder for models of a hub, for the error.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """
    if looks_like_path(model.model):
        return Path(locate(model))
    if Path(model.model).parent != Path() and Path(model.model).parent.is_dir():
        raise _missing(model.model)
    raise UserError(
        f"{model.model} is no folder that results could be written into",
        f"where it is a hub's name, name {option} as well; where it is a folder, check its path",
    )


def _missing(model: str) -> UserError:
    return UserError(
        f"model folder {model} does not exist",
        f"check the path; `{TINY}` is the name of the small base, which needs no file",
    )


def _refuse_unfinished_run(folder: Path) -> None:
    """Final weights come last: without them, a run folder is no model yet.

    Raises:
        UserError: names the checkpoint to take meanwhile.
    """
    if not (folder / "run.json").is_file() or any((folder / name).is_file() for name in CONFIGURATIONS):
        return
    numbers = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    steps = [int(number) for number in numbers if number.isdigit()]
    meanwhile = f", or name its newest checkpoint, {folder / f'checkpoint-{max(steps)}'}" if steps else ""
    raise UserError(
        f"the training run in {folder} has not finished: its final weights are not there",
        f"type its command again to go on with it{meanwhile}",
    )


def looks_like_path(model: str) -> bool:
    """Whether a model's name can only be a folder, as hub names have at most one slash and no leading dot."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists()


def runs_own_code(model: ModelArguments) -> bool:
    """Whether the checkpoint brings code that is needed to load it, and that `--trust_remote_code` allows to run.

    Code that is not needed, as the architecture is known to transformers or to this toolkit, never runs, whatever the
    flag says. This is what to pass on as `trust_remote_code`: given a plain yes or no, transformers asks nobody.

    Raises:
        UserError: it is needed and not allowed.
    """
    source = locate(model)
    wanted = _needed_code(source)
    if wanted is None:
        return False
    if not model.trust_remote_code:
        raise UserError(
            f"{model.model} cannot be loaded without running code that lies with it: {wanted}",
            f"read the .py files of {source}; if you trust them, add --trust_remote_code",
        )
    return True


def _needed_code(source: str) -> str | None:
    """The class that a checkpoint would run, with the reason; None where transformers and this toolkit will do."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:  # an adapter, or only a tokenizer; loading tells what is missing where it is missing
        config = {}
    if not isinstance(config, dict):  # whatever transformers says of it
        raise UserError(f"{source}: its config.json holds no settings by name", "fetch the file again")
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
    known_tokenizer = known is not None and known in TOKENIZER_MAPPING
    if classes and not known_tokenizer:
        name = tokenization.get("tokenizer_class")
        if name is None or tokenizer_class_from_name(name) is None:
            # The fast one where there are two, as transformers chooses.
            chosen = [reference for reference in reversed(classes) if reference][0]
            return f"{_class_in_file(chosen)}, as the tokenizer {name!r} is not known here"
    return None


def _class_in_file(reference: str) -> str:
    """`repository--file.Class`, where the first part may be missing, in words."""
    repository, _, rest = reference.rpartition("--")
    file, _, name = rest.rpartition(".")
    return f"{name} in {file}.py" + (f" of {repository}" if repository else "")


@functools.cache
def _download_from_modelscope(name: str, with_code: bool, with_pickles: bool) -> str:
    """The folder that holds a model of modelscope.cn: configuration, weights and tokenizer.

    Of several processes on a host, one downloads while the others wait, and then find the files there.
    """
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError("--hub modelscope needs the package modelscope", pip_install("modelscope")) from error
    patterns = DESCRIPTIONS + (CODE if with_code else [])
    lock = Path(tempfile.gettempdir()) / f"novelgpt-modelscope-{getpass.getuser()}.lock"
    try:
        with FileLock(lock):
            folder = Path(snapshot_download(name, allow_file_pattern=patterns + SAFETENSORS))
            if not any(folder.glob(SAFETENSORS[0])) and with_pickles:
                folder = Path(snapshot_download(name, allow_file_pattern=patterns + PICKLES))
    except Exception as error:  # of many kinds: the package's own, those of its HTTP client, those of the file system
        raise UserError(
            f"{name} cannot be downloaded from ModelScope: {reason_of(error)}",
            "check the name (OWNER/MODEL) and the connection, or download it yourself and name the folder",
        ) from error
    return str(folder.absolute())
