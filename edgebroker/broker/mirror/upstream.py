"""Following a parent: this node as a child. The follower thinks, the HTTP client carries, the engine stores.

    poll -> HELLO: topics are made or changed -> DATA -> engine.append_numbered -> the commit of every publish
         -> refusals: look up chains, truncate, recreate, or wait -> the next poll

One connection to one parent at a time. What has to be done before more may come (topics, a cut) holds the reading up.
The pipe pauses while the disk is full, and above the high watermark of what waits for the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec

from edgebroker.broker.mirror.mirrors import Mirrors, ReaderHooks
from edgebroker.broker.mirror.parent_topic import parent_logs
from edgebroker.broker.mirror.receipts import Receipts
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import NodeInfo
from edgebroker.common.batch import Reason
from edgebroker.common.crc32c import crc32c
from edgebroker.common.outcome import Done
from edgebroker.common.types import TopicPartition
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.client import RECEIVE_BYTES
from edgebroker.network.http.peers import Peers
from edgebroker.network.http.server import BYTES_TYPE
from edgebroker.network.io.loop import TimerHandle
from edgebroker.pipe.candidates import LONGEST_PAUSE, Candidates
from edgebroker.pipe.follower import (
    AppendResult,
    ConfirmWanted,
    DirectivesReceived,
    Event,
    FollowedLog,
    Follower,
    HelloReceived,
    StateChanged,
)
from edgebroker.pipe.report import Directive
from edgebroker.pipe.stream import MAX_SAME_BYTES, SamePoll
from edgebroker.storage.engine import Log, MirrorEngine

log = logging.getLogger(__name__)

STAGED_HIGH_BYTES, STAGED_LOW_BYTES = 16 << 20, 4 << 20
# A parent says something every 45 seconds; who hears nothing for longer has lost it, or the line.
SILENT_SECONDS = 57.0
ALIVE_SECONDS = 14.0
RETRY_SECONDS, NAMELESS_SECONDS = 1.0, 0.1
POLL_GAP_SECONDS, LONGEST_GAP_SECONDS = 0.02, 2.0


class ReplicaStatus(msgspec.Struct, kw_only=True):
    """A log that is followed. `offset`: up to where it is here; `unfinished_bytes`: of the batch there; `parent_end`
    and `lag` in records, -1 and null while they are not known."""

    topic: str
    partition: int
    state: str
    why: str
    offset: int
    unfinished_bytes: int
    parent_end: int
    lag: int | None


class ParentStatus(msgspec.Struct, kw_only=True):
    """The parent of this node. `path`: node uids from the parent to the root; `heard_seconds_ago` null: not yet."""

    connected: bool
    address: str
    name: str
    path: list[str]
    candidates: list[str]
    error: str
    heard_seconds_ago: float | None
    logs: list[ReplicaStatus]


class Upstream:
    """Owned by the loop thread. `bytes_per_second` 0: no cap."""

    def __init__(
        self,
        engine: MirrorEngine,
        peers: Peers,
        metrics: Metrics,
        node: NodeInfo,
        candidates: Candidates,
        patterns: list[str],
        bytes_per_second: int,
        hours: str,
        hooks: ReaderHooks,
        directed: Callable[[list[Directive]], None],
        *,
        pin: bool = False,
    ) -> None:
        self._engine, self._metrics, self._node = engine, metrics, node
        self._peers, self._loop = peers, peers.loop
        self.candidates, self._cap, self._directed = candidates, bytes_per_second, directed
        self._follower = Follower(node.uid, node.name, node.level, patterns, self, hours, pin=pin)
        receive_bytes = max(4 << 10, min(RECEIVE_BYTES, bytes_per_second or RECEIVE_BYTES))
        self._client = peers.client(self, receive_bytes)
        self._receipts = Receipts(engine, peers, node.uid)
        self._mirrors = Mirrors(engine, peers.loop, metrics, node.uid, self._follower, self, hooks)
        self._timer: TimerHandle | None = None
        self._status = 0
        self._retry_after = 0.0
        self._error = bytearray()
        # Things to be finished before the next poll, and before more is read.
        self._busy = 0
        self._complete = self._reconnecting = self.stopped = False
        self._tokens, self._tokens_at = float(bytes_per_second), 0.0
        self._throttled = False
        self._last_heard = self._polled_at = self._connected_at = self._alive_at = 0.0
        # What the parent was asked last: it need not be sent again while nothing of it changes.
        self._said, self._asked_same = b"", False
        self._pause_seconds = POLL_GAP_SECONDS
        # There is one at most: the answer to another one would be taken for that to the first.
        self._next_poll: TimerHandle | None = None
        self._taken_before = -1
        self.connected = False
        # Grows with every connection that a parent answered; who is told then.
        self.connections = 0
        self.on_parent: Callable[[], None] = lambda: None
        self.path: list[str] = []
        self.parent_name = ""
        self.last_error = ""

    # ---- life ----

    def start(self) -> None:
        """Take up what this node mirrors already, and connect."""
        for partition in self._engine.logs():
            if partition.identity.origin != self._node.uid and self._follower.wants(partition.topic):
                self._mirrors.follow(partition)
        self._open()
        self._watch()

    def stop(self) -> None:
        self.stopped = True
        self._client.stop()
        self._receipts.stop()

    def _open(self) -> None:
        self._timer = None
        if self.stopped:
            return
        if self.candidates.current:
            self._client.open(self.candidates.current)
        else:
            self._timer = self._loop.call_later(NAMELESS_SECONDS, self._open)  # until the registry names one

    def _watch(self) -> None:
        """Once a second: a parent that fell silent, one that is behind for too long, a better one."""
        if self.stopped:
            return
        self._loop.call_later(1.0, self._watch)
        now = self._loop.now()
        transport = self._client.transport
        listening = transport is not None and not transport.paused
        if listening and now - max(self._last_heard, self._connected_at) > SILENT_SECONDS:
            self._client.close("the parent is silent")
        if self.connected and now - max(self._polled_at, self._alive_at) >= ALIVE_SECONDS:
            self._alive_at = now
            self._client.say_alive()
        if self.candidates.behind(now, self.connected and self._follower.lacking):
            self._look_around()
        for address in self.candidates.to_probe(now):
            HttpCall(
                self._peers,
                address,
                "GET",
                "/healthz",
                b"",
                partial(self._probe_answered, address),
            )
        self._flush()
        self._metrics.pipe_failovers = self.candidates.failovers
        self._metrics.pipe_bytes_in = self._follower.bytes_taken
        self._metrics.pipe_bytes_wasted = self._follower.bytes_wasted

    def _look_around(self) -> None:
        """The parent lacks something: go to the candidate that has most of it, if one has more."""
        line = next(line for line in self._follower.lines.values() if line.lacking)
        others = [address for address in self.candidates.addresses if address != self.candidates.current]
        ends: dict[str, int] = {}

        def told(address: str, status: int, answer: bytes, error: str) -> None:
            ends[address] = -1 if error else _end_at(answer, line)
            best = max(ends, key=lambda one: ends[one])  # of those that are equal the first to answer
            here = line.parent_end if line.state == "behind" else -1
            if len(ends) < len(others) or self.stopped or not line.lacking or ends[best] <= here:
                return
            if best in self.candidates.addresses:
                log.warning("%s lacks what this node has or wants; going to %s", self.parent_name, best)
                self.candidates.go_to(best)
                self.again("it is behind")

        for address in others:
            HttpCall(
                self._peers,
                address,
                "POST",
                f"/v1/pipe/topics/{line.key.topic}",
                b"",
                partial(told, address),
            )

    def _probe_answered(self, address: str, status: int, body: bytes, error: str) -> None:
        self._probed(address, status == 200)

    def _probed(self, address: str, healthy: bool) -> None:
        if not self.stopped and self.candidates.probed(address, healthy, self._loop.now()):
            log.info("back to %s", address)
            self.again("a better parent is back")

    # ---- the client's owner ----

    def on_connected(self) -> None:
        self._connected_at = self._loop.now()
        self._complete = True
        self._advance()

    def on_response(self, status: int, retry_after: float) -> None:
        self._status, self._retry_after = status, retry_after
        self._last_heard = self._loop.now()
        self._error.clear()
        if status == 200 and self._client.content_type != BYTES_TYPE:
            kind = self._client.content_type or "something"
            self._client.close(f"it answers with {kind}: not a node, but a captive portal or another service")

    def on_body(self, data: memoryview) -> None:
        self._last_heard = self._loop.now()
        if self._status != 200:
            self._error += data[:1000]
            return
        self.do(self._follower.receive(data))
        self._throttle(len(data))
        if self._engine.staged_bytes > STAGED_HIGH_BYTES:
            self._pause()

    def on_complete(self) -> None:
        if self._status == 409 and self._asked_same:
            self._said = b""  # the parent was restarted, and has forgotten
            self._poll()
            return
        if self._status != 200:
            self._said = b""
            text = bytes(self._error).decode(errors="replace").strip()
            self._client.close(f"it answered {self._status}: {text[:300]}")
            return
        self._complete = True
        self._advance()

    def on_lost(self, reason: str) -> None:
        was, self.connected, self._complete, self._said = self.connected, False, False, b""
        if self.stopped:
            return
        if self._reconnecting:
            self._reconnecting = False
            wait = POLL_GAP_SECONDS
        else:
            self.last_error = f"{self.candidates.current}: {reason}"
            self._metrics.pipe_lost += 1
            (log.warning if was else log.info)("no connection to the parent %s", self.last_error)
            wait = max(self.candidates.failed(), min(self._retry_after, LONGEST_PAUSE))
        self._retry_after = 0.0
        if self._timer is None:
            self._timer = self._loop.call_later(wait, self._open)

    def again(self, reason: str) -> None:
        """Poll again, on another connection: what the parent was asked is not what has to be asked now."""
        if self._timer is None:
            self._reconnecting = True
            self._client.close(reason)

    def at_once(self, reason: str) -> None:
        """Why the parent could not be reached is over: do not wait for the next attempt."""
        self.candidates.answered()
        self._open_now(reason)

    def look_at(self, address: str) -> None:
        """A candidate may have become a parent: ask it at once, while there is none."""
        if self.connected or self.stopped or address not in self.candidates.addresses:
            return
        self.candidates.go_to(address)
        self._open_now("another candidate was promoted")

    def _open_now(self, reason: str) -> None:
        """Connect without a pause, on another connection if there is one."""
        if self._timer is not None:
            self._timer.cancel()
            self._open()
        else:
            self.again(reason)

    def _poll(self) -> None:
        self._next_poll = None
        if self._client.transport is None:
            return
        if self._busy or self._throttled:
            self._complete = True  # as soon as that is over
            return
        self._complete = False
        self._polled_at, self._taken_before = self._loop.now(), self._follower.bytes_taken
        self._metrics.pipe_polls_sent += 1
        body = msgspec.json.encode(self._follower.poll())
        self._asked_same = body == self._said
        self._said = body if len(body) <= MAX_SAME_BYTES else b""
        if self._asked_same:
            body = msgspec.json.encode(SamePoll(uid=self._node.uid, same=crc32c(body)))
        self._client.request("POST", "/v1/pipe", body)

    def _advance(self) -> None:
        """Something was finished: read on, or poll again."""
        if self._busy or self.stopped:
            return
        if self._complete and not self._throttled:
            self._complete = False
            if self._next_poll is not None:  # of a connection that has ended meanwhile
                self._next_poll.cancel()
            self._next_poll = self._loop.call_later(self._gap(), self._poll)
        self._resume()

    def _gap(self) -> float:
        """How long to wait with the next poll: the longer, the more of them led to nothing."""
        idle = self._loop.now() - self._polled_at < 1.0 and self._follower.bytes_taken == self._taken_before
        self._pause_seconds = min(LONGEST_GAP_SECONDS, self._pause_seconds * 2) if idle else POLL_GAP_SECONDS
        return self._pause_seconds

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
        if self._tokens < 0:
            self._pause()
        if self._tokens < 0 and not self._throttled:
            self._throttled = True

            def over() -> None:
                self._throttled = False
                self._advance()

            self._loop.call_later(-self._tokens / self._cap, over)

    # ---- the sink ----

    def append(self, key: TopicPartition, data: memoryview) -> AppendResult:
        """Batches from the parent, into the log."""
        partition = self._engine.log(*key)
        assert partition is not None
        if self._engine.refusal() is not None:
            self._pause()  # they are kept; _flush() tries again
            return AppendResult(0, Reason.OK, partition.staged_end, partition.staged_epoch)
        taken, reason = self._engine.append_numbered(partition, data)
        return AppendResult(taken, Reason(reason), partition.staged_end, partition.staged_epoch)

    def _flush(self) -> None:
        """What was held back by a full disk."""
        if self._engine.refusal() is None:
            self._follower.flush()
            self._resume()

    # ---- the engine's word ----

    def on_durable(self, partition: Log) -> None:
        self._resume()
        self._receipts.on_durable(partition)
        self._mirrors.on_durable(partition)

    def on_failed(self, partition: Log) -> None:
        """What was taken is not in the log: begin at its end again."""
        if TopicPartition(partition.topic, partition.partition) in self._follower.lines:
            self._mirrors.follow(partition)
            self.again("something could not be stored")

    # ---- events ----

    def do(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, HelloReceived):
                self._greeted(event)
            elif isinstance(event, StateChanged):
                self._changed(event)
            elif isinstance(event, DirectivesReceived):
                self._directed(event.directives)
            elif isinstance(event, ConfirmWanted):
                self._receipts.wanted(self.candidates.current, event.line.key, event.offset)
            else:
                self._mirrors.do(event)

    @property
    def identity(self) -> str:
        """Who the parent is, by its certificate; "" without one, or a connection."""
        return self._client.identity

    def _greeted(self, event: HelloReceived) -> None:
        hello = event.hello
        false = self._peers.parent_refusal(self._client.identity, hello.uid)
        if false:
            self._client.close(false)
            return
        if not self.connected:
            self.connections += 1
            log.info("the parent is %s (%s) at %s", hello.name, hello.level, self.candidates.current)
            self._loop.call_later(0.0, self.on_parent)
        self.connected, self.last_error = True, ""
        if self.path and self.path[0] != hello.uid:
            self._mirrors.forget_offers()
        self.path, self.parent_name = [hello.uid, *hello.path], hello.name
        self.candidates.answered()
        for info in hello.topics:
            self._mirrors.offered(info)

    def _changed(self, event: StateChanged) -> None:
        self._metrics.refused(event.code)
        line = event.line
        if event.code == "OK":
            log.info("%s/%d: replication resumed", *line.key)
        elif event.code == "LOG_ID":
            log.error(
                "%s/%d: the parent has another log of this name; the old data is served on until an operator accepts "
                "the new one: edgebroker topic accept %s", *line.key, line.key.topic,
            )  # fmt: skip
        else:
            log.warning("%s/%d: %s", *line.key, line.why or event.code)

    def begin(self) -> None:
        self._busy += 1
        self._pause()

    def done(self, *, failed: bool = False) -> None:
        self._busy -= 1
        if failed:
            self._loop.call_later(RETRY_SECONDS, lambda: self.again("something could not be done"))
        else:
            self._advance()

    # ---- telling ----

    def accept(self, topic: str, done: Done) -> None:
        """An operator takes the parent's log instead of the one that was replaced."""
        self._mirrors.accept(topic, done)

    def free(self, topic: str) -> None:
        """Nothing here is in the way of the parent's topic of that name any more."""
        self._mirrors.free(topic)

    def carries(self, topic: str) -> bool:
        """Would the parent send a topic again that is deleted here? Only a parent that says so does not."""
        lines = self.lines(topic)
        return not lines or any(line.state not in ("not_carried", "replaced") for line in lines)

    def recreate(self, topic: str, done: Done) -> None:
        """Fetch all of a topic again; what is here goes first."""
        self._mirrors.recreate(topic, done)

    def hold(self, topic: str) -> None:
        """Take nothing more of a topic until follow_again(); the others go on."""
        for line in self.lines(topic):
            line.state = "moving"

    def follow_again(self, topic: str) -> None:
        """Begin at the end of its logs, as they are now."""
        for partition in self._engine.partitions(topic):
            self._mirrors.follow(partition)
        self.again("the topic's logs were replaced")

    def lines(self, topic: str) -> list[FollowedLog]:
        """Where this node stands in the logs of a topic."""
        return [line for line in self._follower.lines.values() if line.key.topic == topic]

    def follow_others(self, parents: Sequence[str]) -> None:
        """Ask these nodes from now on."""
        if list(parents) != self.candidates.addresses and self.candidates.replace(parents):
            self.again("the candidate list changed")

    @property
    def address(self) -> str:
        """Where the parent is."""
        return self.candidates.current

    def problems(self) -> dict[str, str]:
        """What an operator should see."""
        found = {}
        replaced = sorted({line.key.topic for line in self._follower.lines.values() if line.state == "replaced"})
        if replaced:
            found["replaced"] = f"another log at the parent: {', '.join(replaced)}; edgebroker topic accept TOPIC"
        if self._mirrors.clashes:
            found["name_clash"] = "; ".join(f"topic {name}: {why}" for name, why in self._mirrors.clashes.items())
        if self._mirrors.refused:
            found["not_mirrored"] = "; ".join(f"topic {name}: {why}" for name, why in self._mirrors.refused.items())
        lacking = sorted({line.key.topic for line in self._follower.lines.values() if line.state == "not_carried"})
        if lacking and self.connected:
            found["not_carried"] = f"the parent does not have {', '.join(lacking)}; what is here is served"
        return found

    def limit(self, bytes_per_second: int, hours: str) -> None:
        """Another cap and other hours, from the next poll on."""
        self._cap, self._follower.hours = bytes_per_second, hours

    @property
    def lag(self) -> int:
        """Records that the parent has and this node lacks, as far as that is known."""
        return sum(max(0, line.parent_end - line.offset) for line in self._follower.lines.values())

    @property
    def last_heard(self) -> float:
        """When the parent said something last, in the loop's time; 0 before."""
        return self._last_heard

    def describe(self) -> ParentStatus:
        """For /v1/pipe."""
        return ParentStatus(
            connected=self.connected,
            address=self.candidates.current,
            name=self.parent_name,
            path=self.path,
            candidates=self.candidates.addresses,
            error=self.last_error,
            heard_seconds_ago=round(self._loop.now() - self._last_heard, 3) if self._last_heard else None,
            logs=[_describe(line) for line in self._follower.lines.values()],
        )


def _end_at(answer: bytes, line: FollowedLog) -> int:
    """Up to where a node has a log, from its description of the topic; -1 when it has not, or only damaged."""
    try:
        log = parent_logs(answer)[line.key.partition]
    except (msgspec.DecodeError, IndexError):
        return -1
    whole = not any(corrupt.last >= line.offset for corrupt in log.damaged)
    return log.durable_end if log.log_id == line.log_id and whole else -1


def _describe(line: FollowedLog) -> ReplicaStatus:
    return ReplicaStatus(
        topic=line.key.topic,
        partition=line.key.partition,
        state=line.state,
        why=line.why,
        offset=line.offset,
        unfinished_bytes=len(line.partial),
        parent_end=line.parent_end,
        lag=max(0, line.parent_end - line.offset) if line.parent_end >= 0 else None,
    )
