"""Encoded rows as training reads them, made of a list in memory, and lists made of them."""

from collections.abc import Sequence

import datasets.table
import numpy
import pyarrow

from dataset.encoded_rows import SCHEMA, EncodedRows, EncodedTable
from dataset.sources import RowSource
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow


def as_rows(rows: Sequence[EncodedRow]) -> EncodedRows:
    """Each of `rows`, in order, with its source as its origin."""
    fields = [
        {
            "row": number, "file": 0, "place": row.source, "input_ids": row.input_ids, "labels": row.labels,
            "loss_weights": row.loss_weights,
            "trained": len(row.labels) - row.labels.count(IGNORE_INDEX), "tokens_in": len(row.input_ids), "dropped": 0,
            "answers": 1, "thoughts": 0, "notes": [], "worded": False,
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip
    table = EncodedTable([datasets.table.InMemoryTable(pyarrow.Table.from_pylist(fields, schema=SCHEMA))])
    return EncodedRows(table, table.parts(numpy.arange(len(rows))), [RowSource("rows", "rows", ("",))])


def as_list(rows: EncodedRows) -> list[EncodedRow]:
    """Tokens, labels and weights of each row, in order."""
    return [EncodedRow(**{name: values.tolist() for name, values in rows[index].items()}) for index in range(len(rows))]
