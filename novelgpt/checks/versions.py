"""Installed versions against those that the toolkit is tested with. Needs no package but packaging."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from novelgpt.checks.findings import Finding
from novelgpt.settings.paths import ROOT
from novelgpt.settings.remedies import install_for, install_requirements, pip_install

REQUIREMENTS = ROOT / "requirements.txt"
PYTHONS = ((3, 10), (3, 13))
# Below these the toolkit does not run; of the others, requirements.txt names what its tests run on.
LEAST = {"torch": "2.11", "transformers": "5.17"}


def check_python() -> Iterator[Finding]:
    """The interpreter is one of those supported."""
    found = f"Python {sys.version.split()[0]} ({sys.executable})"
    least, most = (".".join(map(str, numbers)) for numbers in PYTHONS)
    if sys.version_info[:2] < PYTHONS[0]:
        yield Finding("python", "problem", f"{found} is too old", install_for(most))
    elif sys.version_info[:2] > PYTHONS[1]:
        remedy = f"where something fails: {install_for(most)}"
        yield Finding("python", "note", f"{found} is newer than tested ({least} to {most})", remedy)
    else:
        yield Finding("python", "ok", found)


def check_packages(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """Each package of requirements.txt is there, in a version that is supported, and they fit each other."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    tested = []
    lines = (line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-")]
    for requirement in wanted:
        name, specifier = requirement.name, requirement.specifier
        remedy = _install(str(requirement))
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "problem", f"{name} is missing", remedy)
            continue
        public = Version(found.public)
        least = LEAST.get(name)
        if least is not None and public < Version(least):
            yield Finding(name, "problem", f"{name} {found} is too old: at least {least} is needed", remedy)
        elif specifier.contains(public, prereleases=True):
            tested.append(f"{name} {found}")
        else:
            older = all(public < Version(part.version) for part in specifier if part.operator in ("==", ">="))
            text = f"{name} {found} is {'older' if older else 'newer'} than tested ({specifier})"
            yield Finding(name, "note", text, f"where something fails: {remedy}")
    if tested:
        yield Finding("packages", "ok", f"as tested: {', '.join(tested)}")
    yield from _check_agreement([requirement.name for requirement in wanted])


def _check_agreement(names: list[str]) -> Iterator[Finding]:
    """What the installed packages ask of each other is what is installed, as `pip check` would tell."""
    from packaging.requirements import Requirement

    for name in names:
        try:
            asked = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        for requirement in asked:
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                found = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                text = f"{name} needs {requirement.name}, which is missing"
                yield Finding(name, "problem", text, _install(str(requirement).split(";")[0].strip()))
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                text = f"{name} needs {requirement.name}{requirement.specifier}, and {found} is installed"
                yield Finding(name, "problem", text, install_requirements())


def _install(requirement: str) -> str:
    return pip_install(re.sub(r" +", "", requirement))
