"""A file of settings for LLaMA-Factory, ms-swift or TRL -> settings for this toolkit, and the command that starts it.

python -m cli.convert_config FILE [-o OURS.yaml] [--output_data FOLDER]

Their defaults are written out where they are not ours, and every setting without a counterpart is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.convert_config import llamafactory, ms_swift, trl
from cli.convert_config.conversion import KINDS, Conversion
from cli.convert_config.rows import RowWriter
from cli.convert_config.source import read_settings
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import check_folder_can_be_made
from novelgpt.settings.remedies import run_pipeline
from novelgpt.settings.terminal import say, say_text

Convert = Callable[[dict[str, Any], Path, Path, Path | None], tuple[Conversion, RowWriter]]
CONVERTERS: dict[str, Convert] = {
    "llamafactory": llamafactory.convert,
    "ms-swift": ms_swift.convert,
    "trl": trl.convert,
}
STYLES = {"same": None, "differs": None, "missing": "yellow"}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Convert what the command line names."""
    words = _parser().parse_args(argv)
    try:
        _check_places(words.output, words.output_data)
        _convert(words)
    except OSError as error:
        cause = f"{error.filename or words.file}: {error.strerror or error}"
        raise UserError(cause, "name what can be read and written") from error


def _check_places(output: Path | None, output_data: Path | None) -> None:
    if output:
        if output.exists() or output.is_symlink():
            raise UserError(f"{output} is there already", "name a new file with -o")
        check_folder_can_be_made(output.parent, f"--output {output}")
    if output_data:
        check_folder_can_be_made(output_data, f"--output_data {output_data}")
    if output and output_data and output.absolute() in (output_data.absolute(), *output_data.absolute().parents):
        raise UserError(f"--output_data {output_data} is to be a folder, and -o {output} a file", "name two places")


def _convert(words: argparse.Namespace) -> None:
    tool, given = read_settings(words.file, words.tool)
    root = words.root or _root(words.file, given)
    if not root.is_dir():
        raise UserError(f"--root {root} is no folder", f"name the folder in which {tool} is called")
    conversion, writer = CONVERTERS[tool](given, words.file, root, words.output_data)
    command = _command(conversion, words.output)
    text = _yaml(conversion, command)
    _write(writer.written | ({words.output: text} if words.output else {}))
    if not words.output:
        say_text(text)
    _say_notes(conversion, stderr=words.output is None)
    for path in writer.written:
        say(f"wrote {path}", stderr=words.output is None)
    if words.output:
        say(f"wrote {words.output}", f"train with it: {command}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m cli.convert_config",
        description="Settings of LLaMA-Factory, ms-swift or TRL as settings of this toolkit.",
    )
    parser.add_argument("file", type=Path, help="YAML or JSON of the tool, or a shell script that calls it")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write ours there [default: show them]")
    parser.add_argument("--from", dest="tool", choices=CONVERTERS, help="whose they are [default: told from the keys]")
    parser.add_argument("--root", type=Path, help="folder in which the tool is called, where relative paths start")
    parser.add_argument("--output_data", type=Path, metavar="FOLDER", help="for rows that have to be written anew")
    return parser


def _write(files: dict[Path, str]) -> None:
    """Write all files, or none where one cannot be, or Ctrl-C comes in between.

    Raises:
        UserError: names the file that cannot be written.
    """
    made: list[Path] = []
    try:
        for path, text in files.items():
            folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            made += reversed(folders)
            path.parent.mkdir(parents=True, exist_ok=True)
            made.append(path)
            atomic_write(path, text)
    except BaseException as error:
        for place in reversed(made):
            with contextlib.suppress(OSError):
                place.rmdir() if place.is_dir() else place.unlink()
        if isinstance(error, OSError):
            cause = f"{path} cannot be written: {error.strerror or error}"
            raise UserError(cause, "make room; nothing was written") from error
        raise


def _root(file: Path, given: dict[str, Any]) -> Path:
    """This folder, or the nearest above the file that has the data which the settings name."""
    wanted = str(given.get("dataset_dir") or "data")
    if "dataset_dir" in given or "finetuning_type" in given:
        for place in (Path(), *file.absolute().parents):
            if (place / wanted / "dataset_info.json").is_file():
                return place
    return Path()


def _command(conversion: Conversion, output: Path | None) -> str:
    return run_pipeline(conversion.pipeline, f"--config {shlex.quote(str(output or 'FILE'))}", model=None)


def _yaml(conversion: Conversion, command: str) -> str:
    """Our settings with where each comes from, and below them what has no counterpart."""
    lines = [
        f"# {conversion.pipeline}, from {conversion.file.name} of {conversion.tool}",
        f"# {command}",
        "",
    ]
    for name, setting in conversion.settings.items():
        value = json.dumps(setting.value, ensure_ascii=False)
        lines.append(f"{name}: {value}" + (f"  # {' '.join(setting.origin.split())}" if setting.origin else ""))
    for kind, title in KINDS.items():
        notes = [note for note in conversion.notes if note.kind == kind]
        if notes:
            lines += ["", f"# {title}:", *(f"#   {note.key}: {' '.join(note.text.split())}" for note in notes)]
    return "\n".join(lines) + "\n"


def _say_notes(conversion: Conversion, stderr: bool) -> None:
    say(f"{conversion.file} ({conversion.tool}) -> {conversion.pipeline}", stderr=stderr)
    for kind, title in KINDS.items():
        notes = [note for note in conversion.notes if note.kind == kind]
        if notes:
            lines = [f"{title}:", *(f"  {note.key}: {note.text}" for note in notes)]
            say(*lines, style=STYLES[kind], stderr=stderr)


if __name__ == "__main__":
    main()
