def produce(
    host: bytes, port: int, topic: bytes, count: int, size: int, batch: int, unacked: int, level: int, name: bytes
) -> float:
    """Publish `count` records of `size` bytes to partition 0; seconds until the last answer. Raises OSError."""

def consume(host: bytes, port: int, topic: bytes, group: bytes, count: int, window: int, name: bytes) -> float:
    """Read `count` records of partition 0 from the start, walking every record; seconds."""

def many(
    host: bytes, port: int, topic: bytes, connections: int, count: int, size: int, level: int, name: bytes
) -> float:
    """`connections` clients, one record at a time each, `count` records in all; seconds."""

def fanout(
    host: bytes, port: int, topic: bytes, readers: int, count: int, size: int, batch: int, rate: float, name: bytes
) -> tuple[float, float, list[float]]:
    """Bring `count` records to `readers` connections: (seconds from the first publish to the last delivery, seconds
    from the first connect until every reader had received a record, with a rate above 0 seconds of each delivery)."""

def one_by_one(host: bytes, port: int, topic: bytes, count: int, size: int, level: int, name: bytes) -> list[float]:
    """One record at a time; the seconds each took."""

def push(
    host: bytes, port: int, topic: bytes, group: bytes, count: int, size: int, rate: float, level: int, name: bytes
) -> list[float]:
    """Publish at `rate` a second and time each push on another connection; seconds each, in order."""

def ping(count: int, echo_cpu: int = -1) -> list[float]:
    """The reference for latencies: 64 bytes there and back over loopback between two threads (the echoing one on a CPU
    of its own, if given); seconds each."""
