"""The one tree of exceptions, and the closed table of answer codes that peers exchange.

Every error says what happened and what to do about it. The exit code of the command line stands on the class.
"""

from enum import IntEnum


class Code(IntEnum):
    """What an answer says. The numbers are the wire's; docs/protocol.md has one line for each."""

    OK = 0
    UNKNOWN_TOPIC = 1
    NOT_ORIGIN = 2
    NAME_CLASH = 3
    INVALID_BATCH = 4
    UNSUPPORTED_CODEC = 5
    UNSUPPORTED_VERSION = 6
    TOO_LARGE = 7
    DISK_FULL = 8
    READ_ONLY = 9
    STORAGE_TIMEOUT = 10
    CORRUPT = 11
    DAMAGED = 12
    BEHIND = 13
    STALE = 14
    OUT_OF_ORDER = 15
    FENCED = 16
    NO_SNAPSHOT = 17
    HISTORY_LOST = 18
    SHUTTING_DOWN = 19
    OVERLOADED = 20
    UNAUTHORISED = 21
    INVALID_REQUEST = 22

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later without anybody changing it."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        Code.DISK_FULL,
        Code.READ_ONLY,
        Code.STORAGE_TIMEOUT,
        Code.DAMAGED,
        Code.BEHIND,
        Code.OUT_OF_ORDER,
        Code.SHUTTING_DOWN,
        Code.OVERLOADED,
    }
)


class EdgeBrokerError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class ConfigError(EdgeBrokerError):
    """The configuration or the command line is wrong; the message lists every problem found."""

    exit_code = 2


class UnreachableError(EdgeBrokerError):
    """No broker answered at the address given."""

    exit_code = 3


class DamagedDataError(EdgeBrokerError):
    """Stored data does not match its checksums."""

    exit_code = 4


class DataDirectoryInUseError(EdgeBrokerError):
    """Another process holds the data directory."""

    exit_code = 75


class DataDirectoryError(EdgeBrokerError):
    """The data directory cannot be read or written."""


class FormatTooNewError(EdgeBrokerError):
    """The data directory was written by a newer release; nothing in it was changed."""

    exit_code = 2


class AnswerError(EdgeBrokerError):
    """The broker answered a request with a code other than OK.

    `code` is a Code, `offset` what the answer carries (-1: nothing).
    """

    def __init__(self, code: Code, message: str, offset: int = -1) -> None:
        super().__init__(f"{code.name}: {message}" if message else code.name)
        self.code = code
        self.offset = offset


class ProtocolError(EdgeBrokerError):
    """Bytes that the protocol does not allow. The connection they came from is over."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow."""


class CorruptBatchError(EdgeBrokerError):
    """A batch failed its checks where no hole can be delivered instead."""

    exit_code = 4


class DamagedBatchError(CorruptBatchError):
    """The bytes of a batch are not those that were stored: they changed on a disk or on the way."""


class InflatedTooLargeError(CorruptBatchError):
    """Compressed records grow beyond the limit when they are inflated."""


class ResetRequiredError(EdgeBrokerError):
    """The data has to be loaded afresh from `log_start`, through a staging store, and the consumer was given none."""

    def __init__(self, topic: str, partition: int, log_id: bytes, log_start: int) -> None:
        super().__init__(
            f"{topic}/{partition} has to be loaded afresh from offset {log_start} of log {log_id.hex()}; give the "
            "consumer a staging store that takes it (staging=)"
        )
        self.topic, self.partition, self.log_id, self.log_start = topic, partition, log_id, log_start


class GapError(EdgeBrokerError):
    """Records in [first, last] will never be delivered; `reason` says why (EXPIRED, DAMAGED, RETENTION)."""

    def __init__(self, topic: str, partition: int, first: int, last: int, reason: str) -> None:
        super().__init__(f"{topic}/{partition}: records {first} to {last} are gone ({reason})")
        self.topic, self.partition, self.first, self.last, self.reason = topic, partition, first, last, reason
