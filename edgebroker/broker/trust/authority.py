"""Joining, over HTTP: at the node that issues certificates, and at those that pass requests on to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.newest import Newest
from edgebroker.network.http.call import OnResponse
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import Failed, Response
from edgebroker.network.io.loop import Loop
from edgebroker.trust.messages import JOIN_PATH, Certified, Chain, Issue, JoinRequest, RevokedAnswer

log = logging.getLogger(__name__)

# What is passed on to the parent at a time; how many refusals a minute one address may get before it is not asked any
# further; for how long a refusal is kept back.
MOST_PASSED, MOST_BAD, BAD_SECONDS, REFUSAL_SECONDS = 16, 10, 60.0, 1.0
MOST_ADDRESSES = 4096


class Authority:
    """Owned by the loop thread. `up` asks the parent, False when there is none; `audit` records who did what at which
    address, with what result."""

    def __init__(
        self,
        trust: NodeTrust,
        metrics: Metrics,
        loop: Loop,
        clock: Clock,
        up: Callable[[str, bytes, OnResponse], bool],
        audit: Callable[[str, str, str, str, str], None],
    ) -> None:
        self._metrics, self._audit = metrics, audit
        self._trust, self._loop, self._clock, self._up = trust, loop, clock, up
        self._passed = 0
        # How often an address was refused of late, and since when that is counted.
        self._bad = Newest[str, tuple[int, float]](MOST_ADDRESSES)

    def root(self, call: Call) -> None:
        """GET /v1/trust/root: the certificate of the fleet; who asks compares it with a token."""
        if self._trust.name is None:
            call.refuse(Outcome.NOT_FOUND, "this node does not belong to a fleet")
        else:
            call.answer(Chain(self._trust.root))

    def join(self, call: Call) -> None:
        """POST /v1/trust/join."""
        request = call.body
        assert isinstance(request, JoinRequest)
        if self._too_bad(call):
            call.refuse(Outcome.OVERLOADED, "too many requests to join were refused; try again in a minute")
        elif self._trust.directory.issues:
            self._issue(call, request)
        elif self._passed >= MOST_PASSED:
            call.refuse(Outcome.OVERLOADED, f"{MOST_PASSED} requests to join are under way; try again")
        else:
            self._pass_on(call)

    def _issue(self, call: Call, request: JoinRequest) -> None:
        def told(certified: Certified | None, error: str, code: str) -> None:
            if certified is not None:
                self._metrics.joins_issued += 1
                self._audit(request.name, call.peer, "join", certified.issued.node, "OK")
                call.answer(certified)
            elif code in ("JOIN_REFUSED", "HELD", "REVOKED"):
                log.warning("%s %s (%s) at %s: %s", request.level, request.uid, request.name, call.peer, error)
                self._audit(request.name, call.peer, "join", f"{request.level} {request.uid}: {error}", code)
                self._refuse(call, code)
            else:
                log.error("no certificate for %s: %s", request.uid, error)
                call.refuse(Outcome.OVERLOADED, "the root cannot issue a certificate now; try again")

        self._trust.helper.do(Issue(request=request, now_ms=self._clock.wall_ms()), Certified, told)

    def _refuse(self, call: Call, code: str) -> None:
        """After a moment, and without the reason: that is for the operator."""
        self._metrics.joins_refused += 1
        self._count_bad(call)
        why = {"HELD": "this node waits for approval", "REVOKED": "this node was revoked"}.get(
            code, "the fleet does not take this node: the log of its root says why"
        )
        said: Failed | RevokedAnswer = Failed(why, code)
        request = call.body
        assert isinstance(request, JoinRequest)
        signed = self._trust.topic.record(f"revoked/{request.uid}")
        if code == "REVOKED" and signed is not None:  # no node on the way can make it up
            said = RevokedAnswer(error=why, record=signed, issuer=self._trust.topic.issuer(signed.issuer))
        self._loop.call_later(REFUSAL_SECONDS, partial(call.answer, Response(403, said)))

    def _pass_on(self, call: Call) -> None:
        def told(status: int, answer: bytes, error: str) -> None:
            self._passed -= 1
            if not status:
                call.refuse(Outcome.BEHIND, f"the root cannot be asked now: {error}")
                return
            if status == 403:
                self._count_bad(call)
            call.answer(Response(status, answer, (), "application/json"))

        self._passed += 1
        if not self._up(JOIN_PATH, call.raw, told):
            self._passed -= 1
            call.refuse(Outcome.BEHIND, "the root cannot be asked now: this node has no connection to its parent")

    def _count_bad(self, call: Call) -> None:
        """Who is a node passes on what others ask: it is at the first node that they are counted."""
        peer = call.peer
        if call.identity:
            return
        count, since = self._bad.get(peer, (0, self._loop.now()))
        if self._loop.now() - since > BAD_SECONDS:
            count, since = 0, self._loop.now()
        self._bad.put(peer, (count + 1, since))

    def _too_bad(self, call: Call) -> bool:
        count, since = self._bad.get(call.peer, (0, 0.0))
        return not call.identity and count >= MOST_BAD and self._loop.now() - since <= BAD_SECONDS
