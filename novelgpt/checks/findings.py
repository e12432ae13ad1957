"""Findings of checks: made, also from a check that fails itself, shown, and written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import install_requirements
from novelgpt.settings.terminal import say

Value = TypeVar("Value")
Mark = Literal["ok", "note", "problem"]
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: what was checked, in a word or two.
        mark: "ok"; "note", with which training runs, but perhaps not as intended; "problem", with which it fails.
        text: what was found, in one line.
        remedy: what to type or do, in one line; for all marks but ok.
    """

    check: str
    mark: Mark
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", " ".join(self.text.split()))
        object.__setattr__(self, "remedy", " ".join(self.remedy.split()))
        if (self.mark == "ok") == bool(self.remedy):
            raise ValueError(f"{self.check}: a remedy goes with each note and problem, and with nothing else")


Check = Callable[[], Iterable[Finding]]


def first_case(check: str, ok: str, *cases: tuple[bool, Mark, str, str]) -> Finding:
    """Return the first case that holds as a finding, or an "ok".

    Args:
        check: what was checked.
        ok: text of the finding where no case holds.
        cases: (whether it holds, mark, text, remedy).
    """
    for holds, mark, text, remedy in cases:
        if holds:
            return Finding(check, mark, text, remedy)
    return Finding(check, "ok", ok)


def attempt(name: str, call: Callable[[], Value], failure: Mark = "problem") -> tuple[Value | None, list[Finding]]:
    """Return what `call` returns; or None, and what it raises as a finding. Only an interrupt is raised.

    Args:
        name: of the check.
        call: what may fail.
        failure: mark of an error that is not a UserError.
    """
    try:
        return call(), []
    except UserError as error:
        return None, [Finding(name, "problem", error.cause, error.remedy)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any kind, Rust's panics too: broken installations are what is looked for
        reason = (str(error).strip().splitlines() or [""])[0]
        text = f"this could not be checked: {type(error).__name__}: {reason:.300}"
        return None, [Finding(name, failure, text, f"fix what the line names; for a package: {install_requirements()}")]


def run_check(name: str, check: Check, failure: Mark = "problem") -> list[Finding]:
    """Return what a check finds, and what it raises as a last finding. See `attempt`."""
    findings: list[Finding] = []
    _, failed = attempt(name, lambda: findings.extend(check()), failure)
    return findings + failed


def show(heading: str, findings: Sequence[Finding], terminal: bool) -> None:
    """Print findings below a heading: as a table on a terminal, as lines elsewhere or without rich."""
    if terminal:
        with contextlib.suppress(ImportError):
            from rich.table import Table
            from rich.text import Text

            from novelgpt.settings.console import make_console

            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            table.add_column(no_wrap=True)
            table.add_column(no_wrap=True)
            table.add_column(ratio=1)
            for finding in findings:
                text = Text(finding.text)
                if finding.remedy:
                    text.append(f"\nfix: {finding.remedy}", style="cyan")
                table.add_row(Text(finding.mark, style=COLOURS[finding.mark]), Text(finding.check), text)
            console = make_console()
            console.print(Text(f"\n{heading}", style="bold"))
            console.print(table)
            return
    say("", heading)
    for finding in findings:
        say(f"  {finding.mark:<8} {finding.check}: {finding.text}")
        if finding.remedy:
            say(f"  {'':<8} fix: {finding.remedy}")


def write_json(path: Path, findings: Sequence[Finding], seconds: float) -> None:
    """Write {"ok", "seconds", "findings": [{"check", "mark", "text", "remedy"}]} atomically.

    Raises:
        UserError: nothing can be written there.
    """
    report = {
        "ok": not any_problem(findings),
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in findings],
    }
    try:
        atomic_write(path, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--json {path} cannot be written: {error.strerror}", "name a file in a folder you can write to"
        ) from error


def any_problem(findings: Iterable[Finding]) -> bool:
    """Whether one of the findings would make training fail."""
    return any(finding.mark == "problem" for finding in findings)
