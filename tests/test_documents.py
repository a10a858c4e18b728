"""The documents are enough: programs written from them alone work against a broker, and what they cite is there."""

from __future__ import annotations

import argparse
import ast
import json
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

import edgebroker
from edgebroker.broker.admin.offsets import MoveRequest
from edgebroker.broker.admin.routes import pipe_routes, routes
from edgebroker.broker.delivery.dead_letters import HEADERS
from edgebroker.broker.delivery.state import CursorState
from edgebroker.broker.delivery.table_snapshots import BEGIN, END
from edgebroker.broker.observe.metrics import counters_of
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.cli.main import build_parser
from edgebroker.common.errors import Code
from edgebroker.common.messages import AckKind, GapReason, Holding
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import AckLevel, Start, TopicSettings
from edgebroker.network.http.router import Route
from edgebroker.network.wire.frames import FrameType, Intent
from edgebroker.storage.metadata import meta_db as meta
from tests.kit import tiny_client, tiny_reader, vocabulary
from tests.kit.brokers import RunningBroker, batch_of, numbered, running
from tests.kit.tiny_client import Record, TinyClient
from tests.kit.trees import reported

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "edgebroker").rglob("*.md")),
]
SETTINGS = {"EDGEBROKER_STORAGE_SEGMENT_BYTES": "65536", "EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0"}
TOPIC, GROUP = "prices", "shelf-labels"
SILENCE = 5.0  # seconds after which a test gives up


def some_records() -> list[Record]:
    records = []
    for number in range(1000):
        key = f"item-{number}".encode() if number % 7 else None
        value = f'{{"item": {number}, "text": "{"x" * 200}"}}'.encode() if number % 11 else None
        headers = (("number", str(number).encode()), ("nothing", None)) if number % 3 else ()
        records.append(Record(value, key, headers, 1_700_000_000_000 + (number * 37) % 1000))
    return records


def client_of(broker: BrokerProcess, name: str, producer: tuple[int, int] = tiny_client.NOBODY) -> closing[TinyClient]:
    client = TinyClient(broker.server, name, producer)
    client.idle = SILENCE
    return closing(client)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the tiny client saw of a broker that is stopped by now."""
    sent, story = some_records(), SimpleNamespace(sent=some_records())
    batches = [sent[at : at + 100] for at in range(0, len(sent), 100)]
    with BrokerProcess(tmp_path_factory.mktemp("documents") / "node", settings=SETTINGS) as broker:
        story.directory = Path(broker.directory)
        with client_of(broker, "till-7") as client:
            producer = client.producer
            story.answers = [client.publish(TOPIC, 0, batch) for batch in batches]
        with client_of(broker, "till-7", producer) as client:
            story.producers = producer, client.producer
            story.second_answers = [client.publish(TOPIC, 0, batch) for batch in batches]
        with client_of(broker, "labels") as client:
            client.subscribe(TOPIC, GROUP)
            story.consumed = list(client.consume(len(sent)))
            story.left_over = len(client.deliveries)
        broker.stop()
    story.reader = tiny_reader.Reader(story.directory)
    story.stored = list(story.reader)
    return story


def test_what_was_published_is_consumed_in_order(story: SimpleNamespace) -> None:
    assert story.answers == list(range(0, 1000, 100))
    assert story.consumed == [record._replace(offset=offset) for offset, record in enumerate(story.sent)]
    assert not story.left_over


def test_the_same_sequences_of_the_same_producer_are_recognised(story: SimpleNamespace) -> None:
    assert story.producers[0] == story.producers[1]
    assert story.second_answers == story.answers


def test_the_files_hold_exactly_what_was_published(story: SimpleNamespace) -> None:
    assert story.reader.problems == []
    stored = [record for record in story.stored if record.topic == TOPIC]
    assert [Record(r.value, r.key, r.headers, r.timestamp, r.offset) for r in stored] == story.consumed
    indexes = [line for line in story.reader.found if ".index: " in line]
    assert len(indexes) >= 2, "no segment was sealed"


def test_the_snapshot_holds_the_places_of_the_groups(story: SimpleNamespace) -> None:
    log_id = tiny_reader.read_checked(story.directory / "topics" / TOPIC / "0" / "identity")["log_id"]
    places = tiny_reader.group_offsets(story.directory)
    assert places[GROUP, TOPIC, 0] == (log_id, 1, 1000)


def test_the_reader_notices_a_bit(story: SimpleNamespace, tmp_path: Path) -> None:
    """In the header of a batch in a sealed segment, outside of the CRC of the batch: only the chain tells."""
    source = story.directory / "topics" / TOPIC / "0"
    target = tmp_path / "topics" / TOPIC / "0"
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    first = target / f"{0:020}.log"
    changed = bytearray(first.read_bytes())
    changed[15] = 0  # the epoch, from 1
    first.write_bytes(changed)
    reader = tiny_reader.Reader(tmp_path)
    assert len(list(reader)) == 1000
    assert any("chain" in problem for problem in reader.problems)


def worked_example() -> list[bytes]:
    """The frames of the section of that name, in order."""
    frames: list[bytes] = []
    text = (ROOT / "docs" / "protocol.md").read_text().partition("## A worked example")[2].partition("\n## ")[0]
    for place, dump in re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ){0,15}[0-9a-f]{2})  ", text, re.MULTILINE):
        frames += [b""] if place == "0000" else []
        assert len(frames[-1]) == int(place, 16)
        frames[-1] += bytes.fromhex(dump)
    return frames


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends the frames that the document shows, when it is answered with those that it shows."""
    connect, granted, publish, stored, subscribe, subscribed, assigned, ends, deliver, *rest = worked_example()
    refuse, refused, assigned_again, ack, acknowledged, *refresh = rest
    ask, announced, asked, accept, assigned_anew, accepted, ready, done = refresh

    def under(notice: bytes) -> bytes:
        """The DELIVER that is not shown again, under the lease of a notice."""
        return deliver.replace(assigned[-16:-8], notice[-16:-8])

    def numbered(frame: bytes, correlation: int) -> bytes:
        return frame[:8] + correlation.to_bytes(8, "big") + frame[16:]

    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname(), timeout=None)
        far = server.accept()[0]
    monkeypatch.setattr(tiny_client.socket, "create_connection", lambda address: near)
    monkeypatch.setattr(tiny_client, "WINDOW", (100, 65536))
    record = Record(b'{"total":499}', b"store-17", (("v", b"1"),), 1_700_000_000_000)
    seen: list[Record] = []
    with far:
        far.settimeout(SILENCE)
        far.sendall(granted + stored + subscribed + assigned + ends + deliver)
        far.sendall(refused + assigned_again + ends + under(assigned_again) + acknowledged)
        far.sendall(announced + asked + assigned_anew + ends + under(assigned_anew) + accepted)
        far.sendall(numbered(acknowledged, 8) + done)
        with closing(TinyClient("nowhere:7420", "till-7")) as client:
            assert client.publish("sales", 0, [record]) == 0
            client.subscribe("sales", "billing")
            assert client.ack(client.next_delivery(), 0, tiny_client.NEGATIVE, "no such till")
            assert client.ack(client.next_delivery(), 1)
            client.ask_refresh("sales", 0)
            client.refresh(seen.extend, lambda: seen.append(record))
        sent = b"".join(iter(lambda: far.recv(65536), b""))
    assert seen == [record._replace(offset=0), record]
    no_topics = connect[:-8] + bytes(2)  # it does not ask about topics
    expected = (
        (len(no_topics) - 4).to_bytes(4, "big") + no_topics[4:] + publish + subscribe + refuse + ack + ask + accept
    )
    loaded = numbered(ack, 8).replace(assigned_again[-16:-8], assigned_anew[-16:-8])
    assert sent == expected + loaded + ready


def test_the_checksums_of_the_document() -> None:
    for crc32c in (tiny_client.crc32c, tiny_reader.crc32c):
        assert [crc32c(data) for data in (b"123456789", bytes(32), b"\xff" * 32)] == [
            0xE3069283,
            0x8A9136AA,
            0x62A8AB43,
        ]


@pytest.mark.parametrize(("name", "lines"), [("tiny_client.py", 200), ("tiny_reader.py", 150)])
def test_they_are_tiny_and_need_the_standard_library_only(name: str, lines: int) -> None:
    text = (TESTS / "kit" / name).read_text()
    assert len(text.splitlines()) < lines
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0] if not node.level else ".")
    assert imported <= sys.stdlib_module_names | {"__future__"}


PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()


def table(header: str, document: str = PROTOCOL) -> list[list[str]]:
    """The rows of the one table whose head begins with these cells."""
    found = re.findall(rf"^\| *{header}.*\n\|[-:| ]+\n((?:\|.*\n)+)", document, re.MULTILINE)
    assert len(found) == 1, (header, len(found))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]


def ticked(rows: list[list[str]], column: int = 0) -> list[str]:
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[column])]


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (r"Type \| Name", FrameType),
        (r"Level \| Name", AckLevel),
        (r"Intent \| Name", Intent),
        (r"Holding \| Name", Holding),
        (r"Start \| Name", Start),
        (r"Gap reason \| Name", GapReason),
        (r"Kind \| Name", AckKind),
    ],
)
def test_numbers_and_names(header: str, kind: type[IntEnum]) -> None:
    written = {(int(row[0]), row[1].upper()) for row in table(header)}
    assert written == {(member.value, member.name) for member in kind} - {(0, "ANSWER")}


def test_every_code(story: SimpleNamespace) -> None:
    rows = table(r"Code \| Name")
    assert [(int(row[0]), row[1].strip("`")) for row in rows] == [(code.value, code.name) for code in Code]
    assert {row[1].strip("`") for row in rows if row[2] == "yes"} == {code.name for code in Code if code.retryable}
    source = "".join(path.read_text() for path in (ROOT / "edgebroker" / "broker").rglob("*.py"))
    # What becomes of a request has its code from the table of outcomes, what a batch is refused for from another.
    sent = {*re.findall(r"\bCode\.([A-Z_]+)\b", source), *(outcome.code.name for outcome in Outcome)}
    sent |= {"INVALID_BATCH", "TOO_LARGE", "UNSUPPORTED_CODEC", "OUT_OF_ORDER"}
    assert {row[1].strip("`") for row in rows if "not sent" not in row[3]} == sent


def test_every_state_of_a_partition() -> None:
    assert set(ticked(table("State "))) == {*CursorState} - {CursorState.GONE}


def test_settings_moves_letters_and_snapshots() -> None:
    def fields_of(struct: type[msgspec.Struct]) -> list[str]:
        return sorted(field.name for field in msgspec.structs.fields(struct))

    settings = ticked(table(r"Field +\| Type +\| Default"))
    assert sorted(settings) == fields_of(TopicSettings)
    configuration = (ROOT / "docs" / "configuration.md").read_text()
    assert sorted(ticked(table("setting ", configuration))) == sorted(settings)
    assert sorted(ticked(json_table("Move"))) == fields_of(MoveRequest)
    assert tuple(ticked(table("Header "))) == HEADERS
    assert f"{BEGIN} BEGIN, {END} END" in PROTOCOL


def test_every_counter() -> None:
    assert sorted(ticked(json_table("Counters"))) == sorted(
        [*(field.name for field in counters_of()), "limits_reached", "refused_by_code"]
    )


def json_table(name: str) -> list[list[str]]:
    """The table of an object of the admin interface."""
    return table("(?:Field|Counter) ", PROTOCOL.partition(f"\n**{name}**")[2].partition("\n**")[0])


def test_every_field_of_the_admin_interface(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        for name, found in objects_of(broker).items():
            assert sorted(ticked(json_table(name))) == sorted(found), name
            for line in json_table(name):  # objects within: {"one", "other"} in the text
                if inner := re.search(r"\{(\"[^}]*)\}", line[1]):
                    value = found[ticked([line])[0]]
                    value = value[0] if isinstance(value, list) else value
                    assert set(re.findall(r"\"(\w+)\"", inner[1])) == set(value), line


def objects_of(broker: RunningBroker) -> dict[str, dict]:
    """One of each, with all that can be in it."""
    broker.create("t", kind="table")
    client = broker.raw("raw")
    status, begun = broker.http("POST", "/v1/topics/t/snapshot", {"client_id": "__snapshot-1"})
    assert (status, set(begun), begun["first"]) == (201, {"id", "first"}, {"0": 0})
    plan = {"source": "log", "keys": 3}
    assert broker.http("PUT", f"/v1/topics/t/snapshot/{begun['id']}", plan) == (200, {})
    broker.raw("__snapshot-1").publish("t", numbered(0, 3))
    assert broker.http("POST", f"/v1/topics/t/snapshot/{begun['id']}") == (200, {})
    assert broker.http("POST", "/v1/topics/t/snapshot", {"client_id": "__snapshot-1"})[0] == 201
    client.subscribe("t", "g")
    client.deliver()
    assert client.ask_reset("t").code is Code.OK
    status, moved = broker.http("POST", "/v1/groups/other/offsets", {"topic": "t", "to": "1"})
    assert status == 200
    answer = re.search(r"The answer is `(.*?)`; `from`", PROTOCOL, re.DOTALL)
    assert answer is not None
    assert set(re.findall(r"\"(\w+)\"", answer[1])) == {*moved, *moved["partitions"][0]}
    topic, group = (broker.http("GET", path)[1] for path in ("/v1/topics/t", "/v1/groups/g"))
    assert broker.http("GET", "/v1/topics")[1]["topics"][0].keys() == topic.keys()
    client_object = broker.http("GET", "/v1/clients")[1]["clients"][0]
    partition, node = topic["partitions"][0], broker.http("GET", "/v1/node")[1]
    damaged = {**partition, "damaged": [{"first": 0, "last": 0}], "gaps": [{"first": 0, "last": 0}]}
    held = group["partitions"][0]
    return {
        "Topic": topic, "Partition": damaged, "Group": group, "Partition of a group": held, "Holder": held["member"],
        "Client": client_object, "Node": node, "Counters": node["counters"], "Storage": node["storage"],
        "Node of the tree": node_of_the_tree(broker),
    }  # fmt: skip


def node_of_the_tree(broker: RunningBroker) -> dict:
    report = {"uid": "1" * 32, "name": "till", "level": "local", "version": "1", "boot": "0" * 16, "number": 1}
    batch = {"sender": "1" * 32, "session": "s", "number": 0, "nodes": [{"report": report}]}
    assert reported(broker, batch)[0] == 200
    found = broker.http("GET", "/v1/tree/nodes")[1]["nodes"][0]
    return {**found, "pins": [], "draining": False}  # where the registry is kept


@pytest.mark.parametrize(
    ("header", "rows"),
    [("Method, path ", routes(MagicMock(), MagicMock())), ("At `listen.pipe` ", pipe_routes(MagicMock()))],
)
def test_every_path_of_the_interfaces(header: str, rows: list[Route]) -> None:
    """Only the rows are looked at."""
    listed = {(row.method, re.sub(r"\{(\w+)(\.*)\}", lambda part: part[1].upper() + part[2], row.path)) for row in rows}
    assert {tuple(name.split()) for name in ticked(table(header))} == listed


OWN = "{uid}"  # the node's own
STATUSES = [
    ("POST", "/v1/topics", {}, 400),
    ("POST", "/v1/topics", {"name": "t"}, 409),
    ("GET", "/v1/topics/none", None, 404),
    ("PATCH", "/v1/topics/none", {}, 404),
    ("PATCH", "/v1/topics/t", {"kind": "table"}, 400),
    ("DELETE", "/v1/topics/none", None, 404),
    ("POST", "/v1/topics/none/accept", None, 404),
    ("POST", "/v1/topics/t/snapshot", {"client_id": "x"}, 400),
    ("POST", "/v1/topics/t/snapshot", {"client_id": "__snapshot-1"}, 409),
    ("POST", "/v1/topics/t/snapshot/ab", None, 409),
    ("DELETE", "/v1/topics/t/snapshot/ab", None, 409),
    ("GET", "/v1/groups/none", None, 404),
    ("POST", "/v1/groups/g/offsets", {"topic": "t"}, 400),
    ("POST", "/v1/groups/g/offsets", {"topic": "none", "to": "1"}, 404),
    ("POST", "/v1/groups/g/refresh", {"topic": "t"}, 404),
    ("DELETE", "/v1/groups/none", None, 404),
    ("POST", "/v1/pipe/range", {}, 400),
    ("POST", "/v1/pipe/digest", {"topic": "t", "partition": 0, "log_id": "x", "first": 0, "next": 1}, 404),
    ("POST", "/v1/resyncs", {}, 400),
    ("POST", "/v1/resyncs", {"type": "resync", "id": "ab" * 16, "uid": "9" * 32}, 404),
    ("DELETE", "/v1/resyncs/x", None, 404),
    ("GET", "/v1/via/none/v1/node", None, 404),
    ("GET", "/v1/peers/none/topics", None, 400),
    ("PUT", "/v1/registry/n/pins", {"parents": []}, 409),
    ("PUT", "/v1/registry/n/drain", None, 409),
    ("DELETE", "/v1/registry/n/drain", None, 409),
    ("DELETE", "/v1/registry/n", None, 409),
    ("POST", "/v1/promote", {"level": "up"}, 400),
    ("DELETE", "/v1/promote", None, 409),
    ("POST", "/v1/repair", {"from": "x"}, 400),
]
IN_MEMORY = [
    ("DELETE", "/v1/topics/t", None),
    ("POST", "/v1/promote", {}),
    ("POST", "/v1/repair", {"from": "127.0.0.1:1"}),
    ("POST", "/v1/resyncs", {"type": "resync", "id": "ab" * 16, "uid": OWN}),
    ("GET", "/v1/backup", None),
]


def test_the_statuses_of_the_admin_interface(tmp_path: Path) -> None:
    rows = {tuple(ticked([row])[0].split()): row[2] for row in table("Method, path ")}

    def said_of(method: str, path: str) -> str:
        parts = path.split("/")
        for (known, pattern), text in rows.items():
            wanted = pattern.split("/")
            if wanted[-1].endswith("..."):
                del parts[len(wanted) :]
            fits = len(wanted) == len(parts) and all(
                a.rstrip(".").isupper() or a == b for a, b in zip(wanted, parts, strict=True)
            )
            if known == method and fits:
                return text
        raise AssertionError((method, path))

    with running(tmp_path / "data") as broker:
        broker.create("t")
        for method, path, body, status in STATUSES:
            answered, answer = broker.http(method, path, body)
            assert (answered, "error" in answer) == (status, True), (method, path, answer)
            assert str(status) in said_of(method, path), (method, path, status)


def test_what_the_memory_engine_has_not(tmp_path: Path) -> None:
    sentence = re.search(r"With `storage.engine = memory`.*?501\.", PROTOCOL, re.DOTALL)
    assert sentence is not None
    with running(tmp_path / "data", {"storage.engine": "memory"}) as broker:
        broker.create("t")
        for method, path, body in IN_MEMORY:
            wanted = json.loads(json.dumps(body).replace(OWN, broker.broker.engine.node_uid))
            answered, answer = broker.http(method, path, wanted)
            assert (answered, answer["code"]) == (501, "UNSUPPORTED"), (method, path, answer)
            assert path.replace("/topics/t", "/topics/NAME") in sentence[0]


def test_the_columns_of_group_offsets() -> None:
    storage = (ROOT / "docs" / "storage.md").read_text()
    names = [field.name for field in msgspec.structs.fields(meta.GroupOffset)]
    row = next(row for row in table(r"Table +\| Key", storage) if row[0] == "`group_offsets`")
    assert row[2].split(", ") == ["alone" if name == "isolated" else name for name in names]
    assert f"`user_version` {meta.VERSION}" in storage
    assert ticked(table(r"Position in the entry", storage), 1) == names
    example = re.search(r"^(\{\"offsets\".*\})\n([0-9a-f]{8})$", storage, re.MULTILINE)
    assert example is not None
    assert f"{tiny_reader.crc32c(example[1].encode()):08x}" == example[2]
    assert len(json.loads(example[1])["offsets"][0][3]) == len(names)


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text().replace("\\|", "|")

    def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(actions[0].choices) if actions else {}

    written = {
        name: set(inner[1:].split("|"))
        for name, inner in re.findall(r"^\| `([\w-]+)((?: [a-z-]+(?:\|[\w-]+)*)?)[ `]", readme, re.M)
    }
    for name, parser in verbs(build_parser()).items():
        if verbs(parser):
            assert written[name] == set(verbs(parser)), name
        else:
            assert re.search(rf"^\| .*`{name}\b", readme, re.MULTILINE), name


def test_the_python_of_the_readme(tmp_path: Path) -> None:
    first, workers, refresh = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    booked: list[bytes] = []

    def book(record: edgebroker.Record) -> None:
        assert record.value is not None
        booked.append(record.value)
        if record.value == b"bad":
            raise ValueError("no such till")
        if record.value == b"end":
            raise EOFError

    shelf = SimpleNamespace(data={})
    names = {"book": book, "shelf": shelf, **vars(edgebroker)}
    settings = {"delivery.backoff_ms": 0, "delivery.max_attempts": 2}
    with running(tmp_path / "data", settings) as broker:
        for program in (first, workers, refresh):
            exec(program.replace("127.0.0.1:7420", broker.server), names)
        with names["consumer"] as consumer:
            while not consumer.assignment:
                consumer.poll(0.1)
            consumer.refresh("prices", 0)
            while not shelf.data:
                consumer.poll(0.1)
        assert shelf.data == {b"4711": b'{"price": 199}'}
        broker.raw().publish("sales", batch_of(b"good", b"bad", b"end"))
        with pytest.raises(EOFError):
            names["work"]()
        assert booked == [b"good", b"bad", b"bad", b"end"]
        with broker.consumer(["sales.dlq"]) as consumer:
            letter = next(iter(consumer))
        assert (letter.value, dict(letter.headers)["eb-dlq-reason"]) == (b"bad", b"no such till")


def test_the_python_page_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "packaging" / "python_page.py"], capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "python.md").read_text() == done.stdout, "run: make docs"


def test_the_python_of_the_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    booked: list[edgebroker.Record] = []

    class Enough(BaseException):
        pass

    def book(records: list[edgebroker.Record]) -> None:
        booked.extend(records)
        if len(booked) == 1000:
            raise Enough

    names: dict[str, Any] = {"book": book}
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    with running(tmp_path / "data") as broker:
        for program in programs:
            exec(program.replace("127.0.0.1:7420", broker.server), names)
            if "work" in names and not booked:
                with pytest.raises(Enough):
                    names["work"]()
    assert len(programs) == 8
    assert names["sent"].result() == 0 and not names["failures"]
    assert sorted(int(record.value or b"") for record in booked) == list(range(1000))
    with closing(sqlite3.connect("shelf.db")) as database:
        assert database.execute("SELECT item, price FROM prices").fetchall() == [(b"4711", b'{"price": 199}')]
        assert database.execute("SELECT topic, part, next_offset FROM positions").fetchall() == [("prices", 0, 1)]
    assert names["shelf"].data == {b"4711": b'{"price": 199}'}


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> Iterator[str]:
    """The anchors of the headings; a heading that comes again has a number."""
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+)$", prose(document), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        yield f"{anchor}-{seen[anchor]}" if anchor in seen else anchor
        seen[anchor] = seen.get(anchor, 0) + 1


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_metrics_that_are_named_exist(document: Path) -> None:
    known = set(re.findall(r"^\| `(edgebroker_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.M))
    assert len(known) > 50
    for name in re.findall(r"`[^`\n]*?\b(edgebroker_[a-z_]+)", document.read_text()):
        assert re.sub(r"_(bucket|sum|count)$", "", name) in known or name in known, name


# Paths of the source begin with one of these; those of edgebroker/ may leave that out.
FOLDERS = "edgebroker|common|storage|network|client|pipe|broker|cli|cext|tests|packaging|systemd|benchmarks|docs"
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/(?:[\w.-]+/)*(?:[\w-]+\.(?:pyx|pxd|py|toml|md|sh|h|c)\b|(?=`)))")
# Decision 42 says where TLS will be.
TO_COME = {"network/io/tls.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_that_are_named_exist(document: Path) -> None:
    """Files, and folders where nothing follows the slash."""
    for path in set(PATH.findall(document.read_text())) - TO_COME:
        if "NAME" in path:
            continue
        assert (ROOT / path).exists() or (ROOT / "edgebroker" / path).exists(), path


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(page for page in folder.glob("*.md") if page.name != "README.md")
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \| (\S+) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    expected = []
    for number, page in enumerate(pages, start=1):
        head = re.match(
            r"# (\d+)\. (.+)\n\nDate: (2026-\d\d-\d\d)\n\nStatus: (accepted|superseded by \d+)\n", page.read_text()
        )
        assert head is not None, page.name
        assert page.name.startswith(f"{number:04}-"), page.name
        assert re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE) == ["Context", "Decision", "Consequences"]
        expected.append((head[1], head[2], page.name, head[3]))
    assert rows == expected


def test_the_hooks_run_what_lint_runs() -> None:
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    assert hooks == re.findall(r"\$\(BIN\)/(.+)", lint[1])


def test_every_retired_term_has_a_pattern() -> None:
    assert vocabulary.retired_terms() == list(vocabulary.RETIRED)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A log is begun\nanew.", 1),
        ("The file is not healthy; a healthy one heals.", 1),
        ("There is no parent, it is no longer here, and this is no parent.", 1),
        ("A dead letter, dead-lettering, and a letter of the alphabet.", 1),
        ("| `holes` | the table of meta.db |", 0),
    ],
)
def test_retired_terms_are_found(text: str, found: int) -> None:
    assert len(vocabulary.uses(text)) == found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_use_the_glossary(document: Path) -> None:
    text = document.read_text()
    if document == vocabulary.GLOSSARY:
        text = text.partition("## Retired terms")[0]
    assert vocabulary.uses(text) == []


UNITS = [*sorted((ROOT / "systemd").iterdir()), *sorted((ROOT / "packaging" / "debian").iterdir())]


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_units_and_package_scripts_use_the_glossary(path: Path) -> None:
    assert vocabulary.uses(path.read_text()) == []


MODULES = sorted((ROOT / "edgebroker").rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_strings_use_the_glossary(module: Path) -> None:
    assert vocabulary.uses_in_strings(module) == []
