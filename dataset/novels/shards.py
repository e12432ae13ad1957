"""Text rows into files of about one size, as parquet or JSON lines; the same rows always give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from dataset.novels.artefacts import json_line

FORMATS = ("parquet", "jsonl")
SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("text", "book", "chapter", "title", "source")])
# Rows wait in memory until they make a row group; readers hold one, too.
_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 4096


class ShardWriter:
    """Files NAME-00000.parquet, NAME-00001.parquet, …; none without rows.

    Args:
        folder: where they go.
        name: "train" or "held_out".
        kind: one of FORMATS.
        shard_bytes: of UTF-8 text; a file ends with the row that reaches it.
    """

    def __init__(self, folder: Path, name: str, kind: str, shard_bytes: int) -> None:
        self.folder, self.name, self.kind, self.shard_bytes = folder, name, kind, shard_bytes
        self.rows_of: dict[str, int] = {}
        self._file: _ParquetFile | _JsonLinesFile | None = None
        self._bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Write a text row."""
        if self._file is None:
            path = self.folder / f"{self.name}-{len(self.rows_of):05d}.{self.kind}"
            self._file = _ParquetFile(path) if self.kind == "parquet" else _JsonLinesFile(path)
            self.rows_of[path.name] = 0
        size = len(row["text"].encode())
        self._file.add(row, size)
        self.rows_of[self._file.path.name] += 1
        self._bytes += size
        if self._bytes >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """End the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file, self._bytes = None, 0


class _ParquetFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd")
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        self._waiting.append(row)
        self._bytes += size
        if self._bytes >= _GROUP_BYTES or len(self._waiting) >= _GROUP_ROWS:
            self._write_group()

    def close(self) -> None:
        if self._waiting:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        table = pyarrow.Table.from_pylist(self._waiting, schema=SCHEMA)
        self._writer.write_table(table, row_group_size=len(self._waiting))
        self._waiting, self._bytes = [], 0


class _JsonLinesFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO = path.open("w", encoding="utf-8", newline="\n")

    def add(self, row: dict[str, Any], size: int) -> None:
        self._file.write(json_line({name: row[name] for name in SCHEMA.names}))

    def close(self) -> None:
        self._file.close()
