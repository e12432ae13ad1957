"""The one maker of rich consoles: whatever is printed on them, their own styles alone steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from novelgpt.settings.terminal import visible


class VisibleConsole(Console):
    """A console on which strings are no markup, and control characters of strings, texts and tables are codes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings, before their width is taken."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """All else; control segments are those of rich's own bars and cursors."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def make_console(**options: Any) -> VisibleConsole:
    """A console for text of any origin.

    Args:
        options: of rich's Console, but for markup, emoji and highlight, which are off: styles are given by `style=` or
            as `rich.text.Text`.
    """
    return VisibleConsole(markup=False, emoji=False, highlight=False, **options)


def number_table(title: str, *headings: str, labels: int = 1) -> Table:
    """An empty table with a title above its left corner.

    Args:
        title: of the table.
        headings: of the columns.
        labels: number of left-aligned columns before the right-aligned ones.
    """
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < labels else "right")
    return table
