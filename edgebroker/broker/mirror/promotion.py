"""A mirror becomes the origin: when the node that wrote its topics is lost.

    the pipe ends -> what came is stored -> the node remembers its new level -> every mirrored log gets this node as its
    origin, and a new epoch from its end on

Who has more of the old origin's records than this node had cuts them off, the old origin itself included: started again
at a lower level, below this node, it steps down. Done again after a crash, it goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import replace

from edgebroker.common.errors import Code
from edgebroker.common.scheduler import Scheduler
from edgebroker.pipe.follower import LEVELS
from edgebroker.storage.engine import Log, MirrorEngine
from edgebroker.storage.identity import Identity, begin_history

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.05
Done = Callable[[Code, str], None]


def promote(
    engine: MirrorEngine, scheduler: Scheduler, level: str, end_pipe: Callable[[], None], promoted: Done
) -> None:
    """Make this node the origin of everything that it mirrors; on the loop. `end_pipe` lets the parent go."""
    if level not in LEVELS or LEVELS.index(level) > LEVELS.index(engine.level):
        promoted(Code.INVALID_BATCH, f"a {engine.level} node is promoted to a level above, not to {level!r}")
        return
    end_pipe()

    def wait() -> None:
        """Until everything that came is stored: where a log ends is where its new history begins."""
        busy = [one.name for one in engine.logs() if one.staged_end != one.durable_end or one.rewriting]
        if busy:
            scheduler.call_later(WAIT_SECONDS, wait)
        else:
            engine.change_level(level, True, stored)

    def stored(code: Code, message: str) -> None:
        if code is Code.OK:
            log.warning("this node is the origin of what it mirrored from now on, at level %s", level)
            topics(list(engine.topics()))
        else:
            promoted(code, message)

    def topics(left: list[str]) -> None:
        while left and not any(one.identity.origin != engine.node_uid for one in engine.partitions(left[-1])):
            left.pop()
        if not left:
            promoted(Code.OK, "")
            return

        def changed(code: Code, message: str) -> None:
            if code is not Code.OK:
                promoted(code, message)
                return
            left.pop()
            topics(left)

        engine.change_identities(left[-1], [_taking_over(engine, one) for one in engine.partitions(left[-1])], changed)

    wait()


def _taking_over(engine: MirrorEngine, partition: Log) -> Callable[[Identity], Identity]:
    end = partition.durable_end

    def change(old: Identity) -> Identity:
        if old.origin == engine.node_uid:
            return old
        return replace(begin_history(old, end), origin=engine.node_uid)

    return change
