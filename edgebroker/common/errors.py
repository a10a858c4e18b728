"""The one tree of exceptions, and the closed table of answer codes that peers exchange.

Every error says what happened and what to do about it. The exit code of the command line stands on the class.
"""

from enum import IntEnum


class Code(IntEnum):
    """What a broker's answer says. The numbers are the wire's; docs/protocol.md has one line for each."""

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
    NOT_REPLICATED = 23

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later, unchanged."""
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
        Code.NOT_REPLICATED,
    }
)


class EdgeBrokerError(Exception):
    """Base of every error of this package; catch it to catch them all."""

    exit_code = 1


class ConfigError(EdgeBrokerError):
    """The configuration or the command line is wrong; the message lists every problem found."""

    exit_code = 2


class ArgumentError(ConfigError, ValueError):
    """An argument of the client has a value that is not allowed; the message names it and says what is.

    Do: correct the call. It is a ValueError as well.
    """


class RecordTooLargeError(ArgumentError):
    """A record is larger than the broker allows."""


class UnreachableError(EdgeBrokerError):
    """No broker answered in time: at connecting, to a request, or with the acknowledgement of a record.

    Do: check the address and the broker. A record that failed with it may be stored all the same; sending it again may
    store it twice.
    """

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
    """The broker refused a request.

    Do: look at `code`. After a retryable code the same request may succeed later (a producer tries batches again until
    its timeout); after any other something has to change first: the name, the record, the broker.

    Attributes:
        code: a Code.
        offset: the offset that the answer carries; -1 when it has none.
    """

    def __init__(self, code: Code, message: str, offset: int = -1) -> None:
        super().__init__(f"{code.name}: {message}" if message else code.name)
        self.code = code
        self.offset = offset


class TrustError(EdgeBrokerError):
    """A certificate, a key or a token cannot be used; the text says what to do."""


class ProtocolError(EdgeBrokerError):
    """Bytes that the protocol does not allow. The connection they came from is over."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow."""


class CorruptBatchError(EdgeBrokerError):
    """A batch that was delivered cannot be decoded although it is what the broker stored.

    Do: read on after it with Consumer.seek(), and find the producer that wrote it.
    """

    exit_code = 4


class DamagedBatchError(CorruptBatchError):
    """The bytes of a batch are not those that were stored: they changed on a disk or on the way."""


class InflatedTooLargeError(CorruptBatchError):
    """The compressed records of a batch are larger than the limit once they are inflated.

    Do: as for CorruptBatchError.
    """


class PositionFileError(EdgeBrokerError):
    """The position file of a consumer cannot be read.

    Do: restore it together with the data that belongs to it, or remove both and load again.
    """


class ResetRequiredError(EdgeBrokerError):
    """The broker offers a snapshot refresh and the consumer has no staging store to load it into.

    It comes when the consumer's position belongs to other data than the broker's, or when an operator asked for it.
    Do: give the consumer a staging store (`staging=`), or remove the data and its positions and load again.

    Attributes:
        topic: the topic to load again.
        partition: the partition to load again.
        log_id: the log that the broker has now.
        log_start: the offset from which it is loaded.
    """

    def __init__(self, topic: str, partition: int, log_id: bytes, log_start: int) -> None:
        super().__init__(
            f"{topic}/{partition} has to be loaded again, from offset {log_start} of log {log_id.hex()}; give the "
            "consumer a staging store (staging=)"
        )
        self.topic, self.partition, self.log_id, self.log_start = topic, partition, log_id, log_start


class GapError(EdgeBrokerError):
    """Records of a partition will never be delivered. It is raised once; the next poll goes on after them.

    Do: decide whether the data is usable without them; `on_gap` of Consumer gets these errors instead of raising them.

    Attributes:
        topic: the topic.
        partition: the partition.
        first: the first offset that is missing.
        last: the last offset that is missing.
        reason: EXPIRED (past the time to live of the topic), RETENTION (removed by size or age) or DAMAGED (a corrupt
            range that the topic skips).
    """

    def __init__(self, topic: str, partition: int, first: int, last: int, reason: str) -> None:
        super().__init__(f"{topic}/{partition}: records {first} to {last} will not be delivered ({reason})")
        self.topic, self.partition, self.first, self.last, self.reason = topic, partition, first, last, reason
