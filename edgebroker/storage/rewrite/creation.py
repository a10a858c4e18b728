"""Creating a topic: a log for each partition, durable on the commit thread before the topic is there.

Who asks for the same name meanwhile waits for the same answer. A crash on the way leaves a topic that was never
acknowledged; the next start ignores it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from edgebroker.common.outcome import Done, Outcome
from edgebroker.storage import files
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.engine import EngineListener
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.opening import Opener
from edgebroker.storage.rewrite.removal import Removal
from edgebroker.storage.rewrite.truncate import create_log
from edgebroker.storage.types import Identity

# Partitions that are made between two groups of batches: the records of others wait meanwhile.
SLICE = 16

log = logging.getLogger(__name__)


class TopicCreation:
    """Owned by the loop thread. `path` is the directory of all topics, `topics` are the store's."""

    def __init__(
        self,
        path: Path,
        topics: dict[str, list[PartitionLog]],
        opener: Opener,
        removal: Removal,
        committer: Committer,
        listener: EngineListener,
    ) -> None:
        self._path, self._topics, self._opener, self._removal = path, topics, opener, removal
        self._committer, self._listener = committer, listener
        self._waiting: dict[str, list[Done]] = {}

    def create(self, name: str, identities: Sequence[Identity], done: Done) -> None:
        """Make a partition for each identity; durable when done is called, perhaps from within."""
        refusal = self._refusal(name)
        if refusal is not None:
            done(*refusal)
            return
        if name in self._waiting:
            self._waiting[name].append(done)
            return
        self._waiting[name] = [done]

        made: list[tuple[Identity, Segment]] = []
        logs: list[PartitionLog] = []

        def work() -> list[tuple[Identity, Segment]]:
            for identity in identities[len(made) : len(made) + SLICE]:
                made.append((identity, create_log(self._path / name / str(len(made)), identity)))
            return made

        def go_on(result: object) -> None:
            if not isinstance(result, list):
                self._created(name, result)
                return
            for identity, segment in made[len(logs) :]:
                start = RecoveredLog([segment], identity.log_start, identity.chain, identity.epoch, [], 0)
                logs.append(self._opener.make_log(name, len(logs), identity, start))
            if len(logs) < len(identities):
                self._committer.call(work, go_on)
            else:
                self._created(name, logs)

        self._committer.call(work, go_on)

    def _refusal(self, name: str) -> tuple[Outcome, str] | None:
        if refusal := self._committer.refusal():
            return refusal
        if name in self._topics:
            return Outcome.NAME_CLASH, f"topic {name} exists"
        if why := self._opener.unserved.get(name):
            return Outcome.READ_ONLY, f"topic {name} is on the disk and could not be opened: {why}"
        if name in self._removal.busy:
            return Outcome.OVERLOADED, f"topic {name} is being deleted; try again in a moment"
        return None

    def _created(self, name: str, result: object) -> None:
        waiting = self._waiting.pop(name)
        if isinstance(result, list):
            self._topics[name] = result
            answer = (Outcome.OK, "")
            self._listener.on_topic(name)
        else:
            answer = files.refusal(f"topic {name} cannot be created", result)
            if answer[0] is Outcome.OVERLOADED:
                self._committer.scarce = answer[1]
            log.error("%s", answer[1])
        for done in waiting:
            done(*answer)
