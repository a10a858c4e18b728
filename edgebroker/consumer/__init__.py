"""The application kit: an application keeps its own copy of what it needs, and answers from it.

    from edgebroker.consumer import consumer

    class Price(msgspec.Struct):
        code: str
        cents: int

    @consumer("prices", view=Price)
    class Prices: ...

`edgebroker app run FILE` reads the topic from the nearest broker into a local database; docs/consumer.md shows how.
"""

from edgebroker.consumer.declare.declarations import (
    Context,
    Database,
    DeclarationError,
    Outbox,
    consumer,
    every,
    message_handler,
    on_ready,
    on_reset,
    on_start,
    on_stop,
    retry_policy,
)
from edgebroker.consumer.declare.routes import HttpError, Query, route

__all__ = [
    "Context",
    "Database",
    "DeclarationError",
    "HttpError",
    "Outbox",
    "Query",
    "consumer",
    "every",
    "message_handler",
    "on_ready",
    "on_reset",
    "on_start",
    "on_stop",
    "retry_policy",
    "route",
]
