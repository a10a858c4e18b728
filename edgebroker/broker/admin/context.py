"""What the admin interface shows and acts on: the parts of a running node, as far as it needs them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from edgebroker.broker.access.access import Access
from edgebroker.broker.core import Core
from edgebroker.broker.feed.digests import Digests
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.feed.ranges import Ranges
from edgebroker.broker.fleet.tree import Tree
from edgebroker.broker.holders import Holders
from edgebroker.broker.mirror.mirroring import Mirroring
from edgebroker.broker.observe.health import Health
from edgebroker.broker.observe.lags import Lags
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.broker.topic_deletion import TopicDeletion
from edgebroker.broker.trust.authority import Authority
from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.common.config import NodeConfig
from edgebroker.common.runtime.clock import Clock
from edgebroker.network.http.peers import Peers
from edgebroker.network.io.loop import Loop


class AdminContext(msgspec.Struct, frozen=True, kw_only=True):
    """Owned by the loop thread. `problems` are the node's own, without a missing parent."""

    core: Core
    loop: Loop
    peers: Peers
    clock: Clock
    node: NodeConfig
    sessions: Sessions
    downstream: Downstream
    ranges: Ranges
    digests: Digests
    mirroring: Mirroring
    tree: Tree
    health: Health
    lags: Lags
    topic_deletion: TopicDeletion
    holders: Holders
    trust: NodeTrust
    access: Access
    authority: Authority
    problems: Callable[[], dict[str, str]]
    started_at: float
