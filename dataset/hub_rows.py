"""Rows of data sets on hubs, by `datasets.load_dataset`: from its Arrow files, a few in memory at once."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataset.records import RawRow, without_nulls
from novelgpt.settings.errors import UserError
from novelgpt.text.hub_data import HubData, fetch_from_modelscope, version_of

if TYPE_CHECKING:
    from datasets import Dataset

# Rows that are taken out of the files at a time.
_BATCH = 1000


@functools.cache
def open_hub_data(data: HubData) -> Dataset:
    """The rows of a data set, mapped from the disk; what is not there yet is downloaded.

    Raises:
        UserError: what `version_of` raises, no such subset or split, files that `datasets` does not read, or code.
    """
    from datasets import Audio, Image, VerificationMode, Video, load_dataset  # not before: files need none of it

    version = version_of(data)
    place = data.repository if data.hub == "hf" else str(fetch_from_modelscope(data))
    try:
        rows = load_dataset(
            place,
            data.subset or None,
            data_dir=data.folder or None,
            split=data.split,
            revision=version if data.hub == "hf" else None,
            verification_mode=VerificationMode.NO_CHECKS,  # cards are often older than the rows
        )
    except Exception as error:  # of its readers, the HTTP client or the file system
        raise UserError(
            f"{data} cannot be read: {' '.join(str(error).split()) or type(error).__name__:.300}",
            "name the subset and the split that it has, hf://OWNER/NAME:SUBSET:SPLIT, or write its rows to a file",
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, Audio | Image | Video):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def read_hub_rows(data: HubData) -> Iterator[RawRow]:
    """The rows of a data set, in order.

    Raises:
        UserError: what `open_hub_data` raises.
    """
    number = 0
    for batch in open_hub_data(data).iter(_BATCH):
        for values in zip(*batch.values(), strict=True):
            record = dict(zip(batch, map(without_nulls, values), strict=True))
            yield RawRow(f" row {number}", json.dumps(record, ensure_ascii=False, default=str))
            number += 1
