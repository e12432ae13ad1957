"""Terminal output of preparing novels: progress, and tables of the result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from dataset.novels.collection import CollectionResult
from dataset.novels.records import BookRecord, count_removed
from novelgpt.settings.console import make_console
from novelgpt.settings.terminal import counted, say

SECONDS_BETWEEN_LINES = 10.0
MAX_RULES, MAX_LINES = 8, 20


class Display:
    """Progress on standard error, results on standard output."""

    def __init__(self) -> None:
        self.console = make_console()
        self.progress = make_console(stderr=True)

    @contextmanager
    def files(self, title: str, count: int, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Progress over files: call what is yielded with the bytes of each that is done."""
        if not self.progress.is_terminal:
            yield self._plain_progress(title, count, total_bytes)
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

    def _plain_progress(self, title: str, count: int, total_bytes: int) -> Callable[[int], None]:
        """A line every few seconds, for files and pipes."""
        done = done_bytes = 0
        start = last = time.monotonic()

        def advance(size: int) -> None:
            nonlocal done, done_bytes, last
            done += 1
            done_bytes += size
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES and done < count:
                return
            last = now
            speed = done_bytes / max(now - start, 1e-3)
            left = (total_bytes - done_bytes) / max(speed, 1)
            say(
                f"{title}: {done:,} of {counted(count, 'file')}, {done_bytes / 1e6:,.1f} of {total_bytes / 1e6:,.1f} "
                f"MB, {speed / 1e6:,.1f} MB/s, {left:,.0f} s left 剩余",
                stderr=True,
            )

        return advance

    def show_refused(self, books: Sequence[BookRecord]) -> None:
        """A line for each book that cannot be used."""
        lines = [f"  refused 拒收 {book.source}: {book.refused}" for book in books if book.refused]
        self._show_first(lines, "books.jsonl", style="yellow")

    def _show_first(self, lines: Sequence[str], file: str, style: str | None = None) -> None:
        for line in lines[:MAX_LINES]:
            say(line, style=style)
        if len(lines) > MAX_LINES:
            say(f"  … and {len(lines) - MAX_LINES:,} more, in {file}", style=style)

    def show_results(self, result: CollectionResult) -> None:
        """The tables."""
        books = result.books
        table = Table(title="Novels 小说", title_justify="left")
        for column in ("", "books 书（本）", "chapters 章节", "characters 字数"):
            table.add_column(column, justify="right" if column else "left")
        for label, split in (
            ("train 训练", "train"),
            ("held out 留出", "held_out"),
            ("left out 排除", "left_out"),
            ("refused 拒收", "refused"),
        ):
            chosen = [book for book in books if book.split == split]
            if split == "left_out" and not chosen:
                continue
            chapters = sum(len(book.chapter_characters) - book.duplicate_chapters for book in chosen)
            characters = sum(book.characters_out for book in chosen)
            shown = (f"{chapters:,}", f"{characters:,}") if split in ("train", "held_out") else ("", "")
            table.add_row(label, f"{len(chosen):,}", *shown)
        self.console.print(table)
        self._show_removed(books)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.left_out.items()))
        levels = Counter(pair["level"] for pair in result.pairs)
        say(
            f"left out 未采用 (left_out.jsonl): {reasons or 'no chapter'}; alike 相似 (duplicates.jsonl): "
            f"{counted(levels['book'], 'pair of books')}, {counted(levels['chapter'], 'pair of chapters')}"
        )
        self._show_first(
            [f"  not read 未读取 {source}: {reason}" for source, reason in result.skipped], "left_out.jsonl"
        )
        self.show_refused(books)

    def _show_removed(self, books: Sequence[BookRecord]) -> None:
        lines, removed = count_removed(books)
        if not removed:
            say("removed 删除: no line")
            return
        table = Table(title="Removed 删除 (rejected.jsonl)", title_justify="left")
        for column in ("rule 规则", "lines 行数", "characters 字数", "share of all 占比"):
            table.add_column(column, justify="left" if column.startswith("rule") else "right")
        ranked = [rule for rule, _ in removed.most_common()]
        rows = [(rule, [rule]) for rule in ranked[:MAX_RULES]]
        if rest := ranked[MAX_RULES:]:
            rows.append((f"{len(rest)} more", rest))
        characters_in = sum(book.characters_in for book in books)
        for label, rules in rows:
            count = sum(removed[rule] for rule in rules)
            table.add_row(
                label, f"{sum(lines[rule] for rule in rules):,}", f"{count:,}", f"{count / characters_in:.3%}"
            )
        self.console.print(table)
