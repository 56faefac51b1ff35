"""Turn dataclasses into plain data, and back, also where nobody has vouched for it."""

from __future__ import annotations

__all__ = ["PlainData", "read_dataclass"]

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from typing_extensions import Self

from lightning_woodfisher.base.errors import ConfigurationError

T = TypeVar("T")
# Larger numbers could not have been counted.
_LARGEST = 2**63
_NAMES = {int: "a count below 2**63", float: "a number below 2**63", str: "a string"}


class PlainData:
    """A dataclass that is saved as plain data."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON and checkpoints.

        Returns:
            Nested dicts, lists, numbers, strings and None.
        """
        fields: Any = self
        plain: dict[str, Any] = _with_lists(dataclasses.asdict(fields))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Rebuild an object.

        Args:
            plain: result of :meth:`to_dict`, also after a round trip through JSON, or of an
                older version with fewer fields; other data raises a ConfigurationError.

        Returns:
            An equal object.
        """
        return read_dataclass(cls, plain)


def _with_lists(value: Any) -> Any:
    """Convert all tuples inside mappings and sequences to lists."""
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    return [*map(_with_lists, value)] if isinstance(value, list | tuple) else value


def read_dataclass(cls: type[T], plain: object, where: str = "") -> T:
    """Rebuild a dataclass from the result of ``dataclasses.asdict``.

    Args:
        cls: dataclass whose fields are integers, numbers, strings, tuples of one type,
            mappings from strings or integers, dataclasses, or any of these or None.
        plain: its fields by name, with lists or tuples; fields with a default may be missing.
        where: name of the object, for the error.

    Returns:
        The object.

    Raises:
        ConfigurationError: for a missing or unknown field, or a value of another type.
    """
    if not isinstance(plain, Mapping):
        raise ConfigurationError(_explain(where, plain, "a dictionary"))
    hints = typing.get_type_hints(cls)
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = {field.name for field in fields}
    unknown = [name for name in plain if name not in names]
    required = [
        field.name
        for field in fields
        if dataclasses.MISSING is field.default is field.default_factory
    ]
    missing = [name for name in required if name not in plain]
    if unknown or missing:
        fault = "does not have" if missing else "has an unknown field"
        raise ConfigurationError(
            f"{where or cls.__name__} {fault} {reprlib.repr([*missing, *unknown][0])}."
        )
    return cls(
        **{name: _read(hints[name], value, name) for name, value in plain.items()}
    )


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        return _read(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise ConfigurationError(_explain(where, value, "a list"))
        return tuple(_read(arguments[0], each, where) for each in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigurationError(_explain(where, value, "a dictionary"))
        key, item = arguments
        read = {}
        for k, v in value.items():
            # JSON writes the keys of an object as text.
            number = int(k) if key is int and str(k).isdecimal() else k
            read[_read(key, number, where)] = _read(
                item, v, f"{where}[{reprlib.repr(k)}]"
            )
        return read
    if dataclasses.is_dataclass(kind):
        return read_dataclass(kind, value, where)  # type: ignore[arg-type]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and isinstance(value, float):
        return value
    if kind is float and is_integer and abs(value) < _LARGEST:
        return float(value)
    if kind is int and is_integer and 0 <= value < _LARGEST:
        return value
    if kind is str and isinstance(value, str):
        return value
    raise ConfigurationError(_explain(where, value, _NAMES[kind]))


def _explain(where: str, value: object, expected: str) -> str:
    # Short, also for deeply nested lists and numbers of many digits.
    is_huge = isinstance(value, int) and abs(value) >= _LARGEST
    shown = "huge" if is_huge else reprlib.repr(value)
    return f"{where or 'the data'} is {shown}, not {expected}."
