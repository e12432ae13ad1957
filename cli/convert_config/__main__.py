"""A file of settings for LLaMA-Factory, ms-swift or TRL -> settings for this toolkit, and the command that starts it.

python -m cli.convert_config FILE [-o OURS.yaml] [--output_data FOLDER]

Their defaults are written out where they are not ours, and every setting without a counterpart is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from pathlib import Path

from cli.convert_config.conversion import KINDS, Conversion, convert
from cli.convert_config.llamafactory import LLAMAFACTORY
from cli.convert_config.ms_swift import MS_SWIFT
from cli.convert_config.source import read_settings
from cli.convert_config.trl import TRL
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import check_folder_can_be_made
from novelgpt.settings.remedies import run_pipeline
from novelgpt.settings.terminal import say, say_text
from novelgpt.text.dataset_info import INFO

PEERS = {"llamafactory": LLAMAFACTORY, "ms-swift": MS_SWIFT, "trl": TRL}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Convert what the command line names."""
    parser = CommandParser(
        prog="python -m cli.convert_config",
        description="Settings of LLaMA-Factory, ms-swift or TRL as settings of this toolkit.",
    )
    parser.add_argument("file", type=Path, help="YAML or JSON of the tool, or a shell script that calls it")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write ours there [default: show them]")
    parser.add_argument("--from", dest="tool", choices=PEERS, help="whose they are [default: derived from the keys]")
    parser.add_argument("--root", type=Path, help="folder in which the tool is called, where relative paths start")
    parser.add_argument("--output_data", type=Path, metavar="FOLDER", help="for rows that must be rewritten")
    args = parser.parse_args(argv)
    try:
        _convert(args)
    except OSError as error:
        cause = f"{error.filename or args.file}: {error.strerror or error}"
        raise UserError(cause, "name files that can be read and written") from error


def _convert(args: argparse.Namespace) -> None:
    output, output_data = args.output, args.output_data
    if output:
        if output.exists() or output.is_symlink():
            raise UserError(f"{output} already exists", "name a new file with -o")
        check_folder_can_be_made(output.parent, f"--output {output}")
    if output_data:
        check_folder_can_be_made(output_data, f"--output_data {output_data}")
    if output and output_data and output.absolute() in (output_data.absolute(), *output_data.absolute().parents):
        raise UserError(f"--output_data {output_data} must be a folder, and -o {output} a file", "name two places")
    tool, given = read_settings(args.file, args.tool)
    # This folder, or the nearest above the file that has the data which the settings name.
    places = (Path(), *args.file.absolute().parents) if {"dataset_dir", "finetuning_type"} & given.keys() else ()
    info = Path(str(given.get("dataset_dir") or "data"), INFO)
    root = args.root or next((place for place in places if (place / info).is_file()), Path())
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder", f"name the folder in which {tool} is called")
    conversion = convert(PEERS[tool], given, args.file, root, output_data)
    command = run_pipeline(conversion.pipeline, f"--config {shlex.quote(str(output or 'FILE'))}", model=None)
    text = _yaml(conversion, command)
    _write_all(conversion.written | ({output: text} if output else {}))
    on_stderr = output is None
    if on_stderr:
        say_text(text)
    say(f"{conversion.file} ({conversion.peer.tool}) -> {conversion.pipeline}", stderr=on_stderr)
    for kind, title in KINDS.items():
        if notes := conversion.notes[kind]:
            lines = [f"{title}:", *(f"  {note}" for note in notes)]
            say(*lines, style="yellow" if kind == "missing" else None, stderr=on_stderr)
    for path in conversion.written:
        say(f"wrote {path}", stderr=on_stderr)
    if output:
        say(f"wrote {output}", f"train with it: {command}")


def _yaml(conversion: Conversion, command: str) -> str:
    """Our settings with the origin of each, and below them what has no equivalent."""
    lines = [f"# {conversion.pipeline}, from {conversion.file.name} of {conversion.peer.tool}", f"# {command}", ""]
    for name, value in conversion.settings.items():
        origin = " ".join(conversion.origins[name].split())
        lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}" + (f"  # {origin}" if origin else ""))
    for kind, title in KINDS.items():
        if notes := conversion.notes[kind]:
            lines += ["", f"# {title}:", *(f"#   {' '.join(note.split())}" for note in notes)]
    return "\n".join(lines) + "\n"


def _write_all(files: dict[Path, str]) -> None:
    """Write all files; none where one cannot be written, or Ctrl-C comes in between.

    Raises:
        UserError: names the file that cannot be written.
    """
    made: list[Path] = []
    try:
        for path, text in files.items():
            made += reversed([folder for folder in (path.parent, *path.parent.parents) if not folder.exists()])
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


if __name__ == "__main__":
    main()
