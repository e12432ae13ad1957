"""Previews of rows as terminal text and as an HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from novelgpt.settings.terminal import counted, visible
from novelgpt.text.statistics import TokenCounts, TokenSpan

GREEN, BOLD_GREEN, DIM, BOLD, YELLOW, RESET = "\x1b[32m", "\x1b[1;32m", "\x1b[2m", "\x1b[1m", "\x1b[33m", "\x1b[0m"
TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"
BORDER = "│"
_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1d1f; --quiet: #6f6f76; --line: #dcd9d2;
  --trained: #14713d; --ground: #e3f3e8; --mark: #a3541b; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --ink: #e9e8e4; --quiet: #8f9097; --line: #34363b;
  --trained: #7fd8a0; --ground: #17301f; --mark: #e0a060; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.75 system-ui, "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 2.5rem 0 .25rem; }
.about, .border { color: var(--quiet); font-size: .85rem; }
.border { border-top: 1px dashed var(--line); margin: .75rem 0 .25rem; }
.note { color: var(--mark); font-size: .85rem; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: 1rem; }
.context { color: var(--quiet); } .trained { color: var(--trained); background: var(--ground); }
.special { font-weight: 600; font-family: ui-monospace, monospace; font-size: .85em; }
.token { box-shadow: inset 1px 0 0 var(--mark); }
"""


@dataclass(frozen=True)
class PreviewPart:
    """A part of a row: its heading ("" for none), and its tokens."""

    heading: str
    spans: list[TokenSpan]


@dataclass(frozen=True)
class RowPreview:
    """A row. name: its id; source: file and line; counts: of its tokens; parts: in order."""

    name: str
    source: str
    counts: TokenCounts
    parts: list[PreviewPart]


def preview_text(shown: RowPreview, coloured: bool, borders: bool) -> str:
    """A row for a terminal: trained tokens green and the others dim or, without colour, trained tokens in ⟦ ⟧."""
    lines = [_paint(f"{visible(shown.name)}   {visible(shown.source)}", BOLD, coloured), describe(shown.counts)]
    lines += [_paint(f"  {number:,} {visible(note)}", YELLOW, coloured) for note, number in shown.counts.notes.items()]
    for part in shown.parts:
        if part.heading:
            lines.append(_paint(f"──── {visible(part.heading)} ────", YELLOW, coloured))
        if not part.spans:
            continue
        text, trained = "", False
        for span in part.spans:
            if not coloured and span.trained != trained:
                text += TRAINED_OPEN if span.trained else TRAINED_CLOSE
            trained = span.trained
            style = (BOLD_GREEN if span.special else GREEN) if trained else DIM
            text += (BORDER if borders and span.begin else "") + _paint(visible(span.text), style, coloured)
        lines.append(text + (TRAINED_CLOSE if trained and not coloured else ""))
    return "\n".join(lines) + "\n"


def preview_html(rows: list[RowPreview], title: str, total: TokenCounts, borders: bool) -> str:
    """All rows as one self-contained page."""
    sections = []
    for shown in rows:
        noted = shown.counts.notes.items()
        notes = "".join(f'<div class="note">{number:,} {_html(note)}</div>' for note, number in noted)
        parts = []
        for part in shown.parts:
            heading = f'<div class="border">{_html(part.heading)}</div>' if part.heading else ""
            text = "".join(_span(span, borders) for span in part.spans)
            parts.append(heading + (f'<div class="row" lang="zh">{text}</div>' if text else ""))
        sections.append(
            f'<section><h2>{_html(shown.name)}</h2><div class="about">{_html(shown.source)}<br>'
            f"{describe(shown.counts)}</div>{notes}{''.join(parts)}</section>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_html(title)}</title><style>{_STYLE}</style></head><body><h1>{_html(title)}</h1>"
        f'<p class="about">{counted(total.rows, "row")} · {describe(total)}<br>'
        '<span class="trained">trained 参与训练</span> '
        f'<span class="context">context 只读不训练</span></p>{"".join(sections)}</body></html>\n'
    )


def describe(counts: TokenCounts) -> str:
    """Token counts in one line."""
    parts = f"{counts.trained:,} trained, {counts.context:,} context, {counts.dropped:,} dropped"
    return f"{counted(counts.tokens_in, 'token')}: {parts}"


def _paint(text: str, style: str, coloured: bool) -> str:
    return f"{style}{text}{RESET}" if coloured and text else text


def _html(text: str) -> str:
    return escape(visible(text), quote=True)


def _span(span: TokenSpan, borders: bool) -> str:
    kinds = ["trained" if span.trained else "context"]
    kinds += ["special"] if span.special else []
    kinds += ["token"] if borders else []
    return f'<span class="{" ".join(kinds)}">{_html(span.text)}</span>' if span.text else ""
