"""Rights over the admin interface: who may do what, tokens of applications, and what a principal could do here.

Changes are made at the root of the fleet, one after the other, each to what is in force then; they are answered once
they are in force here, and reach the other nodes with __trust.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.access.access import Access, is_of_machine
from edgebroker.broker.access.app_token import make_app_token
from edgebroker.broker.access.rights import ADMIN_RIGHTS, TOPIC_RIGHTS, missing, parse_rule
from edgebroker.broker.access.tenants import MOST_TENANTS, Tenant
from edgebroker.broker.trust.decisions import Said
from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.broker.trust.trust_topic import Principal, Quota, TokenDigest, TrustRecord
from edgebroker.common.errors import ArgumentError
from edgebroker.common.names import printable
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.trust.messages import Milliseconds, Region

MOST_PRINCIPALS, MOST_RULES, MOST_TOKENS = 10_000, 100, 100
MOST_WAITING = 64
MAX_ACCESS_BYTES = 128 << 10
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
_NAME = re.compile(r"(local|unix:[A-Za-z0-9._-]{1,64}|[A-Za-z0-9][A-Za-z0-9._-]{0,62})\Z")
_Rules = Annotated[list[str], Meta(max_length=MOST_RULES)]
Make = Callable[[Principal | None], Principal | None]
"""What a principal becomes, of what it is; None: there is none. Raises ArgumentError."""


class AccessChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/access/{name}: rules to add, and rules to remove from both."""

    allow: _Rules = []
    deny: _Rules = []
    remove: _Rules = []


class AppTokenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/access/{name}/tokens. `region`: of a principal that is new; `expires_ms` 0: never."""

    allow: _Rules = []
    region: Region = ""
    expires_ms: Milliseconds = 0


class NewAppToken(msgspec.Struct, frozen=True):
    """The answer: the token, which is told once, and its id."""

    token: str
    id: str


class AppTokenInfo(msgspec.Struct, frozen=True):
    id: str
    expires_ms: int


class PrincipalInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A principal, and what the rules say about it."""

    name: str
    region: str
    allow: list[str]
    deny: list[str]
    tokens: list[AppTokenInfo]


class AccessList(msgspec.Struct, frozen=True):
    """The answer to GET /v1/access."""

    principals: list[PrincipalInfo]


class AccessTest(msgspec.Struct, frozen=True):
    """The answer to GET /v1/access/{name}/test: at this node."""

    allowed: bool
    why: str


class TenantInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant: its quota, and what it has at this node. `received_bytes` and `sent_bytes` are since the start."""

    name: str
    quota: Quota
    stored_bytes: int
    connections: int
    partitions: int
    groups: int
    received_bytes: int
    sent_bytes: int


class TenantList(msgspec.Struct, frozen=True):
    """The answer to GET /v1/tenants."""

    tenants: list[TenantInfo]


class AccessAdmin:
    """Owned by the loop thread."""

    def __init__(self, access: Access, trust: NodeTrust) -> None:
        self._access, self._trust = access, trust

    # ---- looking ----

    def list(self, call: Call) -> None:
        call.answer(AccessList([_info(name, one) for name, one in sorted(self._access.principals.items())]))

    def describe(self, call: Call) -> None:
        name = call.parameters["name"]
        found = self._access.principals.get(name)
        if found is None and not is_of_machine(name):
            call.refuse(Outcome.NOT_FOUND, f"there is no principal {printable(name)}; see edgebroker access show")
        else:
            call.answer(_info(name, found or Principal()))

    def test(self, call: Call) -> None:
        """GET /v1/access/{name}/test?right=produce&topic=prices: may it?"""
        name = call.parameters["name"]
        right, topic, group = (call.query.get(key, [""])[0] for key in ("right", "topic", "group"))
        if right not in (*TOPIC_RIGHTS, *ADMIN_RIGHTS) or (right in TOPIC_RIGHTS and not topic):
            ways = ", ".join((*TOPIC_RIGHTS, *ADMIN_RIGHTS))
            call.refuse(Outcome.INVALID, f"name a right ({ways}), and a topic where it is for topics")
        else:
            allowed = self._access.rights(name).allows(right, topic, group)
            call.answer(AccessTest(allowed, "" if allowed else missing(name, right, topic, group)))

    def tenants(self, call: Call) -> None:
        """GET /v1/tenants"""
        call.answer(TenantList([_tenant(one) for one in sorted(self._access.tenants, key=lambda one: one.name)]))

    # ---- changing ----

    def set_tenant(self, call: Call) -> None:
        """PUT /v1/tenants/{name}: its quota is this."""
        name, known = call.parameters["name"], [one.name for one in self._access.tenants]
        assert isinstance(call.body, Quota)
        if not _TENANT.match(name):
            call.refuse(Outcome.INVALID, f"{printable(name)!r} is not a tenant: use up to 63 of A-Z a-z 0-9 _ -")
        elif name not in known and len(known) >= MOST_TENANTS:
            call.refuse(Outcome.OVERLOADED, f"there may be {MOST_TENANTS} tenants; delete some")
        else:
            self._decide_tenant(call, call.body)

    def delete_tenant(self, call: Call) -> None:
        """DELETE /v1/tenants/{name}: there is no limit any more."""
        if call.parameters["name"] not in [one.name for one in self._access.tenants]:
            call.refuse(Outcome.NOT_FOUND, f"there is no tenant {printable(call.parameters['name'])}")
        else:
            self._decide_tenant(call, None)

    def _decide_tenant(self, call: Call, quota: Quota | None) -> None:
        if not self._is_root(call):
            return
        record = TrustRecord(serial=0, quota=quota)
        self._trust.decisions.publish([(f"tenant/{call.parameters['name']}", record)], call.done)

    def change(self, call: Call) -> None:
        """POST /v1/access/{name}"""
        wanted, name = call.body, call.parameters["name"]
        assert isinstance(wanted, AccessChange)

        def make(known: Principal | None) -> Principal | None:
            known = known or Principal()
            gone = {_rule(text) for text in wanted.remove}
            allow = _added(known.allow, wanted.allow, gone)
            return msgspec.structs.replace(known, allow=allow, deny=_added(known.deny, wanted.deny, gone))

        self._begin(call, name, make, lambda: call.answer(_info(name, self._access.principals.get(name, Principal()))))

    def delete(self, call: Call) -> None:
        """DELETE /v1/access/{name}: its rules and its tokens."""
        name = call.parameters["name"]
        if name not in self._access.principals:
            call.refuse(Outcome.NOT_FOUND, f"there is no principal {printable(name)}; see edgebroker access show")
        else:
            self._begin(call, name, lambda known: None, lambda: call.done(Outcome.OK, ""))

    def create_token(self, call: Call) -> None:
        """POST /v1/access/{name}/tokens"""
        wanted, name = call.body, call.parameters["name"]
        assert isinstance(wanted, AppTokenRequest)
        token = make_app_token()

        def make(known: Principal | None) -> Principal | None:
            if is_of_machine(name):
                raise ArgumentError(f"programs of the machine need no token; {name} has none")
            if known is not None and wanted.region not in ("", known.region):
                raise ArgumentError(f"{name} is for region {known.region or '(all)'}: use another name for another")
            known = known or Principal(region=wanted.region)
            digest = TokenDigest(id=token.id, digest=token.digest, expires_ms=wanted.expires_ms)
            if len(known.tokens) >= MOST_TOKENS:
                raise ArgumentError(f"{name} may have {MOST_TOKENS} tokens; revoke some (edgebroker token revoke)")
            allow = _added(known.allow, wanted.allow, set())
            return msgspec.structs.replace(known, allow=allow, tokens=[*known.tokens, digest])

        self._begin(call, name, make, lambda: call.answer(NewAppToken(str(token), token.id), 201))

    def revoke_token(self, call: Call, id: str) -> bool:
        """Take a token of an application away. False when there is none with this id."""
        name = self._access.principal_of_token(id)
        if not name:
            return False

        def make(known: Principal | None) -> Principal | None:
            known = known or Principal()
            return msgspec.structs.replace(known, tokens=[one for one in known.tokens if one.id != id])

        self._begin(call, name, make, lambda: call.done(Outcome.OK, ""))
        return True

    def _begin(self, call: Call, name: str, make: Make, answer: Callable[[], None]) -> None:
        if not self._is_root(call):
            return
        if not _NAME.match(name):
            call.refuse(
                Outcome.INVALID,
                f"{printable(name)!r} is not a principal: use up to 63 of A-Z a-z 0-9 . _ -, local, or unix:USER",
            )
        elif name not in self._access.principals and len(self._access.principals) >= MOST_PRINCIPALS:
            call.refuse(Outcome.OVERLOADED, f"there may be {MOST_PRINCIPALS} principals; delete some")
        elif self._trust.decisions.waiting >= MOST_WAITING:
            call.refuse(Outcome.OVERLOADED, f"{MOST_WAITING} changes of rights wait; try again")
        else:
            self._trust.decisions.decide(self._changes(name, make), partial(_decided, call, answer))

    def _changes(self, name: str, make: Make) -> Iterator[Said]:
        """The record of a principal, if there is another one."""
        known = self._access.principals.get(name)
        made = make(known)
        if made != known:
            yield [(f"principal/{name}", TrustRecord(serial=0, principal=made))]

    def _is_root(self, call: Call) -> bool:
        """Is this where rights are given? Else the call is refused."""
        if self._trust.directory.issues:
            return True
        where = "run this there" if self._trust.name is not None else "there is none yet (edgebroker fleet init)"
        call.refuse(Outcome.CONFLICT, f"rights and tokens are given at the root of a fleet: {where}")
        return False


def _decided(call: Call, answer: Callable[[], None], outcome: Outcome, why: str) -> None:
    if outcome is Outcome.OK:
        answer()
    elif outcome is Outcome.INVALID:
        call.refuse(outcome, why)
    else:
        call.refuse(outcome, f"the nodes are not told: {why}; run this again")


def _info(name: str, principal: Principal) -> PrincipalInfo:
    tokens = [AppTokenInfo(token.id, token.expires_ms) for token in principal.tokens]
    return PrincipalInfo(name=name, region=principal.region, allow=principal.allow, deny=principal.deny, tokens=tokens)


def _tenant(one: Tenant) -> TenantInfo:
    return TenantInfo(
        name=one.name,
        quota=one.quota,
        stored_bytes=one.stored_bytes,
        connections=one.connections,
        partitions=one.partitions,
        groups=one.groups,
        received_bytes=one.received.total,
        sent_bytes=one.sent.total,
    )


def _rule(text: str) -> str:
    """A rule in the form in which it is kept. Raises ArgumentError."""
    return str(parse_rule(text))


def _added(known: Sequence[str], new: Sequence[str], gone: set[str]) -> list[str]:
    """Rules with further ones, and without some. Raises ArgumentError."""
    found = [rule for rule in dict.fromkeys([*known, *map(_rule, new)]) if rule not in gone]
    if len(found) > MOST_RULES:
        raise ArgumentError(f"a principal may have {MOST_RULES} rules of a kind; use patterns")
    return found
