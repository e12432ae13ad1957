"""Rows to evaluate on, of a tool that may hold out none, here, where some always are."""

from __future__ import annotations

from collections.abc import Sequence

from cli.convert_config.conversion import Conversion
from cli.convert_config.rows import RowWriter

# Shares of which those from 1 on are numbers of rows.
_OR_ROWS = ("val_size", "test_split_size")
# Of any number of rows, one.
ONE_ROW = 1e-6


def hold_out(conversion: Conversion, writer: RowWriter, valid: Sequence[str], files_key: str, share_key: str) -> None:
    """Set what is evaluated on, and that all of it is.

    Args:
        conversion: that is filled.
        writer: which knows the numbers of rows.
        valid: files of rows to evaluate on.
        files_key: the peer's name for them.
        share_key: its name for a share, or a number, of the rows to train on.

    Raises:
        UserError: the share leaves no row to train on.
    """
    conversion.set("max_eval_share", 0, why=f"{conversion.tool} evaluates on all rows")
    if valid:
        conversion.set("valid_files", list(valid), files_key)
        return
    share = conversion.value(share_key) or 0
    train = conversion.settings["train_files"].value
    rows = sum(writer.rows[path] for path in train)
    if share < 0 or share >= (max(rows, 1) if share_key in _OR_ROWS else 1):
        raise conversion.refuse(share_key, f"there are {rows} rows to train on", "hold out some of them")
    if share >= 1:
        conversion.set("valid_fraction", round((share - 0.5) / rows, 9), share_key, why=f"of {rows} rows")
    elif share:
        conversion.set("valid_fraction", share, share_key)
    else:
        conversion.set("valid_fraction", ONE_ROW, why=f"{conversion.tool} holds out nothing")
        what = "block" if conversion.pipeline == "pretrain" else "row"
        text = f"one {what} is held out, as every run is evaluated at its end; valid_files names others"
        conversion.note(share_key, "differs", text)
