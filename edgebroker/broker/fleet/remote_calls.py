"""Administration of the nodes below: requests that go down the tree, and their answers, over the lines that stand.

    GET /v1/via/NODE/v1/node  ->  directive, from node to node  ->  the admin routes of NODE
                              <-  POST /v1/tree/answers, from child to parent  <-

Nothing of it is stored: what is lost with a line is not answered, and who asked is told so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec

from edgebroker.broker.ports import FROM_ABOVE
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler, Timer
from edgebroker.network.http.call import OnResponse
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import Handler, Request, Response, encoded
from edgebroker.pipe.fleet import Fleet, FleetMember, find
from edgebroker.pipe.report import MAX_ANSWER_BYTES, AdminAnswer, AdminCall, Directive

ANSWER_SECONDS = 30.0
# So many are asked, and so many answered, at a time.
MOST_ASKED, MOST_ANSWERED = 64, 8
# How often, and after what pause, a request is sent to a child that is not connected.
TRIES, RETRY_SECONDS = 20, 0.1
ANSWERS_PATH = "/v1/tree/answers"


class _Asked(NamedTuple):
    call: Call
    name: str
    timer: Timer


class RemoteCalls:
    """Owned by the loop thread. `send` passes a directive on, False when the way is cut; `up` asks the parent.
    `handler` are the admin routes of this node."""

    def __init__(
        self,
        uid: str,
        scheduler: Scheduler,
        fleet: Fleet,
        send: Callable[[Directive], bool],
        up: Callable[[str, bytes, OnResponse], bool],
    ) -> None:
        self._uid, self._scheduler, self._fleet, self._send, self._up = uid, scheduler, fleet, send, up
        self.handler: Handler | None = None
        self._asked: dict[str, _Asked] = {}
        self._answering = 0

    # ---- asking ----

    def forward(self, call: Call) -> None:
        """METHOD /v1/via/{node}/{path...}: the request, at a node below."""
        name, (path, _, query) = call.parameters["node"], call.target.partition("?")
        target = "/" + "".join(path.split("/", 4)[4:]) + (f"?{query}" if query else "")
        found = find(self._fleet.members.values(), name)
        if len(found) != 1:
            why = f"several nodes below are called {name}: use the uid" if found else f"no node {name} is known below"
            call.refuse(Outcome.CONFLICT if found else Outcome.NOT_FOUND, f"{why}; see edgebroker tree --all")
        else:
            self.ask(found[0], call, target)

    def ask(self, member: FleetMember, call: Call, target: str) -> None:
        """Answer a call with what a node below answers to its method and body at another target."""
        name = member.name
        if len(self._asked) >= MOST_ASKED:
            call.refuse(Outcome.OVERLOADED, f"{MOST_ASKED} requests to nodes below wait for their answers; try again")
            return
        asked = AdminCall(uid=member.uid, id=os.urandom(16).hex(), method=call.method, target=target, body=call.raw)
        timer = self._scheduler.call_later(ANSWER_SECONDS, lambda: self._late(asked.id))
        self._asked[asked.id] = _Asked(call, name, timer)
        self.pass_on(asked)

    def pass_on(self, asked: AdminCall, tries: int = TRIES) -> None:
        """Send a request down. A child that is not connected has a moment: between two polls it is not."""
        if self._send(asked):
            return
        if tries:
            self._scheduler.call_later(RETRY_SECONDS, partial(self.pass_on, asked, tries - 1))
        elif asked.id in self._asked:
            waiting = self._asked.pop(asked.id)
            waiting.timer.cancel()
            waiting.call.refuse(Outcome.BEHIND, f"{waiting.name} is not connected now; see edgebroker tree")
        else:
            self._reply(asked, _refusal(503, "it is not connected now; see edgebroker tree"))

    def _late(self, id: str) -> None:
        asked = self._asked.pop(id)
        asked.call.refuse(
            Outcome.BEHIND, f"{asked.name} did not answer within {ANSWER_SECONDS:g} s; whether it did it is not known"
        )

    def answered(self, call: Call) -> None:
        """POST /v1/tree/answers: an answer from below, for this node or one above."""
        answer = call.body
        assert isinstance(answer, AdminAnswer)
        asked = self._asked.pop(answer.id, None)
        if asked is not None:
            asked.timer.cancel()
            asked.call.answer(Response(answer.status, answer.body, (), answer.content_type))
            call.done(Outcome.OK, "")
        elif self._up(ANSWERS_PATH, call.raw, lambda *told: None):
            call.done(Outcome.OK, "")
        else:
            call.refuse(Outcome.NOT_FOUND, "this answer is not waited for any more")

    # ---- answering ----

    def run(self, asked: AdminCall) -> None:
        """A request from above to this node."""
        if self.handler is None:
            return

        def reply(response: Response) -> None:
            self._answering -= 1
            self._reply(asked, response)

        self._answering += 1
        if self._answering > MOST_ANSWERED:
            reply(_refusal(503, f"{MOST_ANSWERED} requests from above are being answered; try again"))
        else:
            kind = "application/json" if asked.body else ""
            self.handler(Request(asked.method, asked.target, asked.body, kind, peer=FROM_ABOVE), reply)

    def _reply(self, asked: AdminCall, response: Response) -> None:
        """Send an answer up."""
        if hasattr(response.body, "begin"):
            response = _refusal(409, "this is answered in a stream, which does not go through the tree")
        body, kind = encoded(response)
        if len(body) > MAX_ANSWER_BYTES:
            response = _refusal(409, f"the answer has {len(body)} bytes; {MAX_ANSWER_BYTES} go through the tree")
            body, kind = encoded(response)
        answer = AdminAnswer(id=asked.id, status=response.status, content_type=kind, body=body)
        self._up(ANSWERS_PATH, msgspec.json.encode(answer), lambda *told: None)


def _refusal(status: int, why: str) -> Response:
    return Response(status, {"error": why, "code": Outcome.CONFLICT.name})
