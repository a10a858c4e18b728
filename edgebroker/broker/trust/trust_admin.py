"""The fleet over the admin interface: creating it, joining it, tokens."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.common.errors import TrustError
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.trust.messages import CreateTokens, ListTokens, RevokeToken, TokenInfo, TokenRequest
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


class TokenList(msgspec.Struct, frozen=True):
    """The answer to GET /v1/trust/tokens."""

    tokens: list[TokenInfo]


class TrustAdmin:
    """Owned by the loop thread."""

    def __init__(self, trust: NodeTrust) -> None:
        self._trust = trust

    def status(self, call: Call) -> None:
        call.answer(self._trust.status())

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

    def revoke_token(self, call: Call) -> None:
        def told(value: object, error: str, code: str) -> None:
            call.done(Outcome.NOT_FOUND if error else Outcome.OK, error)

        self._trust.helper.do(RevokeToken(id=call.parameters["id"]), object, told)
