"""edgebroker: a durable message broker for every level of a retailer's tree.

`from edgebroker import Producer, Consumer, Record` is what applications need; everything else is the node itself.
"""

from typing import TYPE_CHECKING

from edgebroker.version import __version__

if TYPE_CHECKING:
    from edgebroker.client.consumer import Consumer
    from edgebroker.client.producer import Producer
    from edgebroker.common.records import Record

_HOMES = {
    "Consumer": "edgebroker.client.consumer",
    "Producer": "edgebroker.client.producer",
    "Record": "edgebroker.common.records",
}
__all__ = ["Consumer", "Producer", "Record", "__version__"]


def __getattr__(name: str) -> object:
    """Import on first use: `edgebroker version` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgebroker' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
