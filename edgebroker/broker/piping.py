"""Following a parent: this node as a child. The follower thinks, the HTTP client carries, the engine stores.

    poll -> HELLO: topics are made or changed -> DATA -> engine.append_numbered -> the commit of every publish
         -> refusals: look up chains, cut, begin anew, or wait -> the next poll

One connection to one parent at a time. What has to be done before more may come (topics, a cut) holds the reading up.
The pipe pauses while the disk is full, and above the high watermark of what waits for the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from edgebroker.broker.feeding import Node
from edgebroker.broker.metrics import Metrics
from edgebroker.common.batch import Reason
from edgebroker.common.errors import Code
from edgebroker.common.types import TopicPartition
from edgebroker.network.httpclient import HttpClient
from edgebroker.network.loop import Loop, TimerHandle
from edgebroker.pipe.candidates import Candidates
from edgebroker.pipe.follower import Changed, Compare, Cut, Event, Follower, Greeted, Line, Look, Restart, Taken
from edgebroker.pipe.stream import PartitionInfo, Point, TopicInfo
from edgebroker.storage.engine import Log, MirrorEngine
from edgebroker.storage.identity import Identity

log = logging.getLogger(__name__)

STAGED_HIGH_BYTES, STAGED_LOW_BYTES = 16 << 20, 4 << 20
# An answer lasts 90 seconds; who hears nothing for longer has lost its parent.
SILENT_SECONDS = 120.0
RETRY_SECONDS = 1.0
POLL_GAP_SECONDS = 0.02


class Moves(NamedTuple):
    """What the node does with its readers when a log changes under them. `cutting` moves places that stand behind an
    offset and calls back once that is stored; `cut` and `restarted` are told when it is done."""

    cutting: Callable[[Log, int, Callable[[], None]], None]
    cut: Callable[[Log], None]
    restarted: Callable[[Log, bool], None]


class Piping:
    """Owned by the loop thread. `bytes_per_second` 0: no cap."""

    def __init__(
        self,
        engine: MirrorEngine,
        loop: Loop,
        metrics: Metrics,
        node: Node,
        candidates: Candidates,
        patterns: list[str],
        bytes_per_second: int,
        moves: Moves,
    ) -> None:
        self._engine, self._loop, self._metrics, self._node = engine, loop, metrics, node
        self._candidates, self._cap, self._moves = candidates, bytes_per_second, moves
        self._follower = Follower(node.uid, node.name, node.level, patterns, self)
        self._client = HttpClient(loop, self)
        self._timer: TimerHandle | None = None
        self._status = 0
        self._retry_after = 0.0
        self._error = bytearray()
        # Things to be finished before the next poll, and before more is read.
        self._busy = 0
        self._complete = self._reconnecting = self._stopped = False
        self._tokens, self._tokens_at = float(bytes_per_second), 0.0
        self._throttled = False
        self._offered: dict[str, TopicInfo] = {}
        self._changing: set[str] = set()
        self._last_heard = 0.0
        self.connected = False
        self.path: list[str] = []
        self.parent_name = ""
        self.last_error = ""
        self.clashes: dict[str, str] = {}

    # ---- life ----

    def start(self) -> None:
        """Take up what this node mirrors already, and connect."""
        for partition in self._engine.logs():
            if partition.identity.origin != self._node.uid and self._follower.wants(partition.topic):
                self._follow(partition)
        self._open()
        self._watch()

    def stop(self) -> None:
        self._stopped = True
        self._client.stop()

    def _open(self) -> None:
        self._timer = None
        if not self._stopped:
            self._client.open(self._candidates.current)

    def _watch(self) -> None:
        """Once a second: a parent that fell silent, one that is behind for too long, a better one."""
        self._loop.call_later(1.0, self._watch)
        now = self._loop.now()
        if self._stopped:
            return
        if self.connected and now - self._last_heard > SILENT_SECONDS:
            self._client.close("the parent is silent")
        if self._candidates.behind(now, self.connected and self._follower.lacking) and self._candidates.move_on():
            log.warning("%s lacks what this node has; trying %s", self.parent_name, self._candidates.current)
            self._again("it is behind")
        for address in self._candidates.to_probe(now):
            Probe(self._loop, address, self._probed)
        self._flush()
        self._metrics.pipe_failovers = self._candidates.failovers
        self._metrics.pipe_bytes_in = self._follower.bytes_taken
        self._metrics.pipe_bytes_wasted = self._follower.bytes_wasted

    def _probed(self, address: str, healthy: bool) -> None:
        if not self._stopped and self._candidates.probed(address, healthy, self._loop.now()):
            log.info("back to %s", address)
            self._again("a better parent is back")

    # ---- the client's owner ----

    def on_connected(self) -> None:
        self._last_heard = self._loop.now()
        self._poll()

    def on_response(self, status: int, retry_after: float) -> None:
        self._status, self._retry_after = status, retry_after
        self._last_heard = self._loop.now()
        self._error.clear()

    def on_body(self, data: memoryview) -> None:
        self._last_heard = self._loop.now()
        if self._status != 200:
            self._error += data[:1000]
            return
        self._events(self._follower.receive(data))
        self._throttle(len(data))
        if self._engine.staged_bytes > STAGED_HIGH_BYTES:
            self._pause()

    def on_complete(self) -> None:
        if self._status != 200:
            text = bytes(self._error).decode(errors="replace").strip()
            self._client.close(f"it answered {self._status}: {text[:300]}")
            return
        self._complete = True
        self._go_on()

    def on_lost(self, reason: str) -> None:
        was, self.connected, self._complete = self.connected, False, False
        if self._stopped:
            return
        if self._reconnecting:
            self._reconnecting = False
            wait = POLL_GAP_SECONDS
        else:
            self.last_error = f"{self._candidates.current}: {reason}"
            self._metrics.pipe_lost += 1
            (log.warning if was else log.info)("no connection to the parent %s", self.last_error)
            wait = max(self._candidates.failed(), self._retry_after)
        self._retry_after = 0.0
        if self._timer is None:
            self._timer = self._loop.call_later(wait, self._open)

    def _again(self, reason: str) -> None:
        """Poll anew, on another connection: what the parent was asked is not what has to be asked now."""
        if self._timer is None:
            self._reconnecting = True
            self._client.close(reason)

    def _poll(self) -> None:
        if self._client.transport is None:
            return
        if self._busy:
            self._complete = True  # as soon as that is done
            return
        self._complete = False
        self._metrics.pipe_polls_sent += 1
        self._client.request("POST", "/v1/pipe", msgspec.json.encode(self._follower.poll()))

    def _go_on(self) -> None:
        """Something was finished: read on, or poll again."""
        if self._busy or self._stopped:
            return
        if self._complete:
            self._complete = False
            self._loop.call_later(POLL_GAP_SECONDS, self._poll)
        self._resume()

    def _pause(self) -> None:
        if self._client.transport is not None:
            self._client.transport.pause()

    def _resume(self) -> None:
        held = self._busy or self._throttled or self._engine.staged_bytes > STAGED_LOW_BYTES or self._engine.refusal()
        if not held and self._client.transport is not None and self._client.transport.paused:
            self._last_heard = self._loop.now()
            self._client.transport.resume()

    def _throttle(self, size: int) -> None:
        """A bucket of one second's worth."""
        if not self._cap:
            return
        now = self._loop.now()
        self._tokens = min(float(self._cap), self._tokens + (now - self._tokens_at) * self._cap) - size
        self._tokens_at = now
        if self._tokens < 0 and not self._throttled:
            self._throttled = True
            self._pause()

            def over() -> None:
                self._throttled = False
                self._resume()

            self._loop.call_later(-self._tokens / self._cap, over)

    # ---- the sink ----

    def append(self, key: TopicPartition, data: memoryview) -> Taken:
        """Batches from the parent, into the log."""
        partition = self._engine.log(*key)
        assert partition is not None
        if self._engine.refusal() is not None:
            self._pause()  # they are kept; _flush() tries again
            return Taken(0, Reason.OK, partition.staged_end, partition.staged_epoch)
        taken, reason = self._engine.append_numbered(partition, data)
        return Taken(taken, Reason(reason), partition.staged_end, partition.staged_epoch)

    def _flush(self) -> None:
        """What was held back by a full disk."""
        if self._engine.refusal() is None:
            self._follower.flush()
            self._resume()

    # ---- the engine's word ----

    def on_durable(self, partition: Log) -> None:
        self._resume()
        offered = self._offered.get(partition.topic)
        if offered is not None and offered.name not in self._changing and partition.partition < len(offered.partitions):
            first, following = offered.partitions[partition.partition].snapshot
            if partition.identity.snapshot[0] < first and partition.durable_end >= following:
                self._change(offered)

    def on_failed(self, partition: Log) -> None:
        """What was taken is not in the log: stand at its end again."""
        if TopicPartition(partition.topic, partition.partition) in self._follower.lines:
            self._follow(partition)
            self._again("something could not be stored")

    # ---- events ----

    def _events(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Greeted):
                self._greeted(event)
            elif isinstance(event, Compare):
                self._compare(event)
            elif isinstance(event, Look):
                self._look(event)
            elif isinstance(event, Cut):
                self._cut(event)
            elif isinstance(event, Restart):
                self._restart(event)
            else:
                self._changed(event)

    def _greeted(self, event: Greeted) -> None:
        hello = event.hello
        if not self.connected:
            log.info("the parent is %s (%s) at %s", hello.name, hello.level, self._candidates.current)
        self.connected, self.last_error = True, ""
        self.path, self.parent_name = [hello.uid, *hello.path], hello.name
        self._candidates.answered()
        for info in hello.topics:
            self._offered[info.name] = info
            self._topic(info)

    def _changed(self, event: Changed) -> None:
        self._metrics.refused(event.code)
        line = event.line
        if event.code == "OK":
            log.info("%s/%d is fed again", *line.key)
        elif event.code == "LOG_ID":
            log.error(
                "%s/%d: the parent has another log of this name; the old data is served on until an operator accepts "
                "the new one: edgebroker topic accept %s", *line.key, line.key.topic,
            )  # fmt: skip
        else:
            log.warning("%s/%d: %s", *line.key, line.why or event.code)

    def _follow(self, partition: Log) -> None:
        self._follower.follow(
            TopicPartition(partition.topic, partition.partition),
            partition.identity.log_id,
            partition.staged_epoch,
            partition.log_start,
            partition.written_end,
            partition.chain,
        )

    # ---- topics ----

    def _topic(self, info: TopicInfo) -> None:
        if not self._follower.wants(info.name):
            return
        logs = self._engine.partitions(info.name)
        if not logs:
            self._create(info)
        elif logs[0].identity.origin == self._node.uid:
            if info.name not in self.clashes:
                self._metrics.refused(Code.NAME_CLASH.name)
                log.error("topic %s is written at this node and at its parent; only this node's is served", info.name)
            self.clashes[info.name] = "written at this node and at its parent"
            self._follower.known[info.name] = info.digest
        elif len(logs) != len(info.partitions):
            self.clashes[info.name] = f"has {len(logs)} partitions here, {len(info.partitions)} at the parent"
        elif any(one.identity.log_id == part.log_id for one, part in zip(logs, info.partitions, strict=True)):
            self._change(info)
        else:
            self._follower.known[info.name] = info.digest  # another log: the lines say so

    def _create(self, info: TopicInfo) -> None:
        self._begin()

        def done(code: Code, message: str) -> None:
            if code in (Code.OK, Code.NAME_CLASH):
                self._follower.known[info.name] = info.digest
                for partition in self._engine.partitions(info.name):
                    self._follow(partition)
            else:
                log.error("topic %s cannot be taken over: %s; trying again", info.name, message)
            self._done(failed=code is not Code.OK)

        identities = [identity_of(info, part) for part in info.partitions]
        self._engine.create_mirror(info.name, identities, done)

    def _change(self, info: TopicInfo) -> None:
        """Take over what the origin decides: settings, histories, the newest snapshot (once its records are here)."""
        logs = self._engine.partitions(info.name)
        changes = [_changing(info, part, one) for part, one in zip(info.partitions, logs, strict=True)]
        if all(change(one.identity) == one.identity for change, one in zip(changes, logs, strict=True)):
            self._follower.known[info.name] = info.digest
            return
        self._begin()
        self._changing.add(info.name)

        def done(code: Code, message: str) -> None:
            self._changing.discard(info.name)
            if code is Code.OK:
                self._follower.known[info.name] = info.digest
            else:
                log.error("%s; trying again", message)
            self._done(failed=code is not Code.OK)

        self._engine.change_identities(info.name, changes, done)

    def accept(self, topic: str, done: Callable[[Code, str], None]) -> None:
        """An operator takes the parent's log instead of the one that was replaced; the old data is set aside."""
        replaced = [
            line for line in self._follower.lines.values() if line.key.topic == topic and line.state == "replaced"
        ]
        info = self._offered.get(topic)
        if not replaced or info is None:
            done(Code.UNKNOWN_TOPIC, f"{topic} was not replaced at the parent; there is nothing to accept")
            return
        left = [len(replaced)]
        failed: list[tuple[Code, str]] = []

        def one(code: Code, message: str, partition: Log) -> None:
            left[0] -= 1
            if code is Code.OK:
                self._follow(partition)
                self._moves.restarted(partition, True)
            else:
                failed.append((code, message))
            self._done(failed=code is not Code.OK)
            if not left[0]:
                done(*(failed[0] if failed else (Code.OK, "")))
                self._again("another log is followed")

        for line in replaced:
            found = self._engine.log(*line.key)
            assert found is not None
            line.state = "moving"
            self._begin()
            self._metrics.pipe_restarts += 1
            self._engine.restart(
                found,
                identity_of(info, info.partitions[line.key.partition]),
                lambda code, message, found=found: one(code, message, found),  # type: ignore[misc]
            )

    # ---- when the logs are not the same ----

    def _compare(self, event: Compare) -> None:
        partition = self._engine.log(*event.line.key)
        assert partition is not None

        def done(points: list[Point], error: str) -> None:
            known = {point.offset: point.chain for point in points}
            # Without a boundary there, or without an answer of the disk, it counts as the same: the parent catches up.
            same = error != "" or known.get(event.offset, event.chain) == event.chain
            self._events(self._follower.compared(event.line, same, event.offset))
            self._done()
            if not same:
                self._again("its log is another one")

        self._begin()
        self._engine.chains(partition, [event.offset], done)  # type: ignore[arg-type]

    def _look(self, event: Look) -> None:
        partition = self._engine.log(*event.line.key)
        assert partition is not None

        def done(points: list[Point], error: str) -> None:
            if error:
                log.warning("%s cannot be compared with the parent's: %s", partition.name, error)
            else:
                self._events(self._follower.looked(event.line, [Point(*point) for point in points]))
            self._done(failed=error != "")

        self._begin()
        self._engine.chains(partition, event.offsets, done)  # type: ignore[arg-type]

    def _cut(self, event: Cut) -> None:
        partition, offset = self._engine.log(*event.line.key), event.offset
        assert partition is not None
        self._begin()
        self._metrics.pipe_cuts += 1
        log.warning(
            "%s: the parent has another past from %d on; %d records are set aside", partition.name, offset,
            partition.durable_end - offset,
        )  # fmt: skip

        def done(code: Code, message: str) -> None:
            if code is Code.OK:
                self._follow(partition)
                self._moves.cut(partition)
                self._done()
            else:
                log.error("%s; trying again", message)
                self._loop.call_later(RETRY_SECONDS, lambda: self._retry(partition))

        self._moves.cutting(partition, offset, lambda: self._engine.cut(partition, offset, done))

    def _restart(self, event: Restart) -> None:
        partition = self._engine.log(*event.line.key)
        assert partition is not None
        self._begin()
        self._metrics.pipe_restarts += 1
        log.warning(
            "%s: the parent's log begins at %d, this node's ends at %d; going on there", partition.name, event.offset,
            partition.durable_end,
        )  # fmt: skip
        old = partition.identity
        identity = replace(
            old,
            log_start=event.offset,
            chain=event.chain,
            snapshot=old.snapshot if old.snapshot[0] >= event.offset else (-1, -1),
        )

        def done(code: Code, message: str) -> None:
            if code is Code.OK:
                self._follow(partition)
                self._moves.restarted(partition, False)
                self._done()
            else:
                log.error("%s; trying again", message)
                self._loop.call_later(RETRY_SECONDS, lambda: self._retry(partition))

        self._engine.restart(partition, identity, done)

    def _retry(self, partition: Log) -> None:
        self._follow(partition)
        self._done()

    def _begin(self) -> None:
        self._busy += 1
        self._pause()

    def _done(self, *, failed: bool = False) -> None:
        self._busy -= 1
        if failed:
            self._loop.call_later(RETRY_SECONDS, lambda: self._again("something could not be done"))
        else:
            self._go_on()

    # ---- telling ----

    def problems(self) -> dict[str, str]:
        """What an operator should see."""
        found = {}
        replaced = sorted({line.key.topic for line in self._follower.lines.values() if line.state == "replaced"})
        if replaced:
            found["replaced"] = f"another log at the parent: {', '.join(replaced)}; edgebroker topic accept TOPIC"
        if self.clashes:
            found["name_clash"] = "; ".join(f"topic {name}: {why}" for name, why in self.clashes.items())
        return found

    def describe(self) -> dict[str, object]:
        """For /v1/pipe."""
        return {
            "connected": self.connected,
            "address": self._candidates.current,
            "name": self.parent_name,
            "path": self.path,
            "candidates": self._candidates.addresses,
            "error": self.last_error,
            "heard_seconds_ago": round(self._loop.now() - self._last_heard, 3) if self._last_heard else None,
            "logs": [_describe(line) for line in self._follower.lines.values()],
        }


class Probe:
    """Is a node there and healthy? Told once."""

    def __init__(self, loop: Loop, address: str, told: Callable[[str, bool], None]) -> None:
        self._address, self._told = address, told
        self._client = HttpClient(loop, self)
        self._healthy: bool | None = None
        self._client.open(address)

    def on_connected(self) -> None:
        self._client.request("GET", "/healthz", b"")

    def on_response(self, status: int, retry_after: float) -> None:
        self._healthy = status == 200

    def on_body(self, data: memoryview) -> None:
        pass

    def on_complete(self) -> None:
        self._client.stop()

    def on_lost(self, reason: str) -> None:
        told, self._told = self._told, lambda address, healthy: None
        told(self._address, bool(self._healthy))


def identity_of(info: TopicInfo, part: PartitionInfo) -> Identity:
    """The identity of a mirror that begins where its parent begins."""
    return Identity(
        log_id=part.log_id,
        origin=part.origin,
        epochs=part.epochs,
        log_start=part.log_start,
        chain=part.chain,
        settings=info.settings,
    )


def _changing(info: TopicInfo, part: PartitionInfo, partition: Log) -> Callable[[Identity], Identity]:
    whole = part.snapshot[0] >= partition.log_start and partition.durable_end >= part.snapshot[1]
    same = partition.identity.log_id == part.log_id

    def change(old: Identity) -> Identity:
        if not same:
            return old
        snapshot = part.snapshot if whole else old.snapshot
        return replace(old, origin=part.origin, epochs=part.epochs, settings=info.settings, snapshot=snapshot)

    return change


def _describe(line: Line) -> dict[str, object]:
    return {
        "topic": line.key.topic,
        "partition": line.key.partition,
        "state": line.state,
        "why": line.why,
        "offset": line.offset,
        "unfinished_bytes": len(line.partial),
        "parent_end": line.parent_end,
        "lag": max(0, line.parent_end - line.offset) if line.parent_end >= 0 else None,
    }
