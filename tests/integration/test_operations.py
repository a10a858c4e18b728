"""What an operator does to a group over HTTP, with members connected: move it, refresh it, delete it, look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.common.types import Start
from edgebroker.network.wire.frames import FrameType, Intent, Subscribe
from edgebroker.storage.engine import Log
from tests.kit.brokers import RunningBroker, member, numbered, running

OFFSETS, REFRESH = "/v1/groups/g/offsets", "/v1/groups/g/refresh"


@pytest.fixture(params=["segment", "memory"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    """With ten records in each of t's two partitions, from 1,000 ms on, a second apart."""
    settings = {"storage.engine": request.param, "delivery.backoff_ms": 3_600_000, "delivery.max_backoff_ms": 3_600_000}
    with running(tmp_path / "data", settings) as found:
        fill(found)
        yield found


def fill(broker: RunningBroker, topic: str = "t") -> None:
    if not broker.call(lambda: broker.broker.engine.partitions(topic)):
        broker.create(topic, partitions=2)
    producer = broker.raw("producer")
    for partition in range(2):
        for offset in range(10):
            producer.publish(topic, batch.encode([(None, b"v", 1000 + 1000 * offset)]), partition=partition)


def group_of(broker: RunningBroker) -> dict[str, Any]:
    found: dict[str, Any] = broker.http("GET", "/v1/groups/g")[1]
    return found


def committed(broker: RunningBroker) -> list[int]:
    return [line["committed"] for line in group_of(broker)["partitions"]]


def moved(broker: RunningBroker, **wanted: object) -> list[tuple[int, int, int]]:
    """Move group g in topic t: (partition, from, to) of each."""
    status, answer = broker.http("POST", OFFSETS, {"topic": "t", **wanted})
    assert status == 200, answer
    assert (answer["group"], answer["dry_run"]) == ("g", wanted.get("dry_run", False))
    assert {line["topic"] for line in answer["partitions"]} == {"t"}
    return [(line["partition"], line["from"], line["to"]) for line in answer["partitions"]]


TARGETS: list[tuple[dict[str, object], int]] = [
    ({"to": "earliest"}, 0), ({"to": "latest"}, 10), ({"to": "0"}, 0), ({"to": "7"}, 7), ({"to": "10"}, 10),
    ({"to": "@0"}, 0), ({"to": "@3500"}, 3), ({"to": "@10000"}, 9), ({"to": "@99999999999999"}, 10),
    ({"shift": 2}, 6), ({"shift": -3}, 1), ({"shift": 99}, 10), ({"shift": -99}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "expected"), TARGETS)
def test_moving_a_group_that_reads(broker: RunningBroker, wanted: dict[str, object], expected: int) -> None:
    client = member(broker)
    leases = [client.assigned(partition) for partition in range(2)]
    for lease in leases:
        assert client.acked(lease, 4) is Code.OK
    while not client.silent(FrameType.DELIVER):
        client.deliver()
    # First looked at: nothing changes by that.
    assert moved(broker, dry_run=True, **wanted) == [(0, 4, expected), (1, 4, expected)]
    assert client.notices() == []
    assert committed(broker) == [4, 4]
    assert moved(broker, partition=1, **wanted) == [(1, 4, expected)]
    assert committed(broker) == [4, expected]
    again = client.assigned()
    assert (again.partition, again.offset, again.generation) == (1, expected, leases[1].generation)
    assert again.lease != leases[1].lease
    # What was in flight there is void, in the other partition it is not.
    assert client.acked(leases[1], 10) is Code.STALE
    assert client.acked(leases[0], 10) is Code.OK
    broker.raw("producer").publish("t", numbered(10, 1), partition=1)
    following = expected
    while following < 11:
        delivered = client.deliver()
        assert delivered.head.first == following
        following = delivered.head.last + 1


@pytest.mark.parametrize("wanted", [{"to": "5"}, {"to": "@6000"}, {"shift": 5}])
def test_moving_a_group_without_members_or_places(broker: RunningBroker, wanted: dict[str, object]) -> None:
    assert moved(broker, dry_run=True, **wanted) == [(0, -1, 5), (1, -1, 5)]
    assert broker.http("GET", "/v1/groups/g")[0] == 404  # looked at only
    assert moved(broker, **wanted) == [(0, -1, 5), (1, -1, 5)]
    assert committed(broker) == [5, 5]
    client = member(broker)
    assert {client.assigned().offset for _ in range(2)} == {5}


def test_a_move_is_stored_when_it_is_answered(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        fill(broker)
        moved(broker, to="6")
        assert broker.broker.engine.status().metadata_transactions
    with running(tmp_path / "data") as broker:
        assert committed(broker) == [6, 6]


def test_a_move_forgets_what_failed(broker: RunningBroker) -> None:
    client = member(broker, partition=0)
    assert client.nack(client.deliver().head, 0, "bad") is Code.OK
    while not client.silent(FrameType.DELIVER):
        client.deliver()
    assert group_of(broker)["partitions"][0]["attempts"] == 1
    assert moved(broker, partition=0, to="0") == [(0, 0, 0)]
    # The same record, at once and as if it had never failed.
    assert client.deliver().head.first == 0
    line = group_of(broker)["partitions"][0]
    assert (line["attempts"], line["reason"], line["member"]["isolated"]) == (0, "", False)


def test_moving_what_is_being_revoked_hands_it_over(broker: RunningBroker) -> None:
    old = member(broker, "old")
    while not old.silent(FrameType.DELIVER):
        old.deliver()
    new = member(broker, "new")
    moved(broker, to="3")
    lease = new.assigned()
    assert lease.offset == 3
    assert new.deliver().head.first == 3
    old.assigned(1 - lease.partition)
    assert committed(broker) == [3, 3]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_refresh_that_begins_while_a_time_is_looked_up(
    broker: RunningBroker, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is the refresh's then: nothing moves, in the other partition neither."""
    moved(broker, to="4")
    engine, groups = broker.broker.engine, broker.broker.core.groups
    look_up, refreshed = engine.offset_at_time, engine.log("t", 1)

    def slowly(log: Log, timestamp: int, done: Callable[[int, str], None]) -> None:
        def found(offset: int, error: str) -> None:
            if log is refreshed:
                broker.broker.core.refreshes.begin(groups.group("g", 0.0), log, lambda code, message: None)
            done(offset, error)

        look_up(log, timestamp, found)

    monkeypatch.setattr(engine, "offset_at_time", slowly)
    status, answer = broker.http("POST", OFFSETS, {"topic": "t", "to": "@6000", "dry_run": dry_run})
    assert (status, "t/1 is being refreshed" in answer["error"]) == (409, True)
    assert committed(broker) == [4, 0]
    lines = group_of(broker)["partitions"]
    assert [line["refresh"] and line["refresh"]["state"] for line in lines] == [None, "refreshing"]


@pytest.mark.parametrize(
    ("wanted", "status", "why"),
    [
        ({"topic": "t"}, 400, "either to"),
        ({"topic": "t", "to": "3", "shift": 1}, 400, "either to"),
        ({"topic": "u", "to": "3"}, 404, "no topic u"),
        ({"topic": "t", "partition": 2, "to": "3"}, 404, "partitions 0 to 1, not 2"),
        ({"topic": "t", "partition": -2, "to": "3"}, 404, "partitions 0 to 1, not -2"),
        ({"topic": "t", "to": "11"}, 400, "offsets 0 to 10, not 11"),
        ({"topic": "t", "to": "-1"}, 400, "earliest, latest, an offset, or @TIME"),
        ({"topic": "t", "to": "yesterday"}, 400, "'yesterday'"),
        ({"topic": "t", "to": "\u00b2"}, 400, "'\u00b2'"),
        ({"topic": "t", "to": "@"}, 400, "number of milliseconds"),
        ({"topic": "t", "to": "@soon"}, 400, "'@soon'"),
        ({"topic": "t", "to": "@\u00b2"}, 400, "'@\u00b2'"),
        ({"topic": "t", "to": "@-5"}, 400, "'@-5'"),
        ({"topic": "t", "to": "@" + "9" * 5000}, 400, "milliseconds"),
        ({"topic": "t", "to": "9" * 5000}, 400, "earliest"),
        ({"topic": "t", "to": "9" * 18}, 400, "offsets 0 to 10"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_moves_that_are_refused(
    broker: RunningBroker, wanted: dict[str, object], status: int, why: str, dry_run: bool
) -> None:
    answered, answer = broker.http("POST", OFFSETS, {**wanted, "dry_run": dry_run})
    assert (answered, why in answer["error"]) == (status, True), answer
    # Nothing was made by that, and nothing moved.
    assert broker.http("GET", "/v1/groups")[1] == {"groups": []}
    client = member(broker)
    assert {client.assigned().offset for _ in range(2)} == {0}
    assert broker.http("POST", OFFSETS, {**wanted, "dry_run": dry_run})[0] == status
    assert client.notices() == []
    assert committed(broker) == [0, 0]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", OFFSETS, None, 400),
        ("POST", OFFSETS, [], 400),
        ("POST", OFFSETS, {"to": "1"}, 400),
        ("POST", OFFSETS, {"topic": "t", "to": 1}, 400),
        ("POST", OFFSETS, {"topic": "t", "to": "1", "dry-run": True}, 400),
        ("POST", "/v1/groups/a%20b/offsets", {"topic": "t", "to": "1"}, 400),
        ("POST", "/v1/groups/a%2Fb/offsets", {"topic": "t", "to": "1"}, 400),
        ("POST", "/v1/groups//offsets", {"topic": "t", "to": "1"}, 400),
        ("POST", REFRESH, {"topic": "t"}, 404),
        ("DELETE", "/v1/groups/g", None, 404),
        ("GET", "/v1/groups/g", None, 404),
        ("GET", OFFSETS, None, 405),
        ("PUT", OFFSETS, {"topic": "t", "to": "1"}, 405),
        ("DELETE", OFFSETS, None, 405),
        ("DELETE", REFRESH, None, 405),
        ("POST", "/v1/groups/g", {}, 405),
        ("POST", "/v1/groups/g/members", {}, 404),
        ("POST", "/v1/groups", {}, 405),
    ],
)
def test_requests_that_are_none(broker: RunningBroker, method: str, path: str, body: object, status: int) -> None:
    found, answer = broker.http(method, path, body)
    assert found == status
    assert answer["error"]
    assert broker.http("GET", "/v1/groups")[1] == {"groups": []}


def test_deleting_a_group(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        fill(broker)
        clients = [member(broker, name) for name in ("first", "second")]
        for _ in range(2):
            assert clients[0].acked(clients[0].assigned(), 1) is Code.OK
        status, answer = broker.http("DELETE", "/v1/groups/g")
        assert status == 409
        assert "2 members" in answer["error"]
        assert committed(broker) == [1, 1]
        clients[0].leave("t")
        broker.drop(clients[1])
        assert broker.http("DELETE", "/v1/groups/g") == (200, {})
        assert broker.http("GET", "/v1/groups/g")[0] == 404
        assert broker.http("DELETE", "/v1/groups/g")[0] == 404
        # Whoever left and comes again is a member of the group that there is now, with everybody else.
        other = member(broker, "other")
        assert {other.assigned().offset for _ in range(2)} == {0}
        clients[0].subscribe("t", "g", start=Start.COMMITTED)
        assert len(group_of(broker)["members"]) == 2
        for client in (clients[0], other):
            client.leave("t")
        assert broker.http("DELETE", "/v1/groups/g")[0] == 200
    with running(tmp_path / "data") as broker:
        assert broker.http("GET", "/v1/groups")[1] == {"groups": []}


def test_a_group_as_an_operator_sees_it(broker: RunningBroker) -> None:
    first = broker.raw("first")
    lines = [Wanted("t", -1, Start.EARLIEST, NO_LOG_ID, -1, 0)]
    first.subscribe_raw(Subscribe(Intent.JOIN, "g", 0, 0, lines))
    heads = {}
    while len(heads) < 2:
        head = first.deliver().head
        heads.setdefault(head.partition, head)
    assert first.acked(heads[0], 1) is Code.OK
    pinned = broker.raw("pinned")
    pinned.subscribe("t", "g", partition=1)
    group = group_of(broker)
    assert (group["name"], group["generation"]) == ("g", heads[1].generation)
    assert group["members"] == [
        {"client_id": "first", "partitions": 2, "unresponsive": False},
        {"client_id": "pinned", "partitions": 0, "unresponsive": False},
    ]
    log_ids = [line["log_id"] for line in broker.http("GET", "/v1/topics/t")[1]["partitions"]]
    for number, line in enumerate(group["partitions"]):
        holder = line.pop("member")
        assert line.pop("lag_seconds") >= 0.0
        assert line == {
            "topic": "t", "partition": number, "committed": 1 - number, "applied": -1,
            "log_id": log_ids[number], "durable_end": 10,
            "lag": 9 + number, "attempts": 0, "reason": "", "refresh": None, "standbys": number,
        }  # fmt: skip
        assert (holder["client_id"], holder["topic"], holder["partition"]) == ("first", "t", number)
        assert (holder["state"], holder["why"], holder["isolated"]) == ("live", "", False)
        assert (holder["acked"], holder["next_offset"], holder["in_flight"]) == (1 - number, 10, 9 + number)
        assert (holder["generation"], holder["lease"]) == (heads[number].generation, heads[number].lease)
        assert holder["in_flight_bytes"] > 0
        assert holder["revoking"] is (number == 1)  # it goes to the one that wants nothing else
        assert (holder["last_ack_seconds_ago"] is None) is (number == 1)
    assert [one["members"] for one in broker.http("GET", "/v1/groups")[1]["groups"]] == [group["members"]]
    client = next(one for one in broker.http("GET", "/v1/clients")[1]["clients"] if one["client_id"] == "first")
    assert [one["partition"] for one in client["partitions"]] == [0, 1]


# ---- refreshing ----


def test_refreshing_a_group_that_reads(broker: RunningBroker) -> None:
    client = member(broker)
    leases = [client.assigned(partition) for partition in range(2)]
    assert client.acked(client.deliver().head, 1) is Code.OK
    assert broker.http("POST", REFRESH, {"topic": "t"})[0] == 200
    refreshes = {reset.partition: reset for reset in (client.reset(), client.reset())}
    assert {(reset.from_offset, reset.target) for reset in refreshes.values()} == {(0, 10)}
    assert [client.acked(lease, 10) for lease in leases] == [Code.STALE] * 2
    for number, line in enumerate(group_of(broker)["partitions"]):
        assert line["refresh"] == {
            "reset_id": refreshes[number].reset_id.hex(), "from": 0, "target": 10, "state": "refreshing",
        }  # fmt: skip
        assert line["member"]["state"] == "refresh"
    # Asked for again: it is the same one. Moving it is refused meanwhile.
    status, answer = broker.http("POST", REFRESH, {"topic": "t", "partition": 1})
    assert status == 200
    assert answer["partitions"][1]["refresh"]["reset_id"] == refreshes[1].reset_id.hex()
    status, answer = broker.http("POST", OFFSETS, {"topic": "t", "to": "3"})
    assert (status, "being refreshed" in answer["error"]) == (409, True)
    # Over in one partition when its member says so.
    assert client.accept(refreshes[1]).code is Code.OK
    lease = client.assigned(1)
    assert client.answer(client.send_ready(refreshes[1], 9)).code is Code.BEHIND
    assert client.acked(lease, 0) is Code.OK
    assert client.ready(refreshes[1], 10).next_offset == 10
    line = group_of(broker)["partitions"][1]["refresh"]
    assert line == {"reset_id": refreshes[1].reset_id.hex(), "from": 0, "target": None, "state": "ready"}
    assert moved(broker, partition=1, to="3") == [(1, 0, 3)]


def test_a_refresh_waits_for_a_member(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        fill(broker)
        moved(broker, to="6")
        status, group = broker.http("POST", REFRESH, {"topic": "t", "partition": 0})
        assert status == 200
        assert group["partitions"][1]["refresh"] is None
        reset_id = group["partitions"][0]["refresh"]["reset_id"]
    with running(tmp_path / "data") as broker:
        client = member(broker)
        reset = client.reset()
        assert (reset.reset_id.hex(), reset.partition) == (reset_id, 0)
        assert client.assigned().partition == 1


def test_refreshes_that_are_refused(broker: RunningBroker) -> None:
    moved(broker, to="6")
    for wanted, status, why in [
        ({"topic": "u"}, 404, "no topic u"),
        ({"topic": "t", "partition": 2}, 404, "partitions 0 to 1"),
        ({"topic": "t", "partition": -2}, 404, "partitions 0 to 1"),
        ({"topic": 3}, 400, ""),
        ({"topic": "t", "target": 3}, 400, ""),
    ]:
        found, answer = broker.http("POST", REFRESH, wanted)
        assert (found, why in answer["error"]) == (status, True)
    assert [line["refresh"] for line in group_of(broker)["partitions"]] == [None, None]


def test_a_table_that_is_not_complete_cannot_be_refreshed(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"storage.segment_bytes": 64 << 10}) as broker:
        broker.create("t", kind="table")
        producer = broker.raw("producer")
        for first in range(0, 400, 10):
            producer.publish("t", numbered(first, 10, 500))
    segment = min((tmp_path / "data" / "topics" / "t" / "0").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[data.index(b"....", len(data) // 2)] ^= 0x40
    segment.write_bytes(data)
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        client.subscribe("t", "g")
        assert client.answer().code is Code.DAMAGED
        status, answer = broker.http("POST", REFRESH, {"topic": "t"})
        assert (status, answer["code"]) == (409, "NO_SNAPSHOT")
        assert "--snapshot" in answer["error"]
        assert client.ask_reset("t").code is Code.NO_SNAPSHOT
        assert group_of(broker)["partitions"][0]["refresh"] is None
