"""Who a client is, and what it may do: by its token, by the user that the kernel names, or as one of this machine.

    token EBT.ID.SECRET           -> the principal that it was made for, at nodes of its region
    the unix socket               -> unix:USER
    loopback, without a token     -> local
    another machine, without one  -> refused

Rules come with the topic __trust and count as soon as they are in force. Without rules about them, programs of this
machine may do everything, others nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from edgebroker.broker.access.app_token import has_secret, split_app_token
from edgebroker.broker.access.audit import Audit
from edgebroker.broker.access.bans import Bans
from edgebroker.broker.access.rights import EVERYTHING, Rights, Rule, missing, parse_rule
from edgebroker.broker.access.tenants import Tenants
from edgebroker.broker.core import Core
from edgebroker.broker.ports import FROM_ABOVE
from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.broker.trust.trust_topic import Principal, TokenDigest
from edgebroker.common.errors import ArgumentError, Code
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.network.http.router import Denial
from edgebroker.network.http.server import Request
from edgebroker.network.io.listener import host_of, is_local
from edgebroker.trust.node_name import contains

log = logging.getLogger(__name__)

# Rights of requests that change nothing.
LOOKING = ("health", "metrics", "view")
LOCAL, UNIX = "local", "unix:"
NEEDS_TOKEN = "a program of another machine needs a token (edgebroker token create --app NAME, at the root)"
BAD_TOKEN = "the token is not known at this node: it was revoked, has expired, or is not for this region"


class Caller:
    """A principal as it came: with which token. `rights` are replaced when rules change, and `changes` counts how
    often; `ended`: its token does not count any more."""

    __slots__ = ("changes", "ended", "expires_ms", "name", "rights", "token_id")

    def __init__(self, name: str, rights: Rights, token_id: str = "", expires_ms: int = 0) -> None:
        self.name, self.rights, self.token_id, self.expires_ms = name, rights, token_id, expires_ms
        self.changes, self.ended = 0, False

    @property
    def remote(self) -> bool:
        """Does it have a token?"""
        return bool(self.token_id)


# Who has a token that does not count.
UNKNOWN = Caller("(unknown)", Rights([], []))


class Access:
    """Owned by the loop thread. `region` is that of this node."""

    def __init__(self, trust: NodeTrust, core: Core, scheduler: Scheduler, clock: Clock, region: str) -> None:
        self._topic, self._metrics, self._clock, self._region = trust.topic, core.metrics, clock, region
        self.audit = Audit(core, scheduler, clock, lambda: trust.name is not None)
        # In development other machines count as this one.
        self._open = trust.insecure
        self.bans = Bans(scheduler.now)
        self.tenants = Tenants(core, self._topic, scheduler)
        self._principals: dict[str, Principal] = {}
        self._tokens: dict[str, tuple[str, TokenDigest]] = {}
        # By name, then by the id of the token ("": none): as many as there are tokens, and users of this machine.
        self._callers: dict[str, dict[str, Caller]] = {}
        self._topic.changed.append(self._decided)

    def open(self) -> None:
        """Take over what was in force."""
        for name, principal in self._topic.principals().items():
            self._take(name, principal)
        self.tenants.open()

    # ---- who is it ----

    def caller(self, token: bytes, identity: str, peer: str, client_id: str) -> tuple[Caller | None, str]:
        """Who sent this token over a connection of this identity and address; None, and why not."""
        if token[:4] == b"EBT.":
            known = self._by_token(token, peer)
            if known is None:
                self._failed(peer, BAD_TOKEN)
                return None, BAD_TOKEN
            self.bans.known(peer)
            return known, ""
        application = client_id.partition("/")[0] if "/" in client_id else ""
        if application in self._principals:
            return None, f"client ids that begin with {application}/ are those of the application {application}"
        if identity.startswith(UNIX):
            return self._known(identity), ""
        if is_local(peer) or self._open:
            return self._known(LOCAL), ""
        self._failed(peer, NEEDS_TOKEN)
        return None, NEEDS_TOKEN

    def refusal(self, request: Request, right: str) -> Denial | None:
        """Why a request of administration does not have a right; None when it has. Who uses the unix socket of it is
        root or the user of the node; a request from a node above was judged where it was asked."""
        if right == "health" or (caller := self._who_asks(request)) is None:
            return None
        if caller is UNKNOWN:
            self._failed(request.peer, BAD_TOKEN)
            return Denial(BAD_TOKEN, 401)
        lacks = self.missing(caller, request.peer, "view" if right == "metrics" else right)
        return Denial(lacks) if lacks else None

    def done(self, request: Request, right: str, status: int) -> None:
        """A request of administration was answered: what changes something is recorded."""
        if right not in LOOKING:
            caller = self._who_asks(request)
            name = caller.name if caller is not None else request.identity or request.peer
            path, _, _ = request.target.partition("?")
            self.audit.record(name, request.peer, request.method, path, "OK" if status < 400 else str(status))

    def _who_asks(self, request: Request) -> Caller | None:
        """None for who may do everything."""
        if request.token:
            return self._by_token(request.token.encode(), request.peer) or UNKNOWN
        return None if request.identity or request.peer == FROM_ABOVE else self._known(LOCAL)

    def _failed(self, peer: str, why: str) -> None:
        """Who it is could not be found out: after some of these its address is not listened to."""
        self._metrics.access_refused += 1
        self.bans.failed(peer)
        self.audit.refused("", host_of(peer), "connect", why)

    def is_over(self, caller: Caller) -> bool:
        """Does the token of this caller not count any more?"""
        return caller.ended or bool(caller.expires_ms and self._clock.wall_ms() > caller.expires_ms)

    def missing(self, caller: Caller, peer: str, right: str, topic: str = "", group: str = "") -> str:
        """Why a caller may not do this; "" when it may."""
        if caller.rights.allows(right, topic, group):
            return ""
        self._metrics.rights_missing += 1
        self.audit.refused(caller.name, host_of(peer), right, f"{topic} as {group}" if group else topic)
        return missing(caller.name, right, topic, group)

    def publish_refusal(
        self, caller: Caller, peer: str, topic: str, size: int, new_partitions: int
    ) -> tuple[Code, str]:
        """Why a caller may not publish so many bytes to a topic, which would be created with so many partitions (0: it
        is there); OK when it may."""
        missing = self.missing(caller, peer, "produce", topic)
        if not missing and new_partitions:
            missing = self.missing(caller, peer, "create", topic)
        if missing:
            return Code.UNAUTHORISED, missing
        crowded = self.tenants.refusal(topic, "stored_bytes", size)
        crowded = crowded or self.tenants.refusal(topic, "partitions", new_partitions)
        return (Code.OVERLOADED, crowded) if crowded else (Code.OK, "")

    def _by_token(self, token: bytes, peer: str) -> Caller | None:
        split = split_app_token(token)
        found = self._tokens.get(split[0]) if split is not None else None
        if split is None or found is None or not has_secret(split[1], found[1].digest):
            return None
        name, digest = found
        if not contains(self._principals[name].region, self._region):
            return None
        known = self._known(name, digest)
        if self.is_over(known):
            return None
        self.audit.used(name, host_of(peer), digest.id)
        return known

    def _known(self, name: str, token: TokenDigest | None = None) -> Caller:
        """All callers of a name have the same rights, and share them."""
        of_name = self._callers.setdefault(name, {})
        id, expires_ms = (token.id, token.expires_ms) if token is not None else ("", 0)
        found = of_name.get(id)
        if found is None:
            rights = next((other.rights for other in of_name.values()), None) or self.rights(name)
            found = of_name[id] = Caller(name, rights, id, expires_ms)
        return found

    # ---- what may it do ----

    def rights(self, name: str) -> Rights:
        """What follows from the rules about a principal, at this node."""
        principal = self._principals.get(name, Principal())
        allow = [rule for rule in map(_readable, principal.allow) if rule is not None]
        deny = [rule for rule in map(_readable, principal.deny) if rule is not None]
        if is_of_machine(name):
            allow = [*EVERYTHING, *allow]
        return Rights(allow, deny, name, self._region)

    @property
    def principals(self) -> dict[str, Principal]:
        """Those that there are rules or tokens for, by name."""
        return self._principals

    def principal_of_token(self, token_id: str) -> str:
        """Whose token has this id; "" when there is none."""
        found = self._tokens.get(token_id)
        return found[0] if found is not None else ""

    def _decided(self, keys: Sequence[str]) -> None:
        for key in keys:
            kind, _, name = key.partition("/")
            if kind == "principal":
                self._take(name, self._topic.principal(name))

    def _take(self, name: str, principal: Principal | None) -> None:
        """Rules are in force: callers that are connected have other rights at once."""
        before = self._principals.pop(name, Principal())
        for token in before.tokens:
            self._tokens.pop(token.id, None)
        if principal is not None:
            self._principals[name] = principal
            self._tokens.update({token.id: (name, token) for token in principal.tokens})
        known = principal or Principal()
        away = not contains(known.region, self._region)
        rights = self.rights(name) if name in self._callers else None
        for id, caller in list(self._callers.get(name, {}).items()):
            assert rights is not None
            caller.rights = rights
            caller.changes += 1
            if caller.remote and (id not in self._tokens or away):
                caller.ended = True
                del self._callers[name][id]


def is_of_machine(name: str) -> bool:
    """Is this principal a program of the machine of the node?"""
    return name == LOCAL or name.startswith(UNIX)


def _readable(text: str) -> Rule | None:
    """A rule; None for one that only a later release knows, which allows and denies nothing."""
    try:
        return parse_rule(text)
    except ArgumentError as error:
        log.warning("a rule is not obeyed: %s", error)
        return None
