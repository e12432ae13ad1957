"""Describes a run and its data for run.json, and compares two descriptions before a run resumes from a checkpoint.

Data are identified by role, order, number and content, wherever they are. Files are hashed completely, again only
when the file system reports that they were written. Tokens, of which there may be hundreds of gigabytes, are identified
by the hashes in their manifest as long as nobody has written them since; otherwise they are hashed, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from novelgpt import __version__
from novelgpt.model.fingerprint import BASE_RECORD, check_base
from novelgpt.settings.atomic_files import hash_file, hash_json
from novelgpt.settings.errors import UserError
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.paths import IS_CHECKOUT, ROOT
from novelgpt.settings.run_record import DataFile, DataSource, utc_now
from novelgpt.settings.runs import TrainingRun
from novelgpt.text.data_names import Part, find_files, is_prepared, split_part
from novelgpt.text.dataset_info import Description, find_datasets
from novelgpt.text.hub_data import is_hub_name, read_hub_name, version_of
from novelgpt.text.token_files import MANIFEST, SHARDS, STARTS, TOKENS, read_token_manifest

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")
# The training arguments that determine the batches and what a step does with them. The others may change between
# starts: logging, evaluation, saving, places, the number of processes, and how memory is used.
DECISIVE = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha", "seed", "data_seed",
    "train_sampling_strategy", "dataloader_drop_last", "router_aux_loss_coef",
)  # fmt: skip
MAX_CHANGES = 4
SMALL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.json",
    "merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "qwen.tiktoken",
)  # fmt: skip
ROLES = ("train_files", "valid_files", "dataset", "eval_dataset", "instruction_templates")
# Of these, names in a dataset_info.json.
NAMES = ("dataset", "eval_dataset")
# Data arguments that say where the data are, which are compared by their content.
PLACES = {*ROLES, "dataset_dir"}
# Data arguments that run.json of earlier versions lacks, and what these did.
UNKNOWN_BEFORE: dict[str, Any] = {"mix": [], "streaming": False, "ditto": 0.0}
PREPARED = ("train-*", "held_out-*")
PREPARED_SUFFIXES = (".parquet", ".jsonl")
HASHING_THREADS = 8
_SOURCES = TypeAdapter(list[DataSource])


def describe_run(run: TrainingRun, data: list[DataSource]) -> dict[str, Any]:
    """Return the content of run.json for a run that starts.

    Args:
        run: with everything settled by then.
        data: what it trains and evaluates on, as it was before it was read.
    """
    arguments = {}
    for field in dataclasses.fields(run):
        group = vars(run)[field.name]
        values = group.to_dict() if field.name == "training" else dataclasses.asdict(group)
        # Keys for hubs and trackers do not belong in a file that people share.
        arguments[field.name] = {key: value for key, value in values.items() if not key.endswith("_token")}
    return {
        "pipeline": run.pipeline,
        "started": utc_now(),
        "model": run.model.model,
        "model_identity": _model_identity(run.model.model),
        "seed": run.training.seed,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "arguments": arguments,
        "data_sha256": {source.name: source.digest for source in data if source.role != "instruction_templates"},
        "versions": {"python": platform.python_version(), "novelgpt": __version__}
        | {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "data": [source.model_dump() for source in data],
    }


def check_same_run(folder: Path, before: dict[str, Any], now: dict[str, Any], checkpoint: Path | None) -> None:
    """Make sure that a folder holds the run that is about to start.

    Raises:
        UserError: names what has changed.
    """
    found = changes(before, now)
    if found:
        more = f", and {len(found) - MAX_CHANGES} more" if len(found) > MAX_CHANGES else ""
        raise UserError(
            f"{folder} holds an unfinished run with other settings: {', '.join(found[:MAX_CHANGES])}{more}",
            "use its settings to resume it, choose another --output_dir, or replace it: --overwrite_output_dir",
        )
    if checkpoint is not None and (checkpoint / BASE_RECORD).is_file():
        check_base(checkpoint, now["model"], "name the base that the run was started with")


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the differences between two descriptions that keep one run from resuming the other."""
    now = json.loads(json.dumps(now, default=str))  # as it would be read
    lacking = sorted(set(now) - {"model_identity", "data"} - set(before))
    if not lacking and "training" not in before["arguments"]:
        lacking = ["the training arguments"]
    if lacking:
        return [f"its run.json lacks {', '.join(lacking)}"]
    if before["pipeline"] != now["pipeline"]:
        return [f"the pipeline was {before['pipeline']}"]
    found = []
    identity = now["model_identity"]
    if "data" not in before:  # written by an earlier version, which recorded fewer files
        identity = {name: identity.get(name) for name in before.get("model_identity", {})}
    if before.get("model_identity", {}) != identity:
        found.append(f"the model ({before['model']}, now {now['model']}) or its files")
    if "data" in before and "data" in now:
        found += data_changes(before["data"], now["data"])
    else:
        found += _changed_hashes(before, now)
    old_rows, new_rows = _rows_per_step(before), _rows_per_step(now)
    if old_rows != new_rows:
        found.append(f"rows per step ({old_rows}, now {new_rows})")
    for group, values in now["arguments"].items():
        if group == "model":
            continue
        old = (UNKNOWN_BEFORE if group == "data" else {}) | before["arguments"].get(group, {})
        names = [name for name in values if name in DECISIVE] if group == "training" else sorted(set(values) - PLACES)
        found += [
            f"{name} ({old[name]}, now {values[name]})"
            for name in names
            if name in old and _comparable(name, old[name]) != _comparable(name, values[name])
        ]
    return found


def _comparable(name: str, value: Any) -> Any:
    """The value of an argument, wherever the files lie that it names."""
    if name != "mix":
        return value
    pairs = [word.rpartition("=") for word in value]
    return [(Path(source).name, weight) for source, _, weight in pairs]


def _changed_hashes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare data by `data_sha256` alone, which is all that earlier versions recorded.

    Role, order and number are compared as far as these show.
    """
    old, new = before["data_sha256"], now["data_sha256"]
    if list(old.values()) != list(new.values()):
        names = [Path(name).name for name, digest in new.items() if digest not in old.values()]
        return [f"the content of {', '.join(names)}" if names else "the data files"]
    files, now_files = (
        [[hashes.get(name) for name in record["arguments"].get("data", {}).get(role, [])] for role in ROLES[:2]]
        for hashes, record in ((old, before), (new, now))
    )
    known = None not in (digest for role in (*files, *now_files) for digest in role)
    return ["the order, number or role of the data files"] if known and files != now_files else []


def _rows_per_step(record: dict[str, Any]) -> int:
    training = record["arguments"]["training"]
    return int(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * record["processes"])


def _model_identity(model: str) -> dict[str, Any]:
    """Identify a base without reading its weights: hashes of its small files, sizes of the large ones."""
    folder = Path(model)
    if not folder.is_dir():
        return {"name": model}
    small = {name: folder / name for name in SMALL_FILES if (folder / name).is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in small.items()}
    return hashes | {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _git_commit() -> str | None:
    """Return the commit of the checkout; None for an installed wheel, which may be in somebody else's repository."""
    if not IS_CHECKOUT:
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def identify_data(run: TrainingRun) -> list[DataSource]:
    """Hash the files and folders that a run reads, in its order.

    Raises:
        UserError: a file cannot be read.
    """
    identify = functools.cache(_identify)  # each file is hashed once, however often it is named
    found = []
    for role in ROLES:
        names = vars(run.data).get(role, [])  # raw text has no templates
        if role in NAMES:
            described = find_datasets(names, vars(run.data).get("dataset_dir", ""))
            sources = [_identify_described(one, identify(one.place)) for one in described]
        else:
            sources = [identify(name) for name in names]
        found += [source.model_copy(update={"role": role}) for source in sources]
    return found


def _identify_described(described: Description, source: DataSource) -> DataSource:
    """Identify a data set of a dataset_info.json by its files and what is said of them."""
    said = described.model_dump(exclude={"name", "info", "file_name"})
    description = DataFile(name="dataset_info.json", bytes=0, sha256=hash_json(said))
    return source.model_copy(update={"name": described.name, "files": [*source.files, description]})


def check_unwritten(sources: Iterable[DataSource]) -> None:
    """Make sure, once they are read, that files and folders are still as they were when they were hashed.

    Raises:
        UserError: names the first one that changed.
    """
    for source in sources:
        now = _state_of(Path(source.path))
        changed = sorted(path for path in now.keys() | source.seen.keys() if now.get(path) != source.seen.get(path))
        if changed:
            raise UserError(
                f"{changed[0]} was written while this run read it, so that it may have read some of both versions",
                "start again once nothing writes there",
            )


def data_changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """Describe what differs between the data of two runs.

    Args:
        before: the `data` of a run.json.
        now: that of this process, whose files can be read.
    """
    old, new = _SOURCES.validate_python(before), _SOURCES.validate_python(now)
    found = []
    for role in ROLES:
        olds = [source for source in old if source.role == role]
        news = [source for source in new if source.role == role]
        changed = [_difference(one, other) for one, other in zip(olds, news, strict=False)]
        if len(olds) == len(news) and not any(changed):
            continue
        # A file with unchanged content at another position is not a changed file.
        unknown = [source for source in news if all(_difference(one, source) for one in old)]
        if not unknown:
            found.append(f"the files of --{role}, their order or how often each is named")
        elif len(olds) == len(news):
            found += [f"the content of {change}" for change in changed if change]
        else:
            found.append(f"the content of --{role}: {', '.join(Path(source.name).name for source in unknown)}")
    return found


def _identify(name: str) -> DataSource:
    """Hash a file or folder, whose role is left open."""
    place, part = split_part(name)
    if is_hub_name(place):
        data = read_hub_name(place)
        files = [DataFile(name=str(data), bytes=0, sha256=version_of(data)), *_part_file(part)]
        return DataSource(role="", path=name, name=name, files=files)
    path = Path(name).absolute()
    source = DataSource(role="", path=str(path), name=name, files=[])
    try:
        in_folder = path.is_dir()
        if path.exists() and not in_folder and not path.is_file():
            raise UserError(f"{name} is not a regular file", "write its rows to a file, and name that")
        source.seen = _state_of(path)
        if (path / MANIFEST).is_file():
            source.manifest_sha256 = hash_file(path / MANIFEST)[0]
        tokens = None
        with contextlib.suppress(UserError):  # reported where the tokens are opened
            tokens = read_token_manifest(path)
        if tokens is not None:
            source.files = _token_files(path, tokens)
        else:
            read = _read_files(path)
            with ThreadPoolExecutor(HASHING_THREADS) as pool:
                names = [file.name if in_folder else file.suffix.lower() for file in read]
                source.files = list(pool.map(_hash, read, names))
            source.files += _part_file(part)
    except OSError as error:
        raise UserError(
            f"{error.filename or name} cannot be read: {error.strerror}", "name files you can read"
        ) from error
    return source


def _part_file(part: Part | None) -> list[DataFile]:
    """What stands for the part of a source's rows among its files."""
    return [] if part is None else [DataFile(name=f"#{part.text}", bytes=0, sha256="")]


def _read_files(path: Path) -> list[Path]:
    """The files that a run reads of a file, a folder or a pattern; none where it is refused when it is read."""
    prepared = sorted(file for pattern in PREPARED for file in path.glob(pattern)) if path.is_dir() else []
    shards = [file for file in prepared if file.suffix in PREPARED_SUFFIXES]
    if shards and is_prepared(str(path)):
        return shards
    try:
        return list(map(Path, find_files(split_part(str(path))[0])))
    except UserError:
        return []


def _state_of(path: Path) -> dict[str, list[int]]:
    """Return [inode, size, mtime], which change with each write, of the files that are read and a folder's manifest."""
    files = [*_read_files(path), *([path / MANIFEST, *path.glob(f"{SHARDS}/*/*")] if path.is_dir() else [])]
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found[str(file)] = [status.st_ino, status.st_size, status.st_mtime_ns]
    return found


def _hash(path: Path, name: str) -> DataFile:
    sha256, size = content_hash(path)
    return DataFile(name=name, bytes=size, sha256=sha256)


def _token_files(folder: Path, manifest: dict[str, Any]) -> list[DataFile]:
    files = []
    for split, content in manifest["splits"].items():
        for shard in content["shards"]:
            for name in (TOKENS, STARTS):
                path = folder / SHARDS / shard["name"] / name
                if not path.is_file():
                    continue  # reported where the tokens are opened
                status = path.stat()
                files.append(DataFile(
                    name=str(path.relative_to(folder)), bytes=status.st_size,
                    sha256=shard.get("sha256", {}).get(name) or content_hash(path)[0],
                    split=split, written=[status.st_ino, status.st_mtime_ns, status.st_ctime_ns],
                ))  # fmt: skip
    return files


def _difference(old: DataSource, new: DataSource) -> str:
    """Name the first file of a source whose content is not the old one's, or the source itself; "" where none is."""
    name = Path(new.name).name
    in_folder = new.manifest_sha256 or Path(new.path).is_dir()
    for one, other in zip(old.files, new.files, strict=False):
        same = (one.name, one.bytes, one.split, one.sha256) == (other.name, other.bytes, other.split, other.sha256)
        if same and one.written != other.written:  # the manifest's hash may be outdated
            same = _hash_again(Path(new.path) / other.name, tuple(other.written)) == one.sha256
        if not same:
            return f"{name}/{other.name}" if in_folder else name
    return "" if len(old.files) == len(new.files) else name


@functools.cache
def _hash_again(path: Path, _: tuple[int, ...]) -> str:
    """Hash a file once for as long as it is not written."""
    return content_hash(path)[0]
