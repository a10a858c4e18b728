"""Which fields of a value become which columns of a view.

A view has the columns of its type, a msgspec struct or a dataclass: numbers, texts and bytes as SQLite stores them,
dates, decimals and UUIDs as their text, everything else as JSON. Programs in any language read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

# What the views say of each row themselves.
RESERVED = ("key", "_partition", "_offset", "_timestamp")
_NATIVE: dict[type[inspect.Type], str] = {
    inspect.IntType: "INTEGER",
    inspect.BoolType: "INTEGER",
    inspect.FloatType: "REAL",
    inspect.StrType: "TEXT",
    inspect.BytesType: "BLOB",
}
_AS_TEXT = (
    inspect.DecimalType, inspect.UUIDType, inspect.DateTimeType, inspect.DateType, inspect.TimeType, inspect.EnumType,
    inspect.LiteralType,
)  # fmt: skip


class Column(NamedTuple):
    """`sql` is the type that SQLite is told; `convert` makes of a field what it stores, None: the field as it is.
    `json` is its name in JSON, `restore` makes of what is stored what msgspec encodes as the field."""

    name: str
    sql: str
    convert: Callable[[Any], object] | None
    restore: Callable[[Any], object] | None
    json: str


class Columns:
    """Of one type. `indexes` are lists of columns that readers look for. Raises TypeError, with what to do, for a type
    that has no fields or a name that is taken, and for an index over what is no column."""

    def __init__(self, kind: type, indexes: Sequence[tuple[str, ...]] = ()) -> None:
        try:
            info = inspect.type_info(kind)
        except TypeError as error:
            raise TypeError(f"{kind.__name__} cannot be decoded from JSON: {error}") from None
        if not isinstance(info, inspect.StructType | inspect.DataclassType):
            name = getattr(kind, "__name__", kind)
            raise TypeError(f"{name} has no fields to become columns; use a msgspec.Struct or a dataclass")
        taken = [field.name for field in info.fields if field.name.lower() in RESERVED]
        if taken:
            raise TypeError(f"{kind.__name__}.{taken[0]}: every view has a column of this name; rename the field")
        names = [field.name.lower() for field in info.fields]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise TypeError(f"{kind.__name__}: SQL cannot tell {twice[0]} from its other spelling; rename one of them")
        self.kind: Any = kind
        self.indexes = tuple(indexes)
        unknown = [name for index in indexes for name in index if name.lower() not in names]
        if unknown:
            raise TypeError(f"an index over {unknown[0]}: the columns are {', '.join(names)}")
        self.columns = [_column(field.name, field.type)._replace(json=field.encode_name) for field in info.fields]
        names = [column.name for column in self.columns]
        self._fields: Callable[[Any], tuple[Any, ...]] = attrgetter(*names) if len(names) > 1 else _single(names)
        self._converted = [(place, column.convert) for place, column in enumerate(self.columns) if column.convert]
        # The columns of a value.
        self.row: Callable[[Any], tuple[Any, ...]] = self._convert if self._converted else self._fields
        if any(default is msgspec.UNSET for default in getattr(kind, "__struct_defaults__", ())):
            self.row = self._without_unset
        self._names = [column.json for column in self.columns]
        self._restored = [(column.json, column.restore) for column in self.columns if column.restore]

    @property
    def declared(self) -> str:
        """Names and types, as SQL declares them: what a table that has other ones was not made for."""
        return ", ".join(f"{column.name} {column.sql}" for column in self.columns)

    @property
    def selected(self) -> str:
        """What a view has of each row, in order: as SQL selects it."""
        names = "".join(f'"{column.name}", ' for column in self.columns)
        return f"key, {names}_partition, _offset, _timestamp"

    def value(self, row: Sequence[Any]) -> Any:
        """The value of columns, to be encoded as JSON."""
        value = dict(zip(self._names, row, strict=True))
        for name, restore in self._restored:
            if value[name] is not None:
                value[name] = restore(value[name])
        return value

    def _without_unset(self, value: object) -> tuple[Any, ...]:
        fields = [None if one is msgspec.UNSET else one for one in self._fields(value)]
        for place, convert in self._converted:
            if fields[place] is not None:
                fields[place] = convert(fields[place])
        return tuple(fields)

    def _convert(self, value: object) -> tuple[Any, ...]:
        changed = list(self._fields(value))
        for place, convert in self._converted:
            if changed[place] is not None:
                changed[place] = convert(changed[place])
        return tuple(changed)


def _single(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if not names:
        return lambda value: ()
    get = attrgetter(names[0])
    return lambda value: (get(value),)


def _column(name: str, kind: inspect.Type) -> Column:
    if isinstance(kind, inspect.UnionType):
        others = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
        if len(others) == 1:
            return _column(name, others[0])
    if isinstance(kind, inspect.Metadata):
        return _column(name, kind.type)
    if isinstance(kind, inspect.CustomType):
        raise TypeError(f"field {name}: {kind.cls.__name__} cannot be decoded from JSON; use a type that can")
    sql = _NATIVE.get(type(kind))
    if sql is not None:
        return Column(name, sql, None, bool if isinstance(kind, inspect.BoolType) else None, name)
    if isinstance(kind, _AS_TEXT):
        return Column(name, _type_of(kind), msgspec.to_builtins, None, name)
    return Column(name, "TEXT", _as_json, _raw, name)


def _type_of(kind: inspect.Type) -> str:
    """Of what is one of a few values: numbers stay numbers."""
    values: list[Any] = []
    if isinstance(kind, inspect.LiteralType):
        values = list(kind.values)
    elif isinstance(kind, inspect.EnumType):
        values = [msgspec.to_builtins(one) for one in kind.cls]
    return "INTEGER" if values and all(type(value) is int for value in values) else "TEXT"


def _as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())
