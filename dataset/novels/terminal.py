"""What a person who prepares novels sees: progress, and a table of what came out."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from dataset.novels.collection import Written
from dataset.novels.records import BookRecord
from novelgpt.settings.console import make_console
from novelgpt.settings.paths import TINY
from novelgpt.settings.remedies import run_pipeline
from novelgpt.settings.terminal import counted, say

SECONDS_BETWEEN_LINES = 10.0
MOST_RULES, MOST_REFUSED = 8, 20


class Display:
    """Progress on standard error, results on standard output."""

    def __init__(self) -> None:
        self.console = make_console()
        self.progress = make_console(stderr=True)

    def say(self, text: str) -> None:
        """A line about what is done now."""
        say(text, stderr=True)

    @contextmanager
    def files(self, title: str, count: int, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Progress over files: call what is yielded with the bytes of each that is done."""
        if not self.progress.is_terminal:
            yield _PlainProgress(self, title, count, total_bytes).advance
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TransferSpeedColumn(),
            TextColumn("time left 剩余"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.progress) as progress:
            task = progress.add_task(title, total=total_bytes)
            yield lambda size: progress.advance(task, size)

    def show_refused(self, books: Sequence[BookRecord]) -> None:
        """A line for each book that cannot be used."""
        refused = [book for book in books if book.refused]
        for book in refused[:MOST_REFUSED]:
            say(f"  refused 拒收 {book.source}: {book.refused}", style="yellow")
        if len(refused) > MOST_REFUSED:
            say(f"  … and {len(refused) - MOST_REFUSED:,} more, in books.jsonl", style="yellow")

    def show_results(self, written: Written) -> None:
        """The tables."""
        books = written.books
        table = Table(title="Novels 小说", title_justify="left")
        for column in ("", "books 书", "chapters 章", "characters 字"):
            table.add_column(column, justify="right" if column else "left")
        for label, split in (("train 训练", "train"), ("held out 留出", "held_out"), ("refused 拒收", "refused")):
            chosen = [book for book in books if book.split == split]
            chapters = sum(len(book.chapter_characters) - book.duplicate_chapters for book in chosen)
            characters = sum(book.characters_out for book in chosen)
            shown = (f"{chapters:,}", f"{characters:,}") if split != "refused" else ("", "")
            table.add_row(label, f"{len(chosen):,}", *shown)
        self.console.print(table)
        self._show_removed(books)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(written.left_out.items()))
        levels = Counter(pair["level"] for pair in written.pairs)
        say(
            f"left out 未采用 (left_out.jsonl): {reasons or 'no chapter'}; alike 相似 (duplicates.jsonl): "
            f"{counted(levels['book'], 'pair of books')}, {counted(levels['chapter'], 'pair of chapters')}"
        )
        for source, reason in written.skipped[:MOST_REFUSED]:
            say(f"  not read 未读取 {source}: {reason}")
        if len(written.skipped) > MOST_REFUSED:
            say(f"  … and {len(written.skipped) - MOST_REFUSED:,} more, in left_out.jsonl")
        self.show_refused(books)

    def _show_removed(self, books: Sequence[BookRecord]) -> None:
        characters_in = sum(book.characters_in for book in books)
        removed: Counter[str] = Counter()
        lines: Counter[str] = Counter()
        for book in books:
            for rule, counts in book.removed.items():
                removed[rule] += counts["characters"]
                lines[rule] += counts["lines"]
        if not removed:
            say("removed 剔除: no line")
            return
        table = Table(title="Removed 剔除 (rejected.jsonl)", title_justify="left")
        for column in ("rule 规则", "lines 行", "characters 字", "share of all 占比"):
            table.add_column(column, justify="left" if column.startswith("rule") else "right")
        shown = removed.most_common(MOST_RULES)
        rest = set(removed) - {rule for rule, _ in shown}
        for rule, count in shown:
            table.add_row(rule, f"{lines[rule]:,}", f"{count:,}", f"{count / characters_in:.3%}")
        if rest:
            count = sum(removed[rule] for rule in rest)
            table.add_row(
                f"{len(rest)} more", f"{sum(lines[rule] for rule in rest):,}", f"{count:,}",
                f"{count / characters_in:.3%}",
            )  # fmt: skip
        self.console.print(table)

    def show_next(self, out: Path) -> None:
        """Where the report is, and what to type next."""
        say(f"report 报告: {out / 'report.html'}")
        command = run_pipeline("pretrain", f"--train_files {shlex.quote(str(out))}")
        say(f"next 下一步: {command}")
        say(f"  with the model that you train 换成要训练的模型; --model {TINY} tries it on the small base")


class _PlainProgress:
    """Now and then a line, for files and pipes."""

    def __init__(self, display: Display, title: str, count: int, total_bytes: int) -> None:
        self.display, self.title, self.count, self.total_bytes = display, title, count, total_bytes
        self.done, self.bytes = 0, 0
        self.start = self.last = time.monotonic()

    def advance(self, size: int) -> None:
        """A file is done."""
        self.done += 1
        self.bytes += size
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and self.done < self.count:
            return
        self.last = now
        seconds = max(now - self.start, 1e-3)
        left = (self.total_bytes - self.bytes) / max(self.bytes / seconds, 1)
        self.display.say(
            f"{self.title}: {self.done:,} of {counted(self.count, 'file')}, {self.bytes / 1e6:,.1f} of "
            f"{self.total_bytes / 1e6:,.1f} MB, {self.bytes / seconds / 1e6:,.1f} MB/s, {left:,.0f} s left 剩余"
        )
