"""What the benchmarks have in common: a console, targets that must not be exceeded, and --json."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from novelgpt.settings.atomic_files import atomic_write

TABLE_WIDTH = 144


def make_console() -> Console:
    """Wide enough for the tables, in a file as well."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)


def make_parser(description: str) -> argparse.ArgumentParser:
    """With the option that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return parser


def result(name: str, value: float, unit: str, target: float) -> dict[str, Any]:
    """One entry of --json; each target is a value that must not be exceeded."""
    return {"name": name, "value": value, "unit": unit, "target": f"<= {target:g}", "holds": value <= target}


def at_least(name: str, value: float, unit: str, target: float) -> dict[str, Any]:
    """One entry of --json whose target must be reached."""
    return {"name": name, "value": value, "unit": unit, "target": f">= {target:g}", "holds": value >= target}


def show_results(results: list[dict[str, Any]], console: Console) -> None:
    """A line a target."""
    for entry in results:
        verdict = "holds" if entry["holds"] else "MISSED"
        console.print(f"  {entry['name']:<64}{entry['value']:>10.4g}     target: {entry['target']}: {verdict}")


def write_results(results: list[dict[str, Any]], path: Path | None, **more: Any) -> None:
    """The entries, and what else there is, as --json asks for them; nothing without a path."""
    if path is not None:
        atomic_write(path, json.dumps({"results": results, **more}, indent=2) + "\n")
