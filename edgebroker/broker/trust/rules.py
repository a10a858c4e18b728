"""What nodes may do at each other's listen.pipe, by what stands in their certificates.

    join     everybody: ask for the root certificate, and to join
    health   every node of the fleet
    below    nodes that this one may be above: a level below, in its region
    hub      hubs, and nodes that may be above this one
    peer     all of these

A node without a certificate is one of a tree on loopback, or of one in development: there everybody may do everything.
"""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.network.http.router import Denial
from edgebroker.network.http.server import Request
from edgebroker.pipe.report import Report
from edgebroker.trust.node_name import NodeName, parse_node_name

HUBS = ("root", "l2", "l3")
OPEN = "join"


class NodeRules:
    """`own` tells who this node is, None while it has no certificate; `promoted` whether it took the place of a node
    above: hubs of its own level may follow it then."""

    def __init__(self, own: Callable[[], NodeName | None], promoted: Callable[[], bool] = lambda: False) -> None:
        self._own, self._promoted = own, promoted

    def refusal(self, request: Request, right: str) -> Denial | None:
        """Why a request at listen.pipe does not have a right; None when it has."""
        own = self._own()
        if own is None or right == OPEN:
            return None
        peer = parse_node_name(request.identity)
        if peer is None:
            return Denial("a certificate of the fleet is needed for this; join it: edgebroker join TOKEN")
        below = own.serves(peer) or (self._promoted() and _are_equal_hubs(own, peer))
        near = peer.level in HUBS or peer.serves(own)
        if right == "health" or (below and right in ("below", "peer")) or (near and right in ("hub", "peer")):
            return None
        return Denial(f"{_words(peer)} may not do this at {_words(own)}")

    def sender_refusal(self, identity: str, uid: str, level: str = "") -> str:
        """Why a peer may not speak as the node of this uid (and level); "" when it may."""
        peer = parse_node_name(identity)
        if self._own() is None or (peer is not None and peer.has(uid) and level in ("", peer.level)):
            return ""
        return f"the certificate is for {_words(peer) if peer is not None else 'another one'}, not for {level} {uid}"

    def may_report(self, identity: str, report: Report) -> bool:
        """May a peer pass on what this node says of itself? A hub may for nodes of its region; each for itself."""
        own, peer = self._own(), parse_node_name(identity)
        if own is None:
            return True
        if peer is None:
            return False
        said = NodeName(peer.fleet, report.level, report.region, report.uid)
        return said == peer or (peer.uid != said.uid and peer.serves(said))

    def parent_refusal(self, identity: str, uid: str) -> str:
        """Why the node at the other end of a line cannot be the parent; "" when it can."""
        own, peer = self._own(), parse_node_name(identity)
        if own is None:
            return ""
        if peer is None or not (peer.serves(own) or _are_equal_hubs(own, peer)):
            return f"{_words(peer) if peer is not None else 'it'} cannot be above {_words(own)}"
        return "" if peer.uid == uid else f"the certificate is for {_words(peer)}, and it says that it is {uid}"


def _are_equal_hubs(one: NodeName, other: NodeName) -> bool:
    """One of them may have been promoted; its level is another one then, which its certificate does not say."""
    return one.fleet == other.fleet and one.level == other.level and one.level in HUBS


def _words(name: NodeName) -> str:
    return f"a {name.level} node of region {name.region or '(all)'}"
