"""Checks of the machine and of installed versions. Needs no package except packaging, so that it runs without torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from novelgpt.checks.findings import Finding, first_case
from novelgpt.settings.paths import HUB_VARIABLE, ROOT, default_hub, existing_folder
from novelgpt.settings.remedies import install_for, install_requirements, pip_install
from novelgpt.settings.terminal import GIGABYTE, counted, gigabytes

DEFAULT_PORT = 29500
# What the small base with a checkpoint or two takes, and what most runs on useful models take.
MIN_FREE_BYTES, USUAL_FREE_BYTES = GIGABYTE // 2, 20 * GIGABYTE
MIN_SHARED_MEMORY = GIGABYTE
MIN_OPEN_FILES = 4096
TRUE_VALUES = {"1", "on", "yes", "true"}
REQUIREMENTS = ROOT / "requirements.txt"
PYTHONS = ((3, 10), (3, 13))
# The toolkit does not run below these; requirements.txt pins what it is tested with.
MINIMUM = {"torch": "2.11", "transformers": "5.17"}


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


if TYPE_CHECKING:
    from packaging.requirements import Requirement


def check_python() -> Iterator[Finding]:
    """Check that the interpreter is supported."""
    found = f"Python {sys.version.split()[0]} ({sys.executable})"
    oldest, newest = (".".join(map(str, numbers)) for numbers in PYTHONS)
    yield first_case(
        "python",
        found,
        (sys.version_info[:2] < PYTHONS[0], "problem", f"{found} is too old", install_for(newest)),
        (
            sys.version_info[:2] > PYTHONS[1],
            "note",
            f"{found} is newer than tested ({oldest} to {newest})",
            f"where something fails: {install_for(newest)}",
        ),
    )


def check_packages(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """Check that each package of requirements.txt is installed in a supported version, and that they agree."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = (line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-")]
    tested = []
    for requirement in wanted:
        name, specifier = requirement.name, requirement.specifier
        remedy = pip_install(str(requirement).replace(" ", ""))
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "problem", f"{name} is missing", remedy)
            continue
        public = Version(found.public)
        if name in MINIMUM and public < Version(MINIMUM[name]):
            yield Finding(name, "problem", f"{name} {found} is too old: at least {MINIMUM[name]} is needed", remedy)
        elif specifier.contains(public, prereleases=True):
            tested.append(f"{name} {found}")
        else:
            older = all(public < Version(part.version) for part in specifier if part.operator in ("==", ">="))
            yield Finding(
                name,
                "note",
                f"{name} {found} is {'older' if older else 'newer'} than tested ({specifier})",
                f"where something fails: {remedy}",
            )
    if tested:
        yield Finding("packages", "ok", f"as tested: {', '.join(tested)}")
    for requirement in wanted:  # what installed packages require of each other, as `pip check` reports
        with contextlib.suppress(metadata.PackageNotFoundError):
            for line in metadata.requires(requirement.name) or []:
                yield from _check_dependency(requirement.name, Requirement(line))


def _check_dependency(name: str, dependency: Requirement) -> Iterator[Finding]:
    if dependency.marker is not None and not dependency.marker.evaluate({"extra": ""}):
        return
    try:
        found = metadata.version(dependency.name)
    except metadata.PackageNotFoundError:
        yield Finding(
            name,
            "problem",
            f"{name} needs {dependency.name}, which is missing",
            pip_install(str(dependency).split(";")[0].replace(" ", "")),
        )
        return
    if not dependency.specifier.contains(found, prereleases=True):
        yield Finding(
            name,
            "problem",
            f"{name} needs {dependency.name}{dependency.specifier}, and {found} is installed",
            install_requirements(),
        )
