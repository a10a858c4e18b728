"""Data directories of every format there has been, opened by this release: nothing is lost, nothing is changed first.

They were made by the releases of their time (tests/golden/make.py) and are never made again.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from edgebroker.common.errors import FormatTooNewError
from edgebroker.storage.directory import DataDirectory
from edgebroker.version import DATA_FORMAT
from tests.kit.brokers import running
from tests.kit.storage import tree

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.tar.gz"))
COUNT, READ = 2000, 700


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name.removesuffix(".tar.gz"))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    with tarfile.open(request.param) as archive:
        archive.extractall(directory, filter="data")
    return directory


def test_there_is_one_of_this_format() -> None:
    assert f"format-{DATA_FORMAT}.tar.gz" in [path.name for path in GOLDEN]


def test_every_record_group_and_dead_letter_is_there(golden: Path) -> None:
    logs = {path: path.read_bytes() for path in golden.glob("topics/*/*/*.log")}
    with running(golden) as broker:
        with broker.consumer(["sales"], "all") as consumer:
            records = []
            while len(records) < COUNT:
                records += consumer.poll(10.0)
        for partition in (0, 1):
            mine = [record for record in records if record.partition == partition]
            assert [record.offset for record in mine] == list(range(COUNT // 2))
            wanted = [b"sale %d %s" % (number, b"x" * 150) for number in range(partition, COUNT, 2)]
            assert [record.value for record in mine] == wanted
            assert dict(mine[7].headers)["n"] == b"%d" % (14 + partition)
        with broker.consumer(["prices"], "all") as consumer:
            prices = []
            while len(prices) < COUNT:
                prices += consumer.poll(10.0)
        assert [record.key for record in prices] == [b"item-%d" % (number % 100) for number in range(COUNT)]
        assert prices[5].value is None
        groups = {group["name"]: group for group in broker.http("GET", "/v1/groups")[1]["groups"]}
        assert sum(part["committed"] for part in groups["tills"]["partitions"]) == READ
        assert [part["committed"] for part in groups["labels"]["partitions"]] == [1]
        topics = {topic["name"]: topic for topic in broker.http("GET", "/v1/topics")[1]["topics"]}
        assert topics["prices.dlq"]["partitions"][0]["durable_end"] == 1
        assert topics["sales"]["settings"]["message_ttl_ms"] == 10**12
        assert (topics["prices"]["settings"]["kind"], topics["prices"]["settings"]["on_damage"]) == ("table", "skip")
        assert broker.http("GET", "/v1/node")[1]["problems"] == {}
    for path, content in logs.items():
        assert path.read_bytes()[: len(content)] == content, "what was written stays as it was"


def test_a_newer_format_is_refused_before_anything_is_written(golden: Path) -> None:
    path = golden / "FORMAT"
    path.write_text(path.read_text().replace(f"{DATA_FORMAT}", f"{DATA_FORMAT + 1}", 1))
    (golden / "LOCK").touch()  # taken first, whatever the format is
    before = tree(golden)
    with pytest.raises(FormatTooNewError):
        DataDirectory(golden, "root")
    assert tree(golden) == before
