"""What a run needs of the machine beside its devices: a port, disk space, open files, switches."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from novelgpt.checks.findings import Finding
from novelgpt.settings.paths import HUB_VARIABLE, default_hub, existing_folder
from novelgpt.settings.terminal import GIGABYTE, counted, gigabytes

DEFAULT_PORT = 29500
# The final weights of the small base with a checkpoint or two, and what most runs on models of use leave.
LEAST_ROOM, USUAL_ROOM = GIGABYTE // 2, 20 * GIGABYTE
LEAST_SHARED_MEMORY = GIGABYTE
LEAST_OPEN_FILES = 4096
TRUE_WORDS = {"1", "on", "yes", "true"}


def check_port() -> Iterator[Finding]:
    """Processes of a run can meet at MASTER_PORT; where that is not set, at the port that hostfiles use."""
    named = os.environ.get("MASTER_PORT")
    try:
        port = DEFAULT_PORT if named is None else int(named)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except (ValueError, OverflowError):
        yield Finding("port", "problem", f"MASTER_PORT={named} is no port", "unset MASTER_PORT, or a number above 1024")
    except OSError as error:
        free = f"MASTER_PORT={_free_port()}"
        text = f"port {port} cannot be used: {error.strerror}"
        if named is None:
            text += "; it is the default for several hosts"
            yield Finding("port", "note", text, f"with HOSTFILE, set another one on all hosts: export {free}")
        else:
            yield Finding("port", "problem", text, f"export {free}")
    else:
        yield Finding("port", "ok", f"port {port} is free for processes to meet")


def check_room(output: Path) -> Iterator[Finding]:
    """The folder of runs can be written to and has room."""
    folder = existing_folder(output)
    if not os.access(folder, os.W_OK):
        remedy = "name a folder of yours: --output_dir FOLDER"
        yield Finding("disk", "problem", f"nothing can be written into {folder}", remedy)
        return
    free = shutil.disk_usage(folder).free
    text = f"{gigabytes(free)} free for {output}"
    if free < LEAST_ROOM:
        yield Finding("disk", "problem", text, "make room, or name a folder on another disk: --output_dir FOLDER")
    elif free < USUAL_ROOM:
        remedy = "with --model, this command tells what its checkpoints take; --save_total_limit 1 keeps fewer"
        yield Finding("disk", "note", text, remedy)
    else:
        yield Finding("disk", "ok", text)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """There is shared memory for data loaders and for several GPUs of one host."""
    if not folder.is_dir():
        remedy = "mount one for several GPUs: mount -t tmpfs shm /dev/shm"
        yield Finding("shared memory", "note", f"there is no {folder}", remedy)
        return
    usage = shutil.disk_usage(folder)
    text = f"{gigabytes(usage.free)} free of {gigabytes(usage.total)} in {folder}"
    if usage.free < LEAST_SHARED_MEMORY:
        remedy = "docker run --shm-size=8g …; elsewhere: mount -o remount,size=8G /dev/shm"
        yield Finding("shared memory", "note", f"{text}: several GPUs may not start", remedy)
    else:
        yield Finding("shared memory", "ok", text)


def check_open_files() -> Iterator[Finding]:
    """A process may hold enough files open."""
    try:
        import resource
    except ImportError:
        yield Finding("open files", "ok", "this system sets no limit")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_OPEN_FILES:
        wanted = LEAST_OPEN_FILES if hard < 0 else min(hard, 65536)
        text = (
            f"a process may hold {counted(soft, 'file')} open; large folders of shards and many workers may need more"
        )
        yield Finding("open files", "note", text, f"ulimit -n {wanted}")
    else:
        yield Finding("open files", "ok", f"a process may hold {'any number of' if soft < 0 else soft} files open")


def check_switches(environment: dict[str, str]) -> Iterator[Finding]:
    """What the environment says about the model hub and about what clients report home. Secrets are not shown."""
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(environment.get(name))]
    parts = [f"offline ({', '.join(offline)})" if offline else "downloads allowed"]
    if "HF_ENDPOINT" in environment:
        parts.append(f"mirror {urlsplit(environment['HF_ENDPOINT']).hostname or 'of no valid address'}")
    if default_hub(environment) == "modelscope":
        parts.append(f"names are looked up on ModelScope ({HUB_VARIABLE})")
    if "HF_TOKEN" in environment:
        parts.append("a token is set")
    yield Finding("hub", "ok", "; ".join(parts))
    quiet = [name for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK") if _is_on(environment.get(name))]
    if quiet or offline:
        yield Finding("telemetry", "ok", f"off ({', '.join(quiet or offline)})")
    else:
        text = "this toolkit reports nothing; the hub's client names package versions when it downloads"
        yield Finding("telemetry", "ok", f"{text} (HF_HUB_DISABLE_TELEMETRY=1 stops that)")


def _is_on(value: str | None) -> bool:
    return (value or "").strip().lower() in TRUE_WORDS


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
