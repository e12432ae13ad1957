"""Checks of the machine: port, disk, shared memory, open files, and the environment variables of the hub."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from novelgpt.checks.findings import Finding, first_case
from novelgpt.settings.paths import HUB_VARIABLE, default_hub, existing_folder
from novelgpt.settings.terminal import GIGABYTE, counted, gigabytes

DEFAULT_PORT = 29500
# What the small base with a checkpoint or two takes, and what most runs on useful models take.
MIN_FREE_BYTES, USUAL_FREE_BYTES = GIGABYTE // 2, 20 * GIGABYTE
MIN_SHARED_MEMORY = GIGABYTE
MIN_OPEN_FILES = 4096
TRUE_VALUES = {"1", "on", "yes", "true"}


def check_port() -> Iterator[Finding]:
    """Check that ranks can connect at MASTER_PORT, by default at the port that hostfiles use."""
    named = os.environ.get("MASTER_PORT")
    try:
        port = DEFAULT_PORT if named is None else int(named)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
        yield Finding("port", "ok", f"port {port} is free for processes to connect")
    except (ValueError, OverflowError):
        yield Finding(
            "port", "problem", f"MASTER_PORT={named} is not a port", "unset it, or set it to a number above 1024"
        )
    except OSError as error:
        text = f"port {port} cannot be used: {error.strerror}"
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("", 0))
            remedy = f"export MASTER_PORT={listener.getsockname()[1]}"
        if named is None:
            text += "; it is the default for several hosts"
            yield Finding("port", "note", text, f"with HOSTFILE, set another one on all hosts: {remedy}")
        else:
            yield Finding("port", "problem", text, remedy)


def check_disk_space(output: Path) -> Iterator[Finding]:
    """Check that the folder of runs is writable and has room."""
    folder = existing_folder(output)
    free = shutil.disk_usage(folder).free
    text = f"{gigabytes(free)} free for {output}"
    yield first_case(
        "disk",
        text,
        (
            not os.access(folder, os.W_OK),
            "problem",
            f"nothing can be written into {folder}",
            "name a folder you can write to: --output_dir FOLDER",
        ),
        (free < MIN_FREE_BYTES, "problem", text, "make room, or name a folder on another disk: --output_dir FOLDER"),
        (
            free < USUAL_FREE_BYTES,
            "note",
            text,
            "with --model, this command estimates its checkpoints; --save_total_limit 1 keeps fewer",
        ),
    )


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check the shared memory that data loaders and several GPUs of one host use."""
    if not folder.is_dir():
        yield Finding(
            "shared memory", "note", f"there is no {folder}", "mount one for several GPUs: mount -t tmpfs shm /dev/shm"
        )
        return
    usage = shutil.disk_usage(folder)
    text = f"{gigabytes(usage.free)} free of {gigabytes(usage.total)} in {folder}"
    remedy = "docker run --shm-size=8g …; elsewhere: mount -o remount,size=8G /dev/shm"
    low = usage.free < MIN_SHARED_MEMORY
    yield first_case("shared memory", text, (low, "note", f"{text}: several GPUs may not start", remedy))


def check_open_files() -> Iterator[Finding]:
    """Check the limit of open files."""
    try:
        import resource
    except ImportError:
        yield Finding("open files", "ok", "this system sets no limit")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"a process may hold {'any number of files' if soft < 0 else counted(soft, 'file')} open"
    yield first_case(
        "open files",
        text,
        (
            0 <= soft < MIN_OPEN_FILES,
            "note",
            f"{text}; large folders of shards and many workers may need more",
            f"ulimit -n {MIN_OPEN_FILES if hard < 0 else min(hard, 65536)}",
        ),
    )


def check_switches(environment: dict[str, str]) -> Iterator[Finding]:
    """Report what the environment sets for the model hub and for telemetry. Secrets are not shown."""

    def switched_on(*names: str) -> str:
        return ", ".join(name for name in names if environment.get(name, "").strip().lower() in TRUE_VALUES)

    offline = switched_on("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    parts = [f"offline ({offline})" if offline else "downloads allowed"]
    if "HF_ENDPOINT" in environment:
        parts.append(f"mirror {urlsplit(environment['HF_ENDPOINT']).hostname or 'with an invalid address'}")
    if default_hub(environment) == "modelscope":
        parts.append(f"names are looked up on ModelScope ({HUB_VARIABLE})")
    if "HF_TOKEN" in environment:
        parts.append("a token is set")
    yield Finding("hub", "ok", "; ".join(parts))
    quiet = switched_on("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK") or offline
    yield Finding(
        "telemetry",
        "ok",
        f"off ({quiet})"
        if quiet
        else "this toolkit reports nothing; the hub's client names package versions when it downloads "
        "(HF_HUB_DISABLE_TELEMETRY=1 stops that)",
    )
