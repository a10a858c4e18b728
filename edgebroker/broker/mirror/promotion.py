"""A mirror becomes the origin: when the node that wrote its topics is lost.

    the pipe ends -> what came is stored -> the node remembers its new level -> every mirrored log gets this node as its
    origin, and a new epoch from its end on

A node with more of the old origin's records than this one had truncates them, the old origin itself included: started
again at a lower level, below this node, it steps down. Done again after a crash, it goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import replace

from edgebroker.common.levels import LEVELS
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage.engine import Log, MirrorEngine
from edgebroker.storage.types import Identity, begin_history

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.05


def promote(
    engine: MirrorEngine, scheduler: Scheduler, level: str, end_pipe: Callable[[], None], promoted: Done
) -> None:
    """Make this node the origin of everything that it mirrors; on the loop. `end_pipe` lets the parent go."""
    if level not in LEVELS[:-1]:
        promoted(Outcome.INVALID, f"cannot promote: {level!r} is not a level ({', '.join(LEVELS[:-1])})")
        return
    if LEVELS.index(level) > LEVELS.index(engine.level):
        promoted(Outcome.CONFLICT, f"cannot promote: {level} is below {engine.level}, the level of this node")
        return
    end_pipe()

    def wait() -> None:
        """Until everything that came is stored: where a log ends is where its new history begins."""
        busy = [one.name for one in engine.logs() if one.staged_end != one.durable_end or one.rewriting]
        if busy:
            scheduler.call_later(WAIT_SECONDS, wait)
        else:
            engine.change_level(level, True, stored)

    def stored(outcome: Outcome, message: str) -> None:
        if outcome is Outcome.OK:
            log.warning("this node is the origin of what it mirrored from now on, at level %s", level)
            topics(list(engine.topics()))
        else:
            promoted(outcome, message)

    def topics(left: list[str]) -> None:
        while left and not any(one.identity.origin != engine.node_uid for one in engine.partitions(left[-1])):
            left.pop()
        if not left:
            promoted(Outcome.OK, "")
            return

        def changed(outcome: Outcome, message: str) -> None:
            if outcome is not Outcome.OK:
                promoted(outcome, message)
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
        begun = begin_history(old, end)
        return replace(begun, origin=engine.node_uid, begun=begun.epoch)

    return change
