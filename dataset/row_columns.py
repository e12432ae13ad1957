"""Rows whose fields, and roles of turns, have other names: what `--columns` and a dataset_info.json say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dataset.records import Record, load_json
from novelgpt.settings.errors import UserError
from novelgpt.text.dataset_info import ROLES_OF_TAGS, Description

# Fields that make a shape together; the readers take a row for the first of the shapes that it has.
_SHAPES = (
    {"messages"}, {"conversations"}, {"instruction", "input", "output"}, {"prompt", "completion"},
    {"prompt", "response"}, {"query", "response"}, {"title", "abstract"}, {"text_prompt", "text_completion"},
)  # fmt: skip
_OF_SHAPES = frozenset(name for shape in _SHAPES for name in shape)
STANDARD_FIELDS = (
    *dict.fromkeys(name for shape in _SHAPES for name in sorted(shape)), "chosen", "rejected", "system", "history",
    "tools", "id", "task", "loss", "weight", "reasoning_content", "enable_thinking",
)  # fmt: skip
# The readers' fields for the columns of rows that dataset_info.json calls alpaca.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}


@dataclass(frozen=True)
class RowColumns:
    """The names that a source's rows have for what the readers look for.

    Attributes:
        names: (standard field, field of the rows) of each that may have another name.
        said_by: what says so, for errors.
        left_out: fields of the rows that are not read; None for all but `names`.
        tags: (tag, name) of the keys and roles of turns, as dataset_info.json has them; none where turns are read as
            they are.
    """

    names: tuple[tuple[str, str], ...]
    said_by: str
    left_out: frozenset[str] | None = None
    tags: tuple[tuple[str, str], ...] = ()

    def said(self) -> dict[str, Any]:
        """What decides the rows, as JSON."""
        return {"names": dict(self.names), "only": self.left_out is None, "tags": dict(self.tags)}

    def record(self, fields: Record, where: str) -> Record:
        """The row under the standard names.

        Raises:
            UserError: the row has none of the fields that a data set is described with, or a turn's role has no tag.
        """
        named = {standard: fields[own] for standard, own in self.names if own in fields}
        if self.left_out is not None:
            others = {name: value for name, value in fields.items() if name not in self.left_out} if named else fields
            return others | named
        if not named:
            wanted = ", ".join(own for _, own in self.names)
            raise UserError(f"{where}: the row has none of the fields that {self.said_by} names: {wanted}",
                            f"correct its columns: the row has {', '.join(map(str, fields)) or 'nothing'}")  # fmt: skip
        if self.tags and "messages" in named:
            column = dict(self.names)["messages"]
            named["messages"] = _read_tags(named["messages"], dict(self.tags), f"{where}: field {column}")
        return named


def read_columns(columns: Mapping[str, str] | None) -> RowColumns | None:
    """What `--columns` says; None where it says nothing.

    Args:
        columns: standard field -> field of the rows.

    Raises:
        UserError: a field that is not a standard one, or several that make no shape.
    """
    if not columns:
        return None
    columns = {str(name): str(own) for name, own in columns.items()}  # YAML may hold numbers
    unknown = next((name for name in columns if name not in STANDARD_FIELDS), None)
    if unknown is not None:
        known = ", ".join(STANDARD_FIELDS)
        raise UserError(f"--columns: {unknown} is not a field that is read", f"write FIELD=YOURS, with one of {known}")
    left_out = frozenset({*columns.values(), *(_OF_SHAPES - _fields_beside(columns))})
    return RowColumns(tuple(columns.items()), "--columns", left_out)


def describe_columns(described: Description) -> RowColumns:
    """What a dataset_info.json says of the rows of a data set."""
    columns, tags = described.columns_read(), described.tags_read()
    names = {_ALPACA.get(name, name): own for name, own in columns.items()}
    if described.formatting != "alpaca":
        turns = "messages" if tags else "conversations"
        names = {turns if name == "messages" else name: own for name, own in columns.items()}
    return RowColumns(tuple(names.items()), described.where, None, tuple(tags.items()))


def _fields_beside(columns: Iterable[str]) -> set[str]:
    """The fields of the shapes that the named fields may belong to."""
    named = _OF_SHAPES.intersection(columns)
    fitting = [shape for shape in _SHAPES if named <= shape]
    if not fitting:
        shapes = ", ".join(" and ".join(sorted(shape)) for shape in _SHAPES)
        raise UserError(
            f"--columns: {', '.join(sorted(named))} belong to no row together", f"take those of one: {shapes}"
        )
    return set().union(*fitting)


def _read_tags(turns: Any, tags: Mapping[str, str], place: str) -> Any:
    """Turns with the keys `role` and `content` and the readers' roles; what is not a list of turns is left as it is."""
    turns = load_json(turns, place) if isinstance(turns, str) else turns
    if not isinstance(turns, list):
        return turns
    roles = {tags[tag]: role for tag, role in ROLES_OF_TAGS.items()}
    read = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return turns
        tag = turn.get(tags["role_tag"])
        if not isinstance(tag, str) or tag not in roles:
            raise UserError(f"{place}[{number}].{tags['role_tag']} is {tag!r}", f"use one of {', '.join(roles)}")
        others = {name: value for name, value in turn.items() if name not in (tags["role_tag"], tags["content_tag"])}
        content = {"content": turn[tags["content_tag"]]} if tags["content_tag"] in turn else {}
        read.append({**others, "role": roles[tag], **content})
    return read
