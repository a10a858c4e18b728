"""What a handler wants, read from the annotations of its parameters.

    def price(price: Price | None, context: Context, database: Database) -> None

The first parameter is what a record becomes: a struct or dataclass from JSON, dict, list, str, bytes or the Record
itself; `| None` takes the deletions of a table as well, and `list[...]` a batch. The others are named by their types.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from edgebroker.common.records import Record

Decode = Callable[[Record], Any]


class Signature(NamedTuple):
    """`decode` makes of a record what the first parameter is given; it raises for a value that is not as expected.
    `deletions`: records without a value are handed over, as None (as themselves, if records are). `batch`: a list of
    them is. `others`: the types of the further parameters, in order."""

    decode: Decode
    deletions: bool
    batch: bool
    others: tuple[type, ...]


def read_signature(function: Callable[..., Any], known: Mapping[type, str]) -> Signature:
    """The signature of a handler; `known` are the types that further parameters may have, and what they are for.
    Raises TypeError with what to write instead."""
    parameters = parameters_of(function)
    if any(one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters):
        raise TypeError("a handler has plain parameters only, without *, ** and keyword-only ones")
    if not parameters:
        raise TypeError("a handler takes at least one parameter, for the record: def handle(price: Price)")
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise TypeError(f"an annotation cannot be resolved: {error}") from None
    first, *rest = parameters
    if first.name not in hints:
        raise TypeError(f"parameter {first.name} needs an annotation: what a record becomes, for example dict or Price")
    batch, kind = _of_batch(hints[first.name])
    deletions, kind = _of_union(kind)
    others: list[type] = []
    for parameter in rest:
        wanted = hints.get(parameter.name)
        if wanted is None or wanted not in known:
            choices = ", ".join(f"{one.__name__} ({why})" for one, why in known.items())
            raise TypeError(f"parameter {parameter.name} has to be one of {choices}")
        others.append(wanted)
    return Signature(_decoder(kind), deletions or kind is Record, batch, tuple(others))


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function; of a method, which is known by its name while its class is made, without self."""
    parameters = list(inspect.signature(function).parameters.values())
    return parameters[1:] if "." in function.__qualname__.rpartition("<locals>.")[2] else parameters


def _of_batch(kind: Any) -> tuple[bool, Any]:
    if get_origin(kind) is list and get_args(kind):
        return True, get_args(kind)[0]
    return False, kind


def _of_union(kind: Any) -> tuple[bool, Any]:
    if get_origin(kind) in (Union, types.UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        if len(others) == 1 and len(others) < len(get_args(kind)):
            return True, others[0]
    return False, kind


def whole_record(record: Record) -> Any:
    """The decoder of handlers that get the record itself, also one without a value."""
    return record


def _decoder(kind: Any) -> Decode:
    """Of a record that has a value."""
    if kind is Record:
        return whole_record
    if kind is bytes:
        return lambda record: record.value
    if kind is str:
        return lambda record: str(record.value, "utf-8")  # type: ignore[arg-type]
    plain = kind is Any or kind in (dict, list) or get_origin(kind) in (dict, list)
    if not (plain or dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, msgspec.Struct))):
        raise TypeError(
            f"{getattr(kind, '__name__', kind)} cannot be made of a record; use a msgspec.Struct, a dataclass, dict, "
            "list, str, bytes or Record"
        )
    decode = msgspec.json.Decoder(kind).decode
    return lambda record: decode(record.value)  # type: ignore[arg-type]
