"""Nothing that comes from outside is markup, a control sequence, or a line of its own on the terminal."""

from __future__ import annotations

import ast
import io
import logging
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import ROOT
from novelgpt.settings.terminal import one_line, say, say_above_bars, say_text, visible

# ESC, an operating system command with BEL, C1's CSI, a bidirectional override, CR, backspace, a line separator, and
# half of a character as file names that are no UTF-8 have it.
HOSTILE = "甲\x1b[31m\x1b]0;title\x07\x9b2J\u202e\r\x08\u2028\udc80[/b][bold]:smile:乙"
KEPT = "第一回　甄士隐👨‍👩‍👧‍👦 ❤️ “x”…"


def steers(text: str) -> set[str]:
    found = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return found - set("\n\t\u200d")


def test_what_steers_is_shown_as_its_code_and_all_else_is_kept() -> None:
    shown = visible(HOSTILE)
    assert shown.startswith("甲<U+001B>[31m<U+001B>]0;title<U+0007><U+009B>2J<U+202E><U+000D>")
    assert shown.endswith("<U+2028><U+DC80>[/b][bold]:smile:乙")
    assert visible(KEPT + "\n\t") == KEPT + "\n\t"
    assert one_line("x\nerror: y") == "x<U+000A>error: y"
    assert visible(shown) == shown


@pytest.mark.parametrize("style", [None, "yellow"])
def test_each_line_that_is_said_is_one_line(style: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a {HOSTILE}\nerror: b", "c", style=style)
    say_above_bars(f"d {HOSTILE}\ne")
    say_text(f"{KEPT}\n{HOSTILE}", end="")
    said = capsys.readouterr().out
    assert not steers(said)
    assert said.count("\n") == 4
    assert said.count("[/b][bold]:smile:乙") == 3
    assert KEPT in said


def test_a_console_writes_its_own_styles_and_nothing_elses() -> None:
    page = io.StringIO()
    console = make_console(file=page, width=300, force_terminal=True, color_system="truecolor")
    console.print(HOSTILE)
    console.print(Text(HOSTILE), style="bold")
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text.assemble((HOSTILE, "red")))
    console.print(table)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
        progress.add_task(HOSTILE, total=1)
    written = page.getvalue()
    for letter in ("\x07", "\x9b", "\u202e", "\x08", "\u2028", "\udc80"):
        assert letter not in written
    assert "\x1b[31m\x1b]" not in written
    assert written.count("[/b][bold]:smile:乙") == 6  # a bar is as wide as its text was
    borders = [line for line in written.splitlines() if line.startswith(("│", "┃"))]
    assert len({len(Text.from_ansi(line).plain) for line in borders}) == 1  # widths count what is shown


def test_an_error_of_use_is_two_lines_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def main(argv: list[str] | None = None) -> None:
        raise UserError(f"{HOSTILE}\n  fix: rm -rf", f"look at {HOSTILE}")

    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert not steers(said)
    assert [line[:8] for line in said.splitlines()] == ["error: 甲", "  fix: l"]


def test_errors_of_the_command_line_are_shown_as_well() -> None:
    parser = CommandParser(prog="python -m one")
    parser.add_argument("--number", type=int)
    with pytest.raises(UserError) as raised:
        parser.parse_args(["--number", HOSTILE])
    assert not steers(raised.value.cause) and "\n" not in raised.value.cause


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a command; undone afterwards."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    factory = logging.getLogRecordFactory()
    exit_on_user_error(lambda argv: None)()
    yield
    logging.setLogRecordFactory(factory)


def test_what_libraries_log_warn_of_and_raise_does_not_steer(guarded: None, capsys: pytest.CaptureFixture[str]) -> None:
    logged = io.StringIO()
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler(logged)
    logger.addHandler(handler)
    logger.warning("\x1b[1mkeys\x1b[0m %s", "\x1b]0;title\x07\x9b2J")
    logger.removeHandler(handler)
    assert logged.getvalue() == "\x1b[1mkeys\x1b[0m <U+001B>]0;title<U+0007><U+009B>2J\n"
    assert not steers(warnings.formatwarning(HOSTILE, UserWarning, "a.py", 1))
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    assert not steers(capsys.readouterr().err)


def test_letters_that_a_terminal_lacks_end_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    exit_on_user_error(lambda argv: say("雪 …"))()
    sys.stdout.flush()
    assert written.getvalue() == b"\\u96ea \\u2026\n"


ROOMS = ("novelgpt", "dataset", "predict", "pretrain", "finetune", "finetune_lora", "scripts")
BORDER = ("novelgpt/settings/terminal.py", "novelgpt/settings/console.py")
# JSON in ASCII for another process; a preview that is visible but for its own colours.
PRINTING = {"novelgpt/checks/longest_batch.py", "dataset/preview.py"}


def printed_by(path: Path) -> set[str]:
    """Ways past the border that a module takes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "tqdm.write", "sys.stdout.write", "sys.stderr.write", "Console", "console.log"):
                found.add(name)
        if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console", "rich.markup"):
            found |= {alias.name for alias in node.names} & {"print", "Console", "escape", "get_console"}
    return found


def test_nothing_is_printed_past_the_border() -> None:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    past = {str(path.relative_to(ROOT)): printed_by(path) for path in paths}
    assert {name for name, ways in past.items() if ways and name not in BORDER} == PRINTING
    assert all(past[name] == {"print"} for name in PRINTING)


def test_a_command_whose_reader_has_ended_ends_without_a_word() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE
