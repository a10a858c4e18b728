"""The documents are enough: programs written from them alone work against a broker, and what they cite is there."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_client
import tiny_reader
from tiny_client import Record, TinyClient

from edgebroker.cli.process import BrokerProcess

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def run_client(*arguments: str) -> list[str]:
    command = [sys.executable, str(TESTS / "tiny_client.py"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()


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
        story.printed = run_client(broker.server, "publish", "greetings", "good", "morning")
        story.printed += run_client(broker.server, "consume", "greetings", "door", "2")
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


def test_the_client_as_a_program(story: SimpleNamespace) -> None:
    assert story.printed == ["0", "0 good", "1 morning"]


def test_the_files_hold_exactly_what_was_published(story: SimpleNamespace) -> None:
    assert story.reader.problems == []
    stored = [record for record in story.stored if record.topic == TOPIC]
    assert [Record(r.value, r.key, r.headers, r.timestamp, r.offset) for r in stored] == story.consumed
    assert [record.value for record in story.stored if record.topic == "greetings"] == [b"good", b"morning"]
    indexes = [line for line in story.reader.found if ".index: " in line]
    assert len(indexes) >= 2, "no segment was sealed"


def test_the_snapshot_holds_the_places_of_the_groups(story: SimpleNamespace) -> None:
    log_id = tiny_reader.read_checked(story.directory / "topics" / TOPIC / "0" / "identity")["log_id"]
    places = tiny_reader.group_offsets(story.directory)
    assert places[GROUP, TOPIC, 0] == (log_id, 1, 1000)
    assert places["door", "greetings", 0][1:] == (1, 2)


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
    connect, granted, publish, stored, subscribe, subscribed, deliver, ack, acknowledged = worked_example()
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname(), timeout=SILENCE)
        far = server.accept()[0]
    monkeypatch.setattr(tiny_client.socket, "create_connection", lambda address, timeout: near)
    monkeypatch.setattr(tiny_client, "WINDOW", (100, 65536))
    record = Record(b'{"total":499}', b"store-17", (("v", b"1"),), 1_700_000_000_000)
    with far:
        far.sendall(granted + stored + subscribed + deliver + acknowledged)
        with closing(TinyClient("nowhere:7420", "till-7")) as client:
            assert client.publish("sales", 0, [record]) == 0
            client.subscribe("sales", "billing")
            assert list(client.consume(1)) == [record._replace(offset=0)]
        sent = b"".join(iter(lambda: far.recv(65536), b""))
    no_topics = connect[:-8] + bytes(2)  # it does not ask about topics
    assert sent == (len(no_topics) - 4).to_bytes(4, "big") + no_topics[4:] + publish + subscribe + ack


def test_the_checksums_of_the_document() -> None:
    for crc32c in (tiny_client.crc32c, tiny_reader.crc32c):
        assert [crc32c(data) for data in (b"123456789", bytes(32), b"\xff" * 32)] == [
            0xE3069283,
            0x8A9136AA,
            0x62A8AB43,
        ]


@pytest.mark.parametrize(("name", "lines"), [("tiny_client.py", 200), ("tiny_reader.py", 150)])
def test_they_are_tiny_and_need_the_standard_library_only(name: str, lines: int) -> None:
    text = (TESTS / name).read_text()
    assert len(text.splitlines()) < lines
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0] if not node.level else ".")
    assert imported <= sys.stdlib_module_names | {"__future__"}


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ +(.+)$", prose(document), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
