"""The child's side of a node: its upstream, resyncs, repairs and promotion.

An engine that holds no replicas has none of it, and a root has no upstream; callers need not know.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from edgebroker.broker.core import Core
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.mirror.fencing import Fencing
from edgebroker.broker.mirror.fresh_copy import CopySettings
from edgebroker.broker.mirror.mirrors import ReaderHooks
from edgebroker.broker.mirror.promotion import promote
from edgebroker.broker.mirror.repair import Repairs
from edgebroker.broker.mirror.resync import Resyncs
from edgebroker.broker.mirror.upstream import Upstream
from edgebroker.broker.ports import NodeInfo
from edgebroker.common.config import Config, split_list
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.candidates import Candidates
from edgebroker.pipe.report import Directive
from edgebroker.storage.engine import Log

log = logging.getLogger(__name__)

# So long a node may look for its first parent without being degraded.
FIRST_ATTEMPT_SECONDS = 10.0

DeleteTopic = Callable[[str, int, int, Done], None]


class Mirroring:
    """Owned by the loop thread. `delete` ends a topic that its origin has deleted; `directed` gets the directives from
    above. `upstream` is None at a node without a parent, and after a promotion; `resyncs` and `repairs` are None where
    the engine holds no replicas."""

    def __init__(
        self,
        core: Core,
        peers: Peers,
        clock: Clock,
        config: Config,
        downstream: Downstream,
        delete: DeleteTopic,
        directed: Callable[[list[Directive]], None],
    ) -> None:
        self._core, self._loop, self._config, self._downstream = core, peers.loop, config, downstream
        self.engine = core.engine.mirrors
        self.upstream: Upstream | None = None
        self.resyncs: Resyncs | None = None
        self.repairs: Repairs | None = None
        self.fencing: Fencing | None = None
        self._started_at = 0.0
        self._parent_dropped: Callable[[], None] = lambda: None
        self._promoted: Callable[[], None] = lambda: None
        if self.engine is None:
            return
        follows = bool(config.pipe.parents or config.pipe.registry)
        if follows and self.engine.promoted:
            log.warning(
                "promoted to %s: pipe.parents, pipe.registry and node.level are not followed (see edgebroker promote "
                "--undo)",
                self.engine.level,
            )
        elif follows:
            rebase = core.rebase
            self.upstream = Upstream(
                self.engine,
                peers,
                core.metrics,
                self.node(),
                Candidates(split_list(config.pipe.parents), random.uniform),
                split_list(config.pipe.topics),
                config.pipe.bytes_per_second,
                config.pipe.hours,
                ReaderHooks(rebase.truncating, rebase.truncated, rebase.recreated, delete),
                directed,
            )
        core.publishing.name_of = self._name_of
        self.resyncs = Resyncs(core, self.engine, peers, clock, self._copy_settings(), lambda: self.upstream)
        former = [*split_list(config.pipe.parents), *split_list(config.pipe.registry)]
        self.fencing = Fencing(core, self.engine, peers, self.node, former, downstream.judge_again)
        downstream.fenced = core.publishing.fenced
        self.repairs = Repairs(core, self.engine, peers, lambda: self.parent_address)

    # ---- life ----

    def start(self) -> None:
        """Continue what was under way, and connect to the parent."""
        self._started_at = self._loop.now()
        if self.resyncs is not None:
            self.resyncs.start()
        if self.fencing is not None:
            self.fencing.start()
        if self.upstream is not None and self.repairs is not None:
            self.upstream.start()
            self.repairs.start()

    def stop(self) -> None:
        """Nothing more is begun; `idle` tells when nothing is open."""
        if self.resyncs is not None:
            self.resyncs.stop()
        if self.fencing is not None:
            self.fencing.stop()
        if self.upstream is not None:
            self.upstream.stop()

    def on_identity(self) -> None:
        """This node has a certificate, or another one: a parent that was reached without is reached again."""
        if self.upstream is not None and not self.upstream.identity:
            self.upstream.at_once("this node belongs to a fleet now")

    def shut_out(self, refused: Callable[[str], bool]) -> None:
        """Some nodes are not let in any more: the parent, perhaps."""
        if self.upstream is not None and refused(self.upstream.identity):
            self.upstream.again("the parent was revoked")

    def known_addresses(self) -> list[str]:
        """Where nodes above may be, each address once."""
        pipe, candidates = self._config.pipe, self.upstream.candidates.addresses if self.upstream is not None else []
        told = self.engine.topology if self.engine is not None else []
        return list(dict.fromkeys([*split_list(pipe.parents), *split_list(pipe.registry), *candidates, *told]))

    @property
    def idle(self) -> bool:
        """No copy of a topic is open."""
        return self.resyncs is None or self.resyncs.idle

    def reconfigure(self, config: Config) -> None:
        """Take over what may change while the node runs."""
        self._config = config
        if self.upstream is not None:
            self.upstream.limit(config.pipe.bytes_per_second, config.pipe.hours)
        if self.resyncs is not None:
            self.resyncs.settings = self._copy_settings()  # for those that begin from now on

    def _copy_settings(self) -> CopySettings:
        node, pipe = self._config.node, self._config.pipe
        return CopySettings(self._core.engine.node_uid, node.name, node.level, pipe.bytes_per_second)

    # ---- what others ask ----

    @property
    def level(self) -> str:
        """The node's level in the tree: configured, or the one it was promoted to."""
        return self.engine.level if self.engine is not None else self._config.node.level

    def node(self) -> NodeInfo:
        """This node, for its neighbours."""
        return NodeInfo(self._core.engine.node_uid, self._config.node.name, self.level)

    @property
    def path(self) -> list[str]:
        """The uids of the nodes above, the nearest first."""
        return self.upstream.path if self.upstream is not None else []

    @property
    def parent_address(self) -> str:
        """Where the parent is, "" while none is connected."""
        upstream = self.upstream
        return upstream.address if upstream is not None and upstream.connected else ""

    def _name_of(self, uid: str) -> str:
        """A node above, as far as it is known how to find it."""
        upstream = self.upstream
        if upstream is None or not upstream.parent_name:
            return f"node {uid}"
        parent = f"{upstream.parent_name} at {upstream.address}"
        return parent if upstream.path[:1] == [uid] else f"node {uid}, above the parent of this node ({parent})"

    @property
    def missing_parent(self) -> str:
        """Why the parent is not connected; "" when it is, when there is none, and while the first attempt runs."""
        upstream = self.upstream
        if upstream is None or upstream.connected:
            return ""
        if upstream.last_error or upstream.candidates.current:
            return upstream.last_error
        late = self._loop.now() - self._started_at > FIRST_ATTEMPT_SECONDS
        return f"no parent is known; {self._config.pipe.registry} names none" if late else ""

    def problems(self) -> dict[str, str]:
        """What is wrong, by name, for an operator."""
        found = self.upstream.problems() if self.upstream is not None else {}
        for part in (self.resyncs, self.fencing):
            found |= part.problems() if part is not None else {}
        return found

    def on_durable(self, log: Log) -> None:
        if self.upstream is not None:
            self.upstream.on_durable(log)

    def on_failed(self, log: Log) -> None:
        if self.upstream is not None:
            self.upstream.on_failed(log)

    # ---- what operators ask for ----

    def accept(self, topic: str, done: Done) -> None:
        """Take the parent's log in the place of the one that it replaced."""
        if self.upstream is None:
            done(Outcome.NOT_FOUND, f"there is nothing to accept about topic {topic} on this node")
        else:
            self.upstream.accept(topic, done)

    def topic_deleted(self, topic: str) -> None:
        """Nothing here is in the way of the parent's topic of that name any more: it is taken."""
        if self.upstream is not None:
            self.upstream.free(topic)

    def look_at(self, address: str) -> None:
        """A node says that it was promoted."""
        if self.upstream is not None:
            self.upstream.look_at(address)

    def carries(self, topic: str) -> bool:
        """Would the parent send a topic again that is deleted here?"""
        return self.upstream is not None and self.upstream.carries(topic)

    def on_promoted(self, parent_dropped: Callable[[], None], promoted: Callable[[], None]) -> None:
        """Called when the parent is not followed any more, and when this node writes what it mirrored."""
        self._parent_dropped, self._promoted = parent_dropped, promoted

    def promote(self, level: str, done: Done) -> None:
        """Make this node the origin of everything that it mirrors; done once that is durable."""
        if self.engine is None:
            done(Outcome.UNSUPPORTED, "the memory engine holds no replicas; there is nothing to promote")
            return

        def end_pipe() -> None:
            upstream, self.upstream = self.upstream, None
            self._parent_dropped()
            if upstream is not None:
                upstream.stop()

        def promoted(outcome: Outcome, message: str) -> None:
            self._downstream.become(self.node())
            if self.fencing is not None:
                self.fencing.start()
            if outcome is Outcome.OK:
                self._promoted()
            done(outcome, message)

        promote(self.engine, self._loop, level, end_pipe, promoted)

    def demote(self, done: Done) -> None:
        """From the next start the configuration counts again."""
        if self.engine is None or not self.engine.promoted:
            done(Outcome.CONFLICT, "this node was not promoted; there is nothing to undo")
            return
        if self.fencing is not None:
            self.fencing.undone()
        self.engine.change_level(self._config.node.level, False, done)
