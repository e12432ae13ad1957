"""Checks installed versions against those that the toolkit is tested with. Needs no package except packaging."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from novelgpt.checks.findings import Finding, first_case
from novelgpt.settings.paths import ROOT
from novelgpt.settings.remedies import install_for, install_requirements, pip_install

if TYPE_CHECKING:
    from packaging.requirements import Requirement

REQUIREMENTS = ROOT / "requirements.txt"
PYTHONS = ((3, 10), (3, 13))
# The toolkit does not run below these; requirements.txt pins what it is tested with.
MINIMUM = {"torch": "2.11", "transformers": "5.17"}


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
    for requirement in wanted:  # what installed packages require of each other, as `pip check` would tell
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
