"""Read JSON and YAML files of any origin: the content is validated, or it is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from novelgpt.settings.errors import UserError

Fields = TypeVar("Fields", bound=BaseModel)
REMEDY = "fetch the file again, or correct it"
# Far above what any settings take; tokenizers and indices of shards are larger.
MAX_BYTES = 1 << 30
SHOWN = 60
SCALARS, NOT_FIELDS = ("int", "float", "str", "bool"), ("constrained-", "list[", "dict[", "function-")
# Of a YAML file, in which a few lines of references can stand for more than memory holds.
MAX_VALUES = 1_000_000


def read_object(
    path: Path, remedy: str = REMEDY, max_bytes: int = MAX_BYTES, name: str | None = None
) -> dict[str, Any]:
    """Read the mapping in a JSON file.

    Args:
        path: of the file.
        remedy: what to do where it cannot be read.
        max_bytes: larger files are refused before they are read.
        name: of the file in errors; None for its path.

    Raises:
        UserError: no file, not UTF-8, not JSON, not a mapping, or one that sets a key to two values; names
            the file, and line and column where there are any.
    """
    name = str(path) if name is None else name
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise UserError(f"{name} is not a file", remedy)
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{name} has {size} bytes, too many for what its name says", remedy)
        return parse_object(path.read_bytes(), name, remedy)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}", remedy) from error


def parse_object(content: bytes, name: str, remedy: str = REMEDY) -> dict[str, Any]:
    """Parse the mapping in JSON bytes.

    Args:
        content: bytes of the file.
        name: of the file, for errors.
        remedy: what to do where it cannot be read.

    Raises:
        UserError: as read_object.
    """
    if not content.strip():
        raise UserError(f"{name} is empty", remedy)
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        raise UserError(f"{name} starts with a byte order mark", "save it as UTF-8 without one")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_mapping)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte {error.start}: {error.reason}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}", remedy) from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a mapping, but a {type(value).__name__}", remedy)
    return value


def read_yaml(path: Path, missing: str, remedy: str) -> Any:
    """Read a YAML file in UTF-8.

    Args:
        path: of the file.
        missing: what to do where there is no such file.
        remedy: what to do where it is not YAML.

    Raises:
        UserError: it cannot be read, a key is set twice, or it expands to more than a file would hold.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}", missing) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # invalid dates are ValueErrors
        raise UserError(f"{path} is not YAML: {error}", remedy) from error
    waiting, count = [value], 0
    while waiting:
        part = waiting.pop()
        waiting += list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
        count += 1
        if count > MAX_VALUES:
            raise UserError(f"{path} expands to more than {MAX_VALUES} values", remedy)
    return value


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a repeated key is an error; PyYAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]  # type: ignore[no-untyped-call]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} is set twice in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return, no-untyped-call]


def check_fields(model: type[Fields], content: object, name: str, remedy: str = REMEDY) -> Fields:
    """Validate a parsed file: each field has its type and is within its bounds.

    Args:
        model: what is asked for.
        content: as it was parsed.
        name: of the file, for errors.
        remedy: what to do where it does not fit.

    Raises:
        UserError: names the first field that does not fit.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # Without pydantic's names for members of a union.
        place = [part for part in map(str, first["loc"]) if part not in SCALARS and not part.startswith(NOT_FIELDS)]
        value = repr(first["input"])
        value = value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
        found = f", not {value}" if first["type"] not in ("missing", "value_error") else ""
        message = first["msg"].removeprefix("Value error, ")
        where = f"{name}: {'.'.join(place)}" if place else name
        raise UserError(f"{where}: {message[:1].lower()}{message[1:]}{found}", remedy) from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Accept a repeated key with one value, as in some published files; two values are ambiguous."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} is set twice, to different values")
        found[key] = value
    return found
