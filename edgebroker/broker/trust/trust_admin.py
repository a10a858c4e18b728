"""The fleet over the admin interface: creating it, joining it, tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.broker.trust.trust_topic import TrustRecord
from edgebroker.common.errors import TrustError
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.network.http.router import Call
from edgebroker.trust.messages import (
    CreateTokens,
    FleetBook,
    ListTokens,
    RevokeToken,
    Rotate,
    SetState,
    ShowFleet,
    TokenInfo,
    TokenRequest,
)
from edgebroker.trust.token import parse_token

MOST_TOKENS = 10_000
MAX_TOKENS_BYTES = 4 << 20


class FleetRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/fleet."""

    name: Annotated[str, Meta(min_length=1, max_length=63)]


class TokenUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/join: the token with which this node shall join."""

    token: Annotated[str, Meta(max_length=200)]


class TokenRequests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/tokens."""

    tokens: Annotated[list[TokenRequest], Meta(min_length=1, max_length=MOST_TOKENS)]


class NewTokens(msgspec.Struct, frozen=True):
    """The answer: the tokens, as they were asked for. They are told once."""

    tokens: list[str]


class NodeNames(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/approve: nodes by name or uid."""

    nodes: Annotated[list[str], Meta(min_length=1, max_length=MOST_TOKENS)]


class Revocation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/revoke. `erase`: they shall erase all that they have, as soon as they hear of it."""

    nodes: Annotated[list[str], Meta(min_length=1, max_length=MOST_TOKENS)]
    erase: bool = False


class NodesChanged(msgspec.Struct, frozen=True):
    """The answer: the uids of these nodes."""

    nodes: list[str]


class Rotation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/rotate. `retire`: the issuers before are not believed any more."""

    retire: bool = False


class Rotated(msgspec.Struct, frozen=True):
    """The answer to POST /v1/trust/rotate: the number of the issuer that signs from now on."""

    issuer: int


class TokenList(msgspec.Struct, frozen=True):
    """The answer to GET /v1/trust/tokens."""

    tokens: list[TokenInfo]


class TrustAdmin:
    """Owned by the loop thread. `revoke_app_token` answers a call about the token of an application; False: none has
    this id."""

    def __init__(self, trust: NodeTrust, clock: Clock, revoke_app_token: Callable[[Call, str], bool]) -> None:
        self._trust, self._clock, self._revoke_app_token = trust, clock, revoke_app_token

    def status(self, call: Call) -> None:
        call.answer(self._trust.status())

    def fleet(self, call: Call) -> None:
        """GET /v1/trust/fleet: at the root."""

        def told(view: FleetBook | None, error: str, code: str) -> None:
            if view is None:
                call.refuse(Outcome.CONFLICT, error)
            else:
                call.answer(view)

        self._trust.helper.do(ShowFleet(), FleetBook, told)

    def create_fleet(self, call: Call) -> None:
        wanted = call.body
        assert isinstance(wanted, FleetRequest)
        self._trust.create_fleet(wanted.name, call.done)

    def join(self, call: Call) -> None:
        wanted = call.body
        assert isinstance(wanted, TokenUse)
        try:
            parse_token(wanted.token)
        except TrustError as error:
            call.refuse(Outcome.INVALID, str(error))
        else:
            self._trust.join_with(wanted.token, call.done)

    def tokens(self, call: Call) -> None:
        def told(tokens: list[TokenInfo] | None, error: str, code: str) -> None:
            if tokens is None:
                call.refuse(Outcome.CONFLICT, error)
            else:
                call.answer(TokenList(tokens))

        self._trust.helper.do(ListTokens(), list[TokenInfo], told)

    def create_tokens(self, call: Call) -> None:
        wanted = call.body
        assert isinstance(wanted, TokenRequests)

        def told(tokens: list[str] | None, error: str, code: str) -> None:
            if tokens is None:
                call.refuse(Outcome.CONFLICT, error)
            else:
                call.answer(NewTokens(tokens), 201)

        self._trust.helper.do(CreateTokens(wanted=wanted.tokens), list[str], told)

    def revoke(self, call: Call) -> None:
        """Shut nodes out, everywhere: the book first, so that they get no other certificate."""
        wanted = call.body
        assert isinstance(wanted, Revocation)
        self._decide(call, wanted.nodes, TrustRecord(serial=0, state="revoked", erase=wanted.erase))

    def approve(self, call: Call) -> None:
        """Let nodes in that wait for approval, or were revoked."""
        wanted = call.body
        assert isinstance(wanted, NodeNames)
        self._decide(call, wanted.nodes, TrustRecord(serial=0, state="joined"))

    def _decide(self, call: Call, nodes: list[str], record: TrustRecord) -> None:
        def told(uids: list[str] | None, error: str, code: str) -> None:
            if uids is None:
                call.refuse(Outcome.CONFLICT, error)
                return
            said = [(f"revoked/{uid}", record) for uid in uids]

            def published(outcome: Outcome, why: str) -> None:
                if outcome is Outcome.OK:
                    call.answer(NodesChanged(uids))
                else:
                    call.refuse(
                        outcome, f"it is in the book of the root, but the nodes are not told yet: {why}; run this again"
                    )

            self._trust.decisions.publish(said, published)

        self._trust.helper.do(SetState(nodes=nodes, state=record.state), list[str], told)

    def rotate(self, call: Call) -> None:
        """Make another issuer, and tell the nodes of it."""
        wanted = call.body
        assert isinstance(wanted, Rotation)

        def told(number: int | None, error: str, code: str) -> None:
            if number is None:
                call.refuse(Outcome.CONFLICT, error)
                return
            told_nodes = partial(published, number)
            if wanted.retire:
                self._trust.decisions.retire(number, told_nodes)
            else:
                self._trust.decisions.publish([], told_nodes)

        def published(number: int, outcome: Outcome, why: str) -> None:
            if outcome is Outcome.OK:
                self._trust.renew_now()
                call.answer(Rotated(number))
            else:
                call.refuse(
                    outcome, f"issuer {number} signs from now on, but the nodes are not told yet: {why}; run this again"
                )

        self._trust.helper.do(Rotate(now_ms=self._clock.wall_ms()), int, told)

    def revoke_token(self, call: Call) -> None:
        """One to join with, or one of an application."""
        if self._revoke_app_token(call, call.parameters["id"]):
            return

        def told(value: object, error: str, code: str) -> None:
            call.done(Outcome.NOT_FOUND if error else Outcome.OK, error)

        self._trust.helper.do(RevokeToken(id=call.parameters["id"]), object, told)
