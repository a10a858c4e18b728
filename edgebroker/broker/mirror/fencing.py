"""Two origins of one log: the node that was promoted tells the ones it took over from, and they stop writing.

    promoted node   every few seconds: POST /v1/fence to its former parents, with the logs that it writes, and in which
                    epoch
    old origin      has such a log in a lower epoch: it takes no more records for it, and both say that there are two

The old origin is fenced until it is started again, below the new one; or until the promotion is undone. Meanwhile its
children are not served these logs either: they go to a candidate that has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.core import Core
from edgebroker.broker.ports import NodeInfo
from edgebroker.common import json
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.peers import Peers
from edgebroker.storage.engine import Log, MirrorEngine

log = logging.getLogger(__name__)

TICK_SECONDS, FIRST_SECONDS = 5.0, 0.2
# What one request is about: it is judged in one iteration of the loop.
MOST_LOGS = 2_000


class WrittenLog(msgspec.Struct, frozen=True, array_like=True):
    """A log that a node writes since an epoch."""

    topic: Annotated[str, Meta(max_length=255)]
    partition: Annotated[int, Meta(ge=0)]
    log_id: str
    epoch: int


class FenceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/fence: who writes these logs now. `lift`: it does not any more, its promotion is undone."""

    uid: str
    name: str
    logs: Annotated[list[WrittenLog], Meta(max_length=MOST_LOGS)]
    lift: bool = False


class Fenced(msgspec.Struct):
    """The node that answers, and the topics that it wrote until now."""

    name: str
    topics: list[str]


class Fencing:
    """Owned by the loop thread. `former` are the addresses at which the nodes above were."""

    def __init__(
        self,
        core: Core,
        engine: MirrorEngine,
        peers: Peers,
        node: Callable[[], NodeInfo],
        former: Iterable[str],
        judge_again: Callable[[Log], None],
    ) -> None:
        self._engine, self._node, self._judge_again = engine, node, judge_again
        self._peers, self._loop = peers, peers.loop
        self._publishing = core.publishing
        self._former = list(former)
        self._others: dict[str, Fenced] = {}
        self._started = self._stopped = False

    def start(self) -> None:
        """Look after the former parents from now on, while this node is promoted."""
        if self._engine.promoted and not self._started:
            self._started = True
            self._loop.call_later(FIRST_SECONDS, self._tick)

    def stop(self) -> None:
        self._stopped = True

    def undone(self) -> None:
        """The promotion is undone: who was fenced may write again."""
        self._stopped = True
        self._tell(lift=True)
        self._others.clear()

    def problems(self) -> dict[str, str]:
        if not self._others:
            return {}
        found = "; ".join(
            f"{other.name} at {address}: {', '.join(other.topics[:10])}" for address, other in self._others.items()
        )
        return {"two_origins": f"another node was the origin of what this node writes, and is running: {found}"}

    # ---- the promoted node ----

    def _tick(self) -> None:
        if self._stopped:
            return
        self._loop.call_later(TICK_SECONDS, self._tick)
        self._tell()

    def _tell(self, *, lift: bool = False) -> None:
        node = self._node()
        logs = [
            WrittenLog(one.topic, one.partition, one.identity.log_id, one.identity.epoch)
            for one in self._engine.logs()
            if one.identity.origin == self._engine.node_uid and one.identity.begun > 1
        ]
        requests = [
            FenceRequest(uid=node.uid, name=node.name, logs=logs[first : first + MOST_LOGS], lift=lift)
            for first in range(0, max(1, len(logs)), MOST_LOGS)
        ]
        for address in dict.fromkeys([*self._former, *self._engine.topology]):
            self._ask(address, requests, [])

    def _ask(self, address: str, requests: list[FenceRequest], topics: list[str]) -> None:
        """One request after the other; `topics`: what the node wrote, as it answered so far."""

        def told(status: int, answer: bytes, error: str) -> None:
            try:
                other = json.decode(answer, Fenced) if not error else None
            except msgspec.DecodeError:
                other = None
            if other is None or self._stopped:
                self._others.pop(address, None)
                return
            found = list(dict.fromkeys([*topics, *other.topics]))
            if requests[1:]:
                self._ask(address, requests[1:], found)
            elif found:
                self._others[address] = Fenced(other.name, found)
            else:
                self._others.pop(address, None)

        HttpCall(self._peers, address, "POST", "/v1/fence", msgspec.json.encode(requests[0]), told)

    # ---- the old origin ----

    def fence(self, request: FenceRequest) -> Fenced:
        """Another node writes logs of this one in a newer history: take no more records for them."""
        topics: dict[str, None] = {}
        for written in request.logs:
            found = self._engine.log(written.topic, written.partition)
            own = found is not None and found.identity.origin == self._engine.node_uid
            if found is None or not own or found.identity.log_id != written.log_id:
                continue
            if request.lift:
                if self._publishing.fenced.pop(found, None) is not None:
                    self._judge_again(found)
            elif found.identity.epoch < written.epoch:
                topics[written.topic] = None
                if found not in self._publishing.fenced:
                    log.critical(
                        "%s is written by node %s now, which was promoted: start this node below it", found.name,
                        request.name,
                    )  # fmt: skip
                    self._judge_again(found)
                self._publishing.fenced[found] = request.name
        return Fenced(self._node().name, list(topics))
