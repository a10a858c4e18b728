"""What other nodes have, for an operator of this one: asked over their listen.pipe, or through the tree."""

from __future__ import annotations

from edgebroker.broker.admin.context import AdminContext
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import Response
from edgebroker.pipe.fleet import find

SILENCE_SECONDS, MOST_BYTES = 30.0, 64 << 20


class PeerAdmin:
    """Owned by the loop thread. `node` in a path: the name, uid or address of a node that this one can reach."""

    def __init__(self, context: AdminContext) -> None:
        self._peers, self._tree = context.peers, context.tree

    def topics(self, call: Call) -> None:
        self._ask(call, "/v1/pipe/topics", "/v1/topics")

    def digest(self, call: Call) -> None:
        self._ask(call, "/v1/pipe/digest", "/v1/pipe/digest")

    def _ask(self, call: Call, path: str, admin_path: str) -> None:
        """Ask at the address of the node; one that has none is asked through the tree."""
        node = call.parameters["node"]
        address = self._tree.address_of(node)
        below = find(self._tree.fleet.members.values(), node)
        if not address and len(below) == 1:
            self._tree.remote.ask(below[0], call, admin_path)
            return
        if not address:
            call.refuse(
                Outcome.INVALID,
                f"{node!r} is neither the name of a node with an address for others (listen.pipe), nor HOST:PORT of "
                "one; see edgebroker tree",
            )
            return

        def told(status: int, answer: bytes, error: str) -> None:
            if not status:
                call.refuse(Outcome.BEHIND, f"{node} at {address} does not answer: {error}")
            else:
                call.answer(Response(status, answer, (), "application/json"))

        HttpCall(self._peers, address, "POST", path, call.raw, told, silence=SILENCE_SECONDS, most_bytes=MOST_BYTES)
