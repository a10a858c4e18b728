"""The topic __trust: what the root has decided about nodes and issuers, at every node of the fleet.

    root     revoke, approve, a new issuer -> helper process signs -> __trust/0, a table that is urgent
    node     replicated like any other topic -> helper process verifies -> `trust/records` -> in force

A record that is not signed as it has to be, or is older than what is in force, is ignored. What is in force is stored:
it counts from the start, also where the topic is lost, and is replaced record by record, never dropped as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.core import Core
from edgebroker.broker.trust.helper import TrustHelper
from edgebroker.common import batch, json, records
from edgebroker.common.errors import CorruptBatchError
from edgebroker.common.names import TRUST_TOPIC
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import Worker
from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.storage.engine import Log
from edgebroker.storage.types import ColdRead
from edgebroker.trust.messages import SignedRecord, Verify

log = logging.getLogger(__name__)

FILE_NAME = "records"
HEADER = "sig"
READ_BYTES = 128 << 10
RETRY_SECONDS = 1.0
MOST_RECORDS = 1_000_000


class TokenDigest(msgspec.Struct, frozen=True, kw_only=True):
    """A token of an application, as nodes know it: SHA-256 of its secret (hex). `expires_ms` 0: never."""

    id: str
    digest: str
    expires_ms: int = 0


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who may do what: the rules as they were written. Its tokens count at nodes of the region, and of those in it."""

    region: str = ""
    tokens: list[TokenDigest] = []
    allow: list[str] = []
    deny: list[str] = []


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant may have at each node; 0: any number."""

    stored_bytes: Annotated[int, Meta(ge=0, le=1 << 60)] = 0
    in_bytes_per_second: Annotated[int, Meta(ge=0, le=1 << 50)] = 0
    out_bytes_per_second: Annotated[int, Meta(ge=0, le=1 << 50)] = 0
    connections: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    partitions: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    groups: Annotated[int, Meta(ge=0, le=1 << 30)] = 0


class TrustRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a record says. `serial` grows; `made_ms`: when it was made, by the root's clock. `state` of
    revoked/UID, and whether that node shall erase what it has; `principal` of principal/NAME and `quota` of
    tenant/NAME, None when it is gone."""

    serial: int
    made_ms: int = 0
    state: str = ""
    erase: bool = False
    principal: Principal | None = None
    quota: Quota | None = None


class _InForce(msgspec.Struct):
    """The file `trust/records`: up to where which log was read, and the records by key."""

    log_id: str = ""
    offset: int = 0
    records: dict[str, SignedRecord] = {}


class TrustTopic:
    """Owned by the loop thread. `changed` gets the keys of records that came into force."""

    def __init__(self, core: Core, scheduler: Scheduler, helper: TrustHelper, directory: Path) -> None:
        self._core, self._scheduler, self._helper = core, scheduler, helper
        self._path = directory / FILE_NAME
        self._in_force = _InForce()
        self._said: dict[str, TrustRecord] = {}
        self._revoked: set[str] = set()
        self.changed: list[Callable[[Sequence[str]], None]] = []
        # Of records that count no more, until it is told.
        self._dropped: list[str] = []
        self._busy = self._stopped = False
        self._worker: Worker | None = None
        self.ignored = 0

    # ---- what is in force ----

    def revoked(self, uid: str) -> bool:
        """Is a node shut out?"""
        return uid in self._revoked

    def erased(self, uid: str) -> bool:
        """Is a node to erase all that it has?"""
        return uid in self._revoked and self._said[f"revoked/{uid}"].erase

    def retired(self, issuer: int) -> bool:
        """Is an issuer not to be believed any more?"""
        return f"retired/{issuer}" in self._said

    @property
    def said(self) -> Mapping[str, TrustRecord]:
        """What is in force, by key; without the issuers."""
        return self._said

    def has(self, key: str, serial: int) -> bool:
        """Is a record with this serial, or a later one, in force?"""
        if key.startswith("issuer/"):
            return key in self._in_force.records
        return key in self._said and self._said[key].serial >= serial

    def serial(self, key: str) -> int:
        """That of the record in force; 0: there is none."""
        return self._said[key].serial if key in self._said else 0

    @property
    def retired_issuers(self) -> list[int]:
        return [int(key.partition("/")[2]) for key in self._said if key.startswith("retired/")]

    @property
    def newest_serial(self) -> int:
        return max((one.serial for one in self._said.values()), default=0)

    def record(self, key: str) -> SignedRecord | None:
        """A record as it was signed."""
        return self._in_force.records.get(key)

    def principals(self) -> dict[str, Principal]:
        """Those that records are about, by name."""
        said = ((key.partition("/"), one.principal) for key, one in self._said.items())
        return {name: principal for (kind, _, name), principal in said if kind == "principal" and principal}

    def principal(self, name: str) -> Principal | None:
        """What a record says about one."""
        found = self._said.get(f"principal/{name}")
        return found.principal if found is not None else None

    def quotas(self) -> dict[str, Quota]:
        """Those of tenants, by name."""
        said = ((key.partition("/"), one.quota) for key, one in self._said.items())
        return {name: quota for (kind, _, name), quota in said if kind == "tenant" and quota}

    @property
    def newest_ms(self) -> int:
        """When the newest record in force was made, by the root's clock."""
        return max((one.made_ms for one in self._said.values()), default=0)

    def issuer(self, number: int) -> bytes:
        """The certificate of an issuer (PEM); b"" for one that is not known."""
        found = self._in_force.records.get(f"issuer/{number}")
        return found.value if found is not None else b""

    # ---- life ----

    def open(self) -> None:
        """Take over what was in force. Blocks for a moment."""
        self._in_force = read_if_whole(self._path, _InForce, _InForce())
        for key, signed in list(self._in_force.records.items()):
            self._take(key, signed)

    def start(self) -> None:
        """Read what came since."""
        self._read_on()

    def stop(self) -> None:
        self._stopped = True
        if self._worker is not None:
            self._worker.stop(5.0)

    def on_durable(self, partition: Log) -> None:
        if partition.topic == TRUST_TOPIC:
            self._read_on()

    # ---- reading ----

    def _read_on(self) -> None:
        partition = self._core.engine.log(TRUST_TOPIC, 0)
        if partition is None or self._busy or self._stopped:
            return
        state = self._in_force
        if state.log_id != partition.identity.log_id:  # another log of this name: what is in force stays
            state.log_id, state.offset = partition.identity.log_id, 0
        offset = max(state.offset, partition.log_start)
        if offset < partition.durable_end:
            self._busy = True
            self._core.engine.read_cold(partition, offset, READ_BYTES, partial(self._read, partition, offset))

    def _read(self, partition: Log, offset: int, result: ColdRead) -> None:
        if result.error:
            self._again()
            return
        if result.corrupt is not None:
            self._done(result.corrupt.next, [], [])
            return
        try:
            found = batch.decode(result.data, partition.topic, partition.partition, offset, result.next_offset - 1)
        except CorruptBatchError as error:
            log.error("%s at %d cannot be read: %s", TRUST_TOPIC, offset, error)
            found = []
        signed = [one for one in map(_signed, found) if one is not None]
        if not signed:
            self._done(result.next_offset, [], [])
            return
        issuers = {
            int(key.partition("/")[2]): one.value
            for key, one in self._in_force.records.items()
            if key.startswith("issuer/")
        }

        def told(good: list[bool] | None, error: str, code: str) -> None:
            if good is None:
                log.warning("records of %s cannot be verified now: %s", TRUST_TOPIC, error)
                self._again()
            else:
                self._done(result.next_offset, signed, good)

        self._helper.do(Verify(records=signed, issuers=issuers), list[bool], told)

    def _again(self) -> None:
        self._busy = False
        self._scheduler.call_later(RETRY_SECONDS, self._read_on)

    def _done(self, next_offset: int, signed: Sequence[SignedRecord], good: Sequence[bool]) -> None:
        """Put into force what is signed as it has to be, store it, and read on."""
        changed = []
        for record, verified in zip(signed, good, strict=True):
            if not verified:
                self.ignored += 1
                log.error("a record of %s is not signed by an issuer of this fleet: %s", TRUST_TOPIC, record.key)
            elif len(self._in_force.records) < MOST_RECORDS and self._take(record.key, record):
                self._in_force.records[record.key] = record
                changed.append(record.key)
        dropped, self._dropped = self._dropped, []
        # What a thief had planted may have kept a decision of the root from being in force: all is read again.
        self._in_force.offset = next_offset if not dropped else 0
        changed += dropped
        self._store()
        if changed:
            for told in list(self.changed):
                told(changed)

    def _store(self) -> None:
        if self._worker is None:
            self._worker = Worker("trust-records")
        state = _InForce(self._in_force.log_id, self._in_force.offset, dict(self._in_force.records))

        def work() -> None:
            try:
                write_checked(self._path, state)
            except OSError as error:
                log.error("%s cannot be stored: %s", self._path, error.strerror)
            self._scheduler.call_soon_threadsafe(stored)

        def stored() -> None:
            self._busy = False
            self._read_on()

        self._worker.submit(work)

    def _take(self, key: str, signed: SignedRecord) -> bool:
        """Obey a record, unless a newer one is in force. One of a kind that only a later release knows is kept."""
        kind, _, name = key.partition("/")
        if kind == "issuer":
            return key not in self._in_force.records or self._in_force.records[key] is signed
        try:
            said = json.decode(signed.value, TrustRecord)
        except msgspec.DecodeError:
            return False
        if self.retired(signed.issuer) or (kind == "retired" and not _may_retire(signed.issuer, name)):
            log.error("a record of %s is signed by an issuer that is retired: %s", TRUST_TOPIC, key)
            return False
        known = self._said.get(key)
        if known is not None and known.serial >= said.serial:
            return False
        self._said[key] = said
        if kind == "revoked":
            (self._revoked.add if said.state == "revoked" else self._revoked.discard)(name)
        elif kind == "retired":
            self._drop_records_of(name)
        return True

    def _drop_records_of(self, issuer: str) -> None:
        """What only a retired issuer has signed counts for nothing: the root has signed again what is to count."""
        signed = {
            key: str(one.issuer)
            for key, one in self._in_force.records.items()
            if not key.startswith(("issuer/", "retired/"))
        }
        for key in [key for key, number in signed.items() if number == issuer]:
            del self._in_force.records[key]
            self._said.pop(key, None)
            if key.startswith("revoked/"):
                self._revoked.discard(key.partition("/")[2])
            self._dropped.append(key)


def _may_retire(issuer: int, name: str) -> bool:
    """Only an issuer that came later retires one."""
    return name.isdecimal() and issuer > int(name[:9])


def _signed(record: records.Record) -> SignedRecord | None:
    """A record as it was signed; None for one that says nothing."""
    if record.key is None or record.value is None:
        return None
    header = dict(record.headers).get(HEADER) or b"\0\0"
    try:
        key = record.key.decode("ascii")
    except UnicodeDecodeError:
        return None
    return SignedRecord(key=key, value=record.value, issuer=int.from_bytes(header[:2], "big"), signature=header[2:])
