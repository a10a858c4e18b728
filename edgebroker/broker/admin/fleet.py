"""The tree over HTTP: reports of the nodes below, the view of an operator, resyncs, and the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.fleet.pending_directives import PendingDirective
from edgebroker.broker.fleet.standby import Promoted
from edgebroker.broker.fleet.view import labels_of
from edgebroker.broker.mirror.resync import ResyncStatus
from edgebroker.common import json
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import Response
from edgebroker.pipe.report import Question, ResyncDirective

if TYPE_CHECKING:
    from edgebroker.broker.fleet.registrar import Registrar


LONGEST_SECONDS = 1e9


class ResyncRequest(ResyncDirective, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="resync"):
    """The body of POST /v1/resyncs: a directive, and for how many seconds it is sent to a node below."""

    seconds: Annotated[float, Meta(ge=0, le=30 * 86400)] = 7200.0


class ResyncList(msgspec.Struct):
    """The resyncs of this node, the newest last; and directives for nodes below without an answer yet."""

    resyncs: list[ResyncStatus]
    pending: list[PendingDirective]


class PinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of PUT /v1/registry/NODE/pins: the parents of a node, by name or uid, the best first; none: no pins."""

    parents: list[str]


class Removed(msgspec.Struct):
    """How many nodes were forgotten."""

    removed: int


class FleetAdmin:
    """Owned by the loop thread."""

    def __init__(self, context: AdminContext) -> None:
        self._tree, self._mirroring = context.tree, context.mirroring
        self._uid = context.core.engine.node_uid

    # ---- resyncs ----

    def resyncs(self, call: Call) -> None:
        found = self._mirroring.resyncs
        call.answer(ResyncList(found.describe() if found is not None else [], self._tree.pending.describe()))

    def resync(self, call: Call) -> None:
        wanted = call.body
        assert isinstance(wanted, ResyncRequest)
        fields = {name: value for name, value in msgspec.structs.asdict(wanted).items() if name != "seconds"}
        self._tree.resync(ResyncDirective(**fields), wanted.seconds, call.done)

    def abort_resync(self, call: Call) -> None:
        found, resync_id = self._mirroring.resyncs, call.parameters["id"]
        if found is None:
            call.refuse(Outcome.NOT_FOUND, f"no resync {resync_id} is under way at this node")
        else:
            found.abort(resync_id, call.done)

    # ---- the registry ----

    def ask(self, call: Call) -> None:
        """Assign parents to a node that asks, or pass the question on to the parent: a store has no route to the
        root."""
        question = call.body
        assert isinstance(question, Question)
        if not self._tree.inbox.may_report(call.identity, question.report):
            call.refuse(
                Outcome.CONFLICT, "the certificate is not for the node that asks, nor for a hub above it", "IDENTITY"
            )
            return
        if self._tree.registrar is not None:
            call.answer(self._tree.registrar.assign(question.report))
            return
        if self._uid in question.path:
            call.refuse(Outcome.CONFLICT, "cycle: this node has passed the question on already", "LEVEL")
            return
        body = msgspec.json.encode(msgspec.structs.replace(question, path=[*question.path, self._uid]))

        def answered(status: int, answer: bytes, error: str) -> None:
            if not status or not answer:
                call.refuse(Outcome.BEHIND, f"the registry cannot be asked through the parent: {error}")
                return
            try:
                call.answer(Response(status, json.decode(answer, object)))
            except msgspec.DecodeError:
                call.refuse(Outcome.BEHIND, "the answer of the registry is not understood; upgrade this node")

        if not self._tree.ask_above("/v1/registry", body, answered):
            why = "there is no registry here and no parent to ask; set registry.enabled at one node, the root"
            call.refuse(Outcome.BEHIND, why)

    def copy(self, call: Call) -> None:
        """What a standby keeps of this registry."""
        registrar = self._registrar(call)
        if registrar is not None:
            call.answer(registrar.copy)

    def standby(self, call: Call) -> None:
        call.answer(self._tree.standby.describe())

    def promoted(self, call: Call) -> None:
        """Another node was promoted: if it is a candidate, it is asked at once."""
        notice = call.body
        assert isinstance(notice, Promoted)
        self._mirroring.look_at(notice.address)
        call.done(Outcome.OK, "")

    def pin(self, call: Call) -> None:
        registrar, wanted = self._registrar(call), call.body
        assert isinstance(wanted, PinRequest)
        if registrar is not None:
            registrar.pin(call.parameters["node"], wanted.parents, call.done)

    def drain(self, call: Call) -> None:
        registrar = self._registrar(call)
        if registrar is not None:
            registrar.drain(call.parameters["node"], True, call.done)

    def undrain(self, call: Call) -> None:
        registrar = self._registrar(call)
        if registrar is not None:
            registrar.drain(call.parameters["node"], False, call.done)

    def remove(self, call: Call) -> None:
        registrar = self._registrar(call)
        if registrar is not None:
            registrar.remove(call.parameters["node"], call.done)

    def remove_silent(self, call: Call) -> None:
        """DELETE /v1/registry?silent=SECONDS: forget many nodes at once."""
        registrar = self._registrar(call)
        if registrar is None:
            return
        try:
            seconds = float(call.query["silent"][0])
        except (KeyError, ValueError):
            seconds = -1.0

        def done(removed: int, outcome: Outcome, why: str) -> None:
            if outcome is Outcome.OK:
                call.answer(Removed(removed))
            else:
                call.refuse(outcome, why)

        if 0 <= seconds < LONGEST_SECONDS:
            registrar.remove_silent(seconds, labels_of(call.query), done)
        else:
            call.refuse(Outcome.INVALID, "silent: seconds for which the nodes were silent that are to be removed")

    def _registrar(self, call: Call) -> Registrar | None:
        if self._tree.registrar is None:
            why = "the registry is not kept at this node (registry.enabled); ask the root"
            call.refuse(Outcome.CONFLICT, why)
        return self._tree.registrar
