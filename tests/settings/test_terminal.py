"""Nothing that comes from outside is markup, a control sequence, or a line of its own on the terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError, exit_on_user_error
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
