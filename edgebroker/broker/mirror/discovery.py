"""Where this node looks for its parent: what the registry said last, and what the configuration names.

The registry's word comes down the pipe. A node that has no parent, or whose candidates all failed for a minute, asks
through the nodes that `pipe.registry` names. Its last answer is kept in meta.db: a node that starts with no line at all
knows where to look. An empty answer, and one that lacks the parent that works, change nothing, unless it is to drain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from edgebroker.common import json
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.candidates import Candidates
from edgebroker.pipe.report import ParentAssignment, Question, Report, digest
from edgebroker.storage.engine import MirrorEngine

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
LOST_SECONDS = 60.0
# The first pause between two questions, what each further one is longer, and the longest.
FIRST_PAUSE_SECONDS, GROWTH, ASK_AGAIN_SECONDS = 0.25, 1.5, 60.0


class Discovery:
    """Owned by the loop thread. `static` are the configured parents, `seeds` the nodes through which the registry is
    asked. `moved` is called when another parent is to be asked at once; `report` makes this node's report."""

    def __init__(
        self,
        engine: MirrorEngine,
        peers: Peers,
        candidates: Candidates,
        static: list[str],
        seeds: list[str],
        connected: Callable[[], bool],
        moved: Callable[[str], None],
        report: Callable[[], Report],
    ) -> None:
        self._engine, self._candidates = engine, candidates
        self._peers, self._loop = peers, peers.loop
        self._static, self._seeds = static, seeds
        self._connected, self._moved, self._report = connected, moved, report
        self._told: list[str] = []
        self._lost_since: float | None = None
        self._ask_due = 0.0
        self._asked = 0
        self._stopped = False

    @property
    def managed(self) -> bool:
        """Does the registry say who the parent is?"""
        return bool(self._seeds)

    @property
    def digest(self) -> int:
        """Of the list that the registry gave."""
        return digest(self._told)

    def start(self) -> None:
        """Begin with what was known at the last run."""
        if self.managed:
            self._told = self._engine.topology
            self._candidates.replace(self._all())
            self._tick()

    def stop(self) -> None:
        self._stopped = True

    def _all(self) -> list[str]:
        return list(dict.fromkeys([*self._told, *self._static]))

    def _tick(self) -> None:
        if self._stopped:
            return
        self._loop.call_later(TICK_SECONDS, self._tick)
        now = self._loop.now()
        if self._connected():
            self._lost_since = None
            return
        if self._lost_since is None:
            self._lost_since = now
        helpless = not self._candidates.addresses or now - self._lost_since > LOST_SECONDS
        if helpless and now >= self._ask_due:
            self._ask(now)

    def _ask(self, now: float) -> None:
        self._ask_due = now + ASK_AGAIN_SECONDS
        seed = self._seeds[self._asked % len(self._seeds)]
        self._asked += 1

        def told(status: int, answer: bytes, error: str) -> None:
            if self._stopped:
                return
            if error:
                log.info("the registry cannot be asked through %s: %s", seed, error)
                self._ask_due = self._loop.now() + self._pause()
                return
            try:
                self.assigned(json.decode(answer, ParentAssignment))
            except msgspec.DecodeError as wrong:
                log.warning("invalid assignment from %s: %s", seed, wrong)
            if self._candidates.addresses:
                self._asked = 0
            else:  # the hubs above are perhaps just being started
                self._ask_due = self._loop.now() + self._pause()

        HttpCall(self._peers, seed, "POST", "/v1/registry", msgspec.json.encode(Question(report=self._report())), told)

    def _pause(self) -> float:
        return min(ASK_AGAIN_SECONDS, FIRST_PAUSE_SECONDS * GROWTH ** min(self._asked - 1, 20))

    def assigned(self, assignment: ParentAssignment) -> None:
        """The registry's word for this node."""
        if not self.managed or assignment.uid != self._report().uid:
            return
        wanted, current = assignment.candidates, self._candidates.current
        works = self._connected() and current not in wanted and current not in self._static
        if (not wanted or works) and not assignment.drain:
            return
        if wanted != self._told:
            self._told = wanted
            self._engine.store_topology(wanted)
            log.info("the registry names the parents %s", ", ".join(wanted) or "(none)")
        other = self._candidates.replace(self._all())
        if assignment.drain:
            other = self._candidates.prefer_first() or other
        if other:
            self._moved("the registry names another one")
