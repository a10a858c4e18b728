"""children.snap: what the children of this node last asked for.

It holds early retention back for a child that has not come back yet, and certifies what a child had: a log that ends
before that has lost its end. JSON and checksum, as offsets.snap; replaced by the metadata thread. An older state is
harmless: positions only grow, so it holds back more and certifies less.
"""

from pathlib import Path

import msgspec

from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.storage.types import REMEMBER_SECONDS, ChildPosition, Children


class _ChildrenFile(msgspec.Struct):
    children: list[tuple[str, str, int, ChildPosition]]


def write_children(path: Path, children: Children, now: float) -> None:
    """Durable when this returns. Raises OSError."""
    lines = [
        (uid, *key, ChildPosition(one.log_id, one.epoch, one.offset, round(max(0.0, now - one.seen), 3), one.name))
        for key, positions in children.items()
        for uid, one in positions.items()
        if now - one.seen < REMEMBER_SECONDS
    ]
    write_checked(path, _ChildrenFile(lines))


def read_children(path: Path, now: float) -> dict[tuple[str, int], dict[str, ChildPosition]]:
    """What was written, or nothing when that is missing or damaged (which is logged)."""
    snapshot = read_if_whole(path, _ChildrenFile, _ChildrenFile([]))
    found: dict[tuple[str, int], dict[str, ChildPosition]] = {}
    for uid, topic, partition, one in snapshot.children:
        position = ChildPosition(one.log_id, one.epoch, one.offset, now - one.seen, one.name)
        found.setdefault((topic, partition), {})[uid] = position
    return found
