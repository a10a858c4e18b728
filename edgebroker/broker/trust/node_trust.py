"""This node's place in a fleet: its certificate, how it gets and renews one, and whom it lets in.

    token, or trust.fleet at a root -> helper process -> certificate -> TLS for its listeners and its connections
    60 days after it was issued    -> helper process -> the next one, for the same key

Whose certificate has expired is let in for `trust.grace_days` more: expiry is hygiene, revocation is the lock. While
the clock is behind what this node has seen before, it judges no certificate by its age.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edgebroker.broker.core import Core
from edgebroker.broker.trust.decisions import TrustDecisions
from edgebroker.broker.trust.helper import TrustHelper
from edgebroker.broker.trust.rules import NodeRules
from edgebroker.broker.trust.trust_topic import TrustTopic
from edgebroker.common.config import DEVELOPMENT, Config, is_insecure
from edgebroker.common.errors import ConfigError, TrustError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.durable import destroy, write_durable
from edgebroker.common.runtime.newest import Newest
from edgebroker.common.runtime.threads import Worker
from edgebroker.network.http.peers import Peers
from edgebroker.network.io.listener import host_of
from edgebroker.network.io.loop import Loop
from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.trust.directory import Issued, TrustDirectory
from edgebroker.trust.messages import CreateFleet, Join, RenewOwn
from edgebroker.trust.node_name import NodeName, issuer_in, name_in, parse_node_name
from edgebroker.version import RELEASED_MS

if TYPE_CHECKING:
    import ssl

    from edgebroker.network.io.tls import Handshakes

log = logging.getLogger(__name__)

DAY_MS = 86_400_000
RENEW_DAYS, EXPIRING_DAYS = 60, 15
TICK_SECONDS = 60.0
# A node that has no parent asks for a certificate so often: it learns so that it was revoked, or is let in again.
ALONE_SECONDS = 600.0
# A connection to a node that is revoked stands for so long: through it the node hears it, and those below do.
CUT_SECONDS = 2.0
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0
# Nodes whose issuer is retired renew within this time; until then those above do not let them in.
RETIRED_SECONDS = 60.0
# A node that is to erase what it has waits so long: the word that takes it back may come with the same records.
ERASE_SECONDS = 3.0
AGAIN = "join the fleet again: edgebroker join TOKEN"
REVOKED = "this node was revoked: the fleet does not take it any more; what it has is served on"
# The newest time is stored so often: a clock that is set back by less is not noticed at the next start.
FLOOR_SECONDS = 3600.0
# Refusals of one address for one reason are logged once in an hour; so many are remembered.
MOST_LOGGED, LOG_AGAIN_SECONDS = 256, 3600.0


class _Seen(msgspec.Struct):
    """The file `state`: the newest time that was seen."""

    floor_ms: int = 0


class _Prepared(NamedTuple):
    """What a certificate is used with."""

    name: NodeName
    issued: Issued
    root: bytes
    server: ssl.SSLContext
    client: ssl.SSLContext


class TrustStatus(msgspec.Struct, kw_only=True):
    """For `edgebroker trust status`. `node`: the name in the certificate, "" without one; `clock`: `plausible`, or why
    certificates are not judged by their age; `joining`: why it has not joined yet, "" when it has, or is not to;
    `problem`: what has to be mended; `data_dir`: where `edgebroker fleet export-key` finds the root key."""

    fleet: str
    node: str
    pin: str
    issuer: int
    issued_ms: int
    expires_ms: int
    issues: bool
    root_key_here: bool
    clock: str
    joining: str
    problem: str
    data_dir: str


class NodeTrust:
    """Owned by the loop thread. `addresses` tells where nodes of the fleet may be; `on_identity` are called when there
    is a certificate, or another one."""

    def __init__(
        self, core: Core, loop: Loop, clock: Clock, config: Config, addresses: Callable[[], list[str]]
    ) -> None:
        self._loop, self._clock, self._config, self._uid = loop, clock, config, core.engine.node_uid
        self._addresses = addresses
        self.insecure = is_insecure()
        self.peers = Peers(loop, open=self.insecure)
        data_dir = Path(config.node.data_dir)
        self.directory = TrustDirectory(data_dir)
        self.helper = TrustHelper(self._loop, data_dir)
        self.name: NodeName | None = None
        mirrors = core.engine.mirrors
        self.rules = NodeRules(lambda: self.name, lambda: mirrors is not None and mirrors.promoted)
        self.peers.parent_refusal = self.rules.parent_refusal
        self.issued: Issued | None = None
        self.handshakes: Handshakes | None = None
        self.on_identity: list[Callable[[], None]] = []
        # The root said that everything here is to be erased: the node stops, and who runs it does that.
        self.erasing = False
        self.on_erase: Callable[[], None] = lambda: None
        # Has it no parent, although it should? And who cuts the connections of peers that are refused now.
        self.lonely: Callable[[], bool] = lambda: False
        self.on_revoked: list[Callable[[Callable[[str], bool]], None]] = []
        self.topic = TrustTopic(core, loop, self.helper, self.directory.path)
        self.topic.changed.append(self._decided)
        self.decisions = TrustDecisions(core, loop, clock, self.helper, self.topic)
        self._asked_at = 0.0
        self._worker: Worker | None = None
        self.root = b""
        self._server: ssl.SSLContext | None = None
        self._client: ssl.SSLContext | None = None
        self._problem = self._joining = self._revoked = ""
        self._busy = self._stopped = False
        self._pause, self._due = FIRST_PAUSE, 0.0
        self._renew_after_ms = int(random.uniform(RENEW_DAYS, RENEW_DAYS + EXPIRING_DAYS / 3) * DAY_MS)
        self._floor_ms = RELEASED_MS
        self._floor_stored = 0.0
        self._logged = Newest[tuple[str, str], float](MOST_LOGGED)
        self._metrics = core.metrics

    # ---- life ----

    def open(self) -> None:
        """Take over what an earlier run had. Blocks for a moment. Raises ConfigError for a node of a fleet that is to
        listen without TLS."""
        self.topic.open()
        self._floor_ms = max(RELEASED_MS, read_if_whole(self.directory.state, _Seen, _Seen()).floor_ms)
        found, self._problem = self._prepared()
        if found is not None:
            self._use(found)
        if self.name is not None and self.insecure:
            raise ConfigError(f"this node belongs to the fleet {self.name.fleet}: remove {DEVELOPMENT}")

    def start(self) -> None:
        """Get a certificate, if there is to be one, and see to it from then on."""
        self.topic.start()
        if self.topic.erased(self._uid):
            self._loop.call_later(ERASE_SECONDS, self._erase_if_so)
        self._tick()

    def stop(self) -> None:
        self._stopped = True
        self.topic.stop()
        self.helper.stop()
        if self.handshakes is not None:
            self.handshakes.close()
        if self.name is not None:
            self._store_floor()
        if self._worker is not None:
            self._worker.stop(5.0)

    def _tick(self) -> None:
        if self._stopped:
            return
        self._loop.call_later(TICK_SECONDS, self._tick)
        now = self._loop.now()
        if self.name is not None and now >= self._floor_stored + FLOOR_SECONDS:
            self._store_floor()
        self._go_on()

    def _go_on(self) -> None:
        """Create the fleet, join it, or renew, when it is time."""
        if self._busy or self._stopped or self._loop.now() < self._due:
            return
        config = self._config
        if self.name is None and not self._problem and config.trust.fleet and config.node.level == "root":
            self.create_fleet(config.trust.fleet, self._told)
        elif self.name is None:
            self._look_for_token()
        elif self.issued is not None and (self._is_old(self.issued) or self._is_alone()):
            self._asked_at = self._loop.now()
            self._renew()

    def renew_now(self) -> None:
        """Get another certificate for the key of this node."""
        if not self._busy and self.name is not None:
            self._renew()

    def _is_old(self, issued: Issued) -> bool:
        return self._now_ms() - issued.issued_ms > self._renew_after_ms

    def _is_alone(self) -> bool:
        """The nodes above do not let it in, perhaps: it hears why when it asks for a certificate."""
        return self.lonely() and not self._revoked and self._loop.now() - self._asked_at >= ALONE_SECONDS

    def _renew(self) -> None:
        """Through the fleet; where certificates are issued, here."""
        if not self.directory.issues:
            self._join("")
            return
        self._busy = True

        def told(issued: Issued | None, error: str, code: str) -> None:
            self._busy = False
            if issued is None:
                self._not_joined(error)
            else:
                self._reload()

        self.helper.do(RenewOwn(uid=self._uid, now_ms=self._now_ms()), Issued, told)

    def _told(self, outcome: Outcome, why: str) -> None:
        if outcome is not Outcome.OK:
            self._problem = why
            log.error("the fleet cannot be created: %s", why)

    def _look_for_token(self) -> None:
        """One from trust.token_file moves into the directory of the node first."""
        self._busy = True
        path = Path(self._config.trust.token_file) if self._config.trust.token_file else None

        def work() -> None:
            problem = ""
            try:
                if path is not None and path.exists():
                    self.directory.write_token(path.read_text().strip())
                    destroy(path)
            except (OSError, UnicodeDecodeError) as error:
                problem = f"trust.token_file {path} cannot be read and removed: {error}"
            token = self.directory.read_token()
            self._loop.call_soon_threadsafe(lambda: found(token, problem))

        def found(token: str, problem: str) -> None:
            self._busy = False
            self._problem = problem or self._problem
            if token and not self._stopped:
                self._join(token)

        self._work(work)

    # ---- getting a certificate ----

    def create_fleet(self, fleet: str, done: Done) -> None:
        """Make a fleet, with this node as its root."""
        self._busy = True

        def told(value: object, error: str, code: str) -> None:
            self._busy = False
            if error:
                done(Outcome.CONFLICT, error)
                return
            log.warning("this node is the root of the fleet %s now", fleet)
            self._reload(lambda: done(Outcome.OK, ""))

        self.helper.do(CreateFleet(fleet=fleet, uid=self._uid, now_ms=self._now_ms()), object, told)

    def join_with(self, token: str, done: Done) -> None:
        """Join with this token, now or when a node of the fleet answers."""

        def work() -> None:
            try:
                self.directory.write_token(token)
                error = ""
            except OSError as failed:
                error = f"the token cannot be stored: {failed.strerror}"
            self._loop.call_soon_threadsafe(lambda: stored(error))

        def stored(error: str) -> None:
            if error:
                done(Outcome.READ_ONLY, error)
                return
            self._problem, self._due, self._pause = "", 0.0, FIRST_PAUSE
            if not self._busy:
                self._join(token)
            done(Outcome.OK, "")

        self._work(work)

    def _join(self, token: str) -> None:
        node = self._config.node
        wanted = Join(
            addresses=self._addresses(),
            token=token,
            fleet=self._config.trust.fleet,
            uid=self._uid,
            name=node.name,
            level=node.level,
            region=node.region,
            retired=self.topic.retired_issuers,
            serial=self.topic.serial(f"revoked/{self._uid}"),
        )
        self._busy = True

        def told(issued: Issued | None, error: str, code: str) -> None:
            self._busy = False
            if self._stopped:
                return
            if issued is None:
                self._revoked = REVOKED if code in ("REVOKED", "ERASE") else ""
                if code == "ERASE":
                    self._erase()
                self._not_joined(error)
                if self.name is not None:  # it has what the token was to get
                    self._work(self.directory.forget_token)
            else:
                self._joining, self._pause, self._revoked = "", FIRST_PAUSE, ""
                log.warning("this node is %s; its certificate is for %d days", issued.node, _days(issued))
                self._reload()

        self.helper.do(wanted, Issued, told)

    def _not_joined(self, error: str) -> None:
        self._due = self._loop.now() + self._pause * random.uniform(0.8, 1.2)
        self._loop.call_later(self._due - self._loop.now(), self._go_on)
        self._pause = min(LONGEST_PAUSE, self._pause * 2)
        if error != self._joining:
            log.warning("no certificate yet: %s", error)
        self._joining = error

    def _reload(self, then: Callable[[], None] = lambda: None) -> None:
        """Use the certificate that was stored, if there is one. To load what it needs takes a while."""

        def work() -> None:
            found, problem = self._prepared()
            self._loop.call_soon_threadsafe(lambda: loaded(found, problem))

        def loaded(found: _Prepared | None, problem: str) -> None:
            if self._stopped:
                return
            if problem:
                self._problem = problem
            elif found is not None:
                self._use(found)
                for told in self.on_identity:
                    told()
            then()

        self._work(work)

    def _prepared(self) -> tuple[_Prepared | None, str]:
        """What there is to use, and why it cannot be used. Blocks; any thread."""
        directory = self.directory
        try:
            found = directory.identity()
            if found is None:
                return None, ""
            from edgebroker.network.io import tls  # noqa: F401  # here, where it keeps no record waiting
            from edgebroker.trust.contexts import client_context, server_context

            root = directory.root.read_bytes()
            server = server_context(directory.certificate, directory.key, root)
            client = client_context(root, directory.certificate, directory.key)
        except TrustError as error:
            return None, f"{error}; {AGAIN}"
        except (OSError, ValueError):
            return None, f"the files in {directory.path} do not fit together; {AGAIN}"
        return _Prepared(*found, root, server, client), ""

    def _use(self, found: _Prepared) -> None:
        from edgebroker.network.io.tls import Handshakes

        self._server, self._client, self.root = found.server, found.client, found.root
        name = found.name
        self.name, self.issued, self._problem = name, found.issued, ""
        if self.handshakes is None:
            self.handshakes = Handshakes(
                self._loop, self._server_context, self._client_context, self.identify, self.refuse
            )
        self.peers.secure = self.handshakes
        node = self._config.node
        if (name.uid, name.level, name.region) != (self._uid, node.level, node.region):
            self._problem = (
                f"the certificate is for {name}; this node is a {node.level} node of region {node.region or '(all)'} "
                f"with uid {self._uid}: put the configuration back, or join with an empty data directory"
            )

    def _work(self, job: Callable[[], None]) -> None:
        """What waits for the disk is done by a thread."""
        if self._worker is None:
            self._worker = Worker("trust-files")
        self._worker.submit(job)

    def _server_context(self) -> ssl.SSLContext:
        assert self._server is not None
        return self._server

    def _client_context(self) -> ssl.SSLContext:
        assert self._client is not None
        return self._client

    # ---- judging peers ----

    def identify(self, sock: ssl.SSLSocket) -> str:
        """Who is at the other end of a TLS connection; "" for one without a certificate. Raises PeerRefusedError."""
        from edgebroker.network.io.tls import PeerRefusedError

        shown = sock.getpeercert()
        if not shown:
            return ""
        name = name_in(shown)
        if name is None or self.name is None or name.fleet != self.name.fleet:
            raise PeerRefusedError("its certificate is not one of a node of this fleet")
        if self.topic.revoked(name.uid):
            raise PeerRefusedError(f"node {name.uid} was revoked")
        if self.topic.retired(issuer_in(shown)):
            raise PeerRefusedError(f"the certificate of node {name.uid} was issued by an issuer that is retired")
        late = self.expired_days(shown)
        if late > self._config.trust.grace_days > 0:
            raise PeerRefusedError(f"the certificate of node {name.uid} expired {late:.0f} days ago")
        return str(name)

    def expired_days(self, shown: object) -> float:
        """For how many days a certificate has been out of date; 0 for a valid one, and where this node cannot judge:
        its clock is behind, or its own certificate is as old (it was away, or its clock is years ahead)."""
        import ssl

        assert isinstance(shown, dict)
        own_end = self.issued.expires_ms if self.issued is not None else 0
        if self.clock_problem or self._clock.wall_ms() > own_end + self._config.trust.grace_days * DAY_MS:
            return 0.0
        end_ms = ssl.cert_time_to_seconds(str(shown["notAfter"])) * 1000
        return max(0.0, (self._clock.wall_ms() - end_ms) / DAY_MS)

    @property
    def clock_problem(self) -> str:
        """Why this node's clock is not believed; "" when it is."""
        behind = (self._floor_ms - self._clock.wall_ms()) / 1000
        if behind <= 0:
            return ""
        return f"it is {behind / 86400:.1f} days behind a time that was seen before; set the clock"

    def _decided(self, keys: Sequence[str]) -> None:
        """Records of the fleet came into force."""
        self._floor_ms = max(self._floor_ms, self.topic.newest_ms)
        if self.topic.erased(self._uid):
            self._loop.call_later(ERASE_SECONDS, self._erase_if_so)
        if any(key.startswith("revoked/") for key in keys):
            self._loop.call_later(CUT_SECONDS, partial(self._cut, self._is_revoked))
        if any(key.startswith("retired/") for key in keys):
            # Who signed the certificate of a peer is looked at when it connects again.
            self._loop.call_later(
                CUT_SECONDS, partial(self._cut, lambda identity: parse_node_name(identity) is not None)
            )
            if self.issued is not None and self.topic.retired(self.issued.issuer):
                self._loop.call_later(random.uniform(0.0, RETIRED_SECONDS), self.renew_now)

    def _erase_if_so(self) -> None:
        """Is that the last word still?"""
        if not self._stopped and self.topic.erased(self._uid):
            self._erase()

    def _erase(self) -> None:
        """The root has signed that this node is to erase what it has: remember it, and stop."""
        if self.directory.issues or self.erasing:
            return
        self.erasing = True

        def work() -> None:
            try:
                write_durable(self.directory.erasing, b"")
            except OSError as error:
                log.critical("%s cannot be stored: %s", self.directory.erasing, error.strerror)
            self._loop.call_soon_threadsafe(self.on_erase)

        log.critical("this node was revoked, and erases all that it has")
        self._work(work)

    def _cut(self, whose: Callable[[str], bool]) -> None:
        for shut_out in self.on_revoked:
            shut_out(whose)

    def _is_revoked(self, identity: str) -> bool:
        name = parse_node_name(identity)
        return name is not None and self.topic.revoked(name.uid)

    def _now_ms(self) -> int:
        return max(self._clock.wall_ms(), self._floor_ms)

    def _store_floor(self) -> None:
        self._floor_stored = self._loop.now()
        self._floor_ms = max(self._floor_ms, self._clock.wall_ms())
        seen = _Seen(self._floor_ms)

        def work() -> None:
            try:
                write_checked(self.directory.state, seen)
            except OSError as error:
                log.error("%s cannot be stored: %s", self.directory.state, error.strerror)

        self._work(work)

    def refuse(self, peer: str, why: str) -> None:
        """A peer was not let in: count it, and log it once in an hour."""
        self._metrics.peers_refused += 1
        key, now = (host_of(peer), why), self._loop.now()
        if now - self._logged.get(key, -LOG_AGAIN_SECONDS) >= LOG_AGAIN_SECONDS:
            self._logged.put(key, now)
            log.warning("%s was not let in: %s", peer, why)

    # ---- telling ----

    def problems(self) -> dict[str, str]:
        found = {}
        if self._revoked or self.topic.revoked(self._uid):
            found["trust"] = REVOKED
        elif self._problem:
            found["trust"] = self._problem
        elif self.name is None and self._joining:
            found["trust"] = f"this node has not joined its fleet yet: {self._joining}"
        if self.name is not None and self.clock_problem:
            found["clock"] = self.clock_problem
        issued = self.issued
        if issued is not None and self._now_ms() > issued.expires_ms - EXPIRING_DAYS * DAY_MS:
            found["certificate"] = f"the certificate was not renewed: {self._joining or 'the fleet was not asked yet'}"
        return found

    def status(self) -> TrustStatus:
        name, issued = self.name, self.issued
        return TrustStatus(
            fleet=name.fleet if name is not None else "",
            node=str(name) if name is not None else "",
            pin=issued.pin if issued is not None else "",
            issuer=issued.issuer if issued is not None else 0,
            issued_ms=issued.issued_ms if issued is not None else 0,
            expires_ms=issued.expires_ms if issued is not None else 0,
            issues=self.directory.issues,
            root_key_here=self.directory.root_key.exists(),
            clock=self.clock_problem or "plausible",
            joining=self._joining,
            problem=self.problems().get("trust", "") if self._problem or self._revoked else "",
            data_dir=str(self.directory.path.parent.absolute()),
        )


def _days(issued: Issued) -> int:
    return (issued.expires_ms - issued.issued_ms) // DAY_MS
