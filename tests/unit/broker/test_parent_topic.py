"""What a parent says about a topic: as the interface answers it, and whatever else a peer may send."""

import msgspec
import pytest

from edgebroker.broker.mirror.parent_topic import ParentLog, parent_logs
from edgebroker.storage.types import OffsetRange

LOG = b'{"partition": 0, "log_id": "ab", "log_start": 5, "durable_end": 9, "bytes": 70, "damaged": [%b]}'


def test_the_answer_of_the_interface() -> None:
    answer = b'{"name": "t", "partitions": [%b, %b]}' % (LOG % b"", LOG % b'{"first": 6, "last": 7}')
    assert parent_logs(answer) == [
        ParentLog("ab", 5, 9, 70, []),
        ParentLog("ab", 5, 9, 70, [OffsetRange(6, 7)]),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"{", b"[]", b"{}", b'{"partitions": {}}', b'{"partitions": [{}]}', b'{"partitions": [7]}', b"\xff",
        b'{"partitions": [{"log_id": "ab", "log_start": 5, "durable_end": "9"}]}',
        b'{"partitions": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ],
)  # fmt: skip
def test_what_is_not_a_topic(answer: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        parent_logs(answer)
