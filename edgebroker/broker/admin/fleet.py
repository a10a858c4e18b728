"""The tree over HTTP: reports of the nodes below, the view of an operator, and the registry (docs/protocol.md).

POST /v1/tree/reports   GET /v1/tree  /v1/tree/nodes  /v1/tree/applied
GET|POST /v1/resyncs   DELETE /v1/resyncs/ID
POST /v1/registry   PUT /v1/registry/NODE/pins   PUT|DELETE /v1/registry/NODE/drain   DELETE /v1/registry/NODE
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qs

import msgspec

from edgebroker.broker.admin.responses import report
from edgebroker.broker.fleet.registrar import PinRequest
from edgebroker.broker.fleet.tree import Tree
from edgebroker.broker.mirror.resync import Resyncs
from edgebroker.network.http.server import Reply, Request, Response
from edgebroker.pipe.report import Question, ResyncDirective


class TreeAdmin:
    """Owned by the loop thread. `uid` is this node's."""

    def __init__(self, tree: Tree, resyncs: Resyncs | None, uid: str) -> None:
        self._tree, self._resyncs, self._uid = tree, resyncs, uid

    def handle(self, request: Request, parts: list[str], reply: Reply) -> None:
        """`parts` is the path behind /v1."""
        view = self._tree.view
        query = parse_qs(request.path.partition("?")[2])
        match request.method, parts:
            case "POST", ["tree", "reports"]:
                self._tree.inbox.answer(request, reply)
            case "GET", ["tree"]:
                view.summary(query, reply)
            case "GET", ["tree", "nodes"]:
                view.nodes(query, reply)
            case "GET", ["tree", "applied"]:
                view.applied(query, reply)
            case "GET", ["resyncs"]:
                reply(Response(200, {"resyncs": self._resyncs.describe() if self._resyncs is not None else []}))
            case "POST", ["resyncs"]:
                self._reset(request, reply)
            case "DELETE", ["resyncs", resync_id] if self._resyncs is not None:
                self._resyncs.abort(resync_id, report(reply))
            case "POST", ["registry"]:
                self._ask(request, reply)
            case (("PUT" | "DELETE"), ["registry", name, *verb]):
                self._decide(request, name, verb, reply)
            case _:
                reply(Response(405, {"error": f"{request.method} is not allowed for {request.path}"}))

    def _reset(self, request: Request, reply: Reply) -> None:
        try:
            order = msgspec.json.decode(request.body, type=ResyncDirective)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        self._tree.reset(order, report(reply))

    def _ask(self, request: Request, reply: Reply) -> None:
        """Answer, or pass the question on to the parent: a store has no route to the top."""
        if self._tree.registrar is not None:
            self._tree.registrar.answer(request, reply)
            return
        try:
            question = msgspec.json.decode(request.body, type=Question)
            if self._uid in question.path:
                reply(Response(409, {"error": "the tree must not be a circle", "code": "LEVEL"}))
                return
            passed_on = msgspec.structs.replace(question, path=[*question.path, self._uid])
            body = msgspec.json.encode(passed_on)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return

        def told(status: int, answer: bytes, error: str) -> None:
            try:
                reply(Response(status or 502, msgspec.json.decode(answer) if answer else {"error": error}))
            except msgspec.DecodeError:
                reply(Response(502, {"error": "the registry's answer is not understood"}))

        if not self._tree.ask_above("/v1/registry", body, told):
            why = "there is no registry here and no parent to ask; set registry.enabled at one node, the root"
            reply(Response(503, {"error": why}))

    def _decide(self, request: Request, name: str, verb: list[str], reply: Reply) -> None:
        registrar = self._tree.registrar
        if registrar is None:
            reply(Response(409, {"error": "the registry is not kept at this node (registry.enabled); ask the root"}))
            return
        done = _report(reply)
        match request.method, verb:
            case "PUT", ["pins"]:
                try:
                    parents = msgspec.json.decode(request.body, type=PinRequest).parents
                except msgspec.DecodeError as error:
                    reply(Response(400, {"error": str(error)}))
                    return
                registrar.pin(name, parents, done)
            case (("PUT" | "DELETE"), ["drain"]):
                registrar.drain(name, request.method == "PUT", done)
            case "DELETE", []:
                registrar.remove(name, done)
            case _:
                reply(Response(405, {"error": f"{request.method} is not allowed for {request.path}"}))


def _report(reply: Reply) -> Callable[[int, str], None]:
    return lambda status, error: reply(Response(status, {"error": error} if error else {}))
