"""edgebroker: a durable message broker for every level of a retailer's tree.

An application needs what `__all__` lists, documented in docs/python.md; everything else is the node itself. Nothing of
it is imported before it is used: `edgebroker version` needs none of it.
"""

from typing import TYPE_CHECKING

from edgebroker.version import __version__

if TYPE_CHECKING:
    from edgebroker.client.asynchronous import AsyncConsumer, AsyncProducer
    from edgebroker.client.consumer import Consumer
    from edgebroker.client.producer import Producer
    from edgebroker.client.publish.accumulator import Sent
    from edgebroker.client.refresh import Refresh, Staging
    from edgebroker.common.errors import (
        AnswerError,
        ArgumentError,
        Code,
        CorruptBatchError,
        EdgeBrokerError,
        GapError,
        InflatedTooLargeError,
        PositionFileError,
        ResetRequiredError,
        UnreachableError,
    )
    from edgebroker.common.records import Record
    from edgebroker.common.types import Delivery, Position, TopicPartition

_ERRORS = "edgebroker.common.errors"
_HOMES = {
    "Producer": "edgebroker.client.producer",
    "Sent": "edgebroker.client.publish.accumulator",
    "Consumer": "edgebroker.client.consumer",
    "AsyncProducer": "edgebroker.client.asynchronous",
    "AsyncConsumer": "edgebroker.client.asynchronous",
    "Record": "edgebroker.common.records",
    "Delivery": "edgebroker.common.types",
    "Position": "edgebroker.common.types",
    "TopicPartition": "edgebroker.common.types",
    "Staging": "edgebroker.client.refresh",
    "Refresh": "edgebroker.client.refresh",
    "EdgeBrokerError": _ERRORS,
    "ArgumentError": _ERRORS,
    "UnreachableError": _ERRORS,
    "AnswerError": _ERRORS,
    "Code": _ERRORS,
    "GapError": _ERRORS,
    "ResetRequiredError": _ERRORS,
    "CorruptBatchError": _ERRORS,
    "InflatedTooLargeError": _ERRORS,
    "PositionFileError": _ERRORS,
}
__all__ = [
    "Producer",
    "Sent",
    "Consumer",
    "AsyncProducer",
    "AsyncConsumer",
    "Record",
    "Delivery",
    "Position",
    "TopicPartition",
    "Staging",
    "Refresh",
    "EdgeBrokerError",
    "ArgumentError",
    "UnreachableError",
    "AnswerError",
    "Code",
    "GapError",
    "ResetRequiredError",
    "CorruptBatchError",
    "InflatedTooLargeError",
    "PositionFileError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgebroker' has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found  # looked up once
    return found


def __dir__() -> list[str]:
    return __all__
