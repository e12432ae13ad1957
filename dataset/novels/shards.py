"""Text rows to shards of about one size, as Parquet or JSON lines; the same rows always give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dataset.novels.artefacts import json_line

FORMATS = ("parquet", "jsonl")
SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("text", "book", "chapter", "title", "source")])
# Rows are buffered until they fill a row group; readers hold one in memory, too.
_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 4096


class ShardWriter:
    """Files NAME-00000.parquet, NAME-00001.parquet, …; none without rows.

    Args:
        folder: to write to.
        name: "train" or "held_out".
        kind: one of FORMATS.
        shard_bytes: of UTF-8 text; a file ends with the row that reaches it.
    """

    def __init__(self, folder: Path, name: str, kind: str, shard_bytes: int) -> None:
        self.folder, self.name, self.kind, self.shard_bytes = folder, name, kind, shard_bytes
        self.rows_of: dict[str, int] = {}
        self._file: Any = None
        self._rows: list[dict[str, Any]] = []
        self._bytes = self._group_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append a text row."""
        if self._file is None:
            path = self.folder / f"{self.name}-{len(self.rows_of):05d}.{self.kind}"
            self._file = (
                pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd")
                if self.kind == "parquet"
                else path.open("w", encoding="utf-8", newline="\n")
            )
            self.rows_of[path.name] = 0
        self._rows.append(row)
        self.rows_of[next(reversed(self.rows_of))] += 1
        size = len(row["text"].encode())
        self._bytes += size
        self._group_bytes += size
        if self._group_bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._write_group()
        if self._bytes >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the file that is open."""
        if self._file is not None:
            self._write_group()
            self._file.close()
            self._file, self._bytes = None, 0

    def _write_group(self) -> None:
        if self.kind != "parquet":
            self._file.writelines(json_line({name: row[name] for name in SCHEMA.names}) for row in self._rows)
        elif self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=SCHEMA), row_group_size=len(self._rows))
        self._rows, self._group_bytes = [], 0
