from typing_extensions import Buffer

def scan(
    data: Buffer,
    expected: int,
    chain: int,
    epoch: int,
    max_batch: int,
    *,
    verify: bool = True,
    base_offset: int = 0,
    base_position: int = 0,
    interval: int = 0,
    last_point: int = -1,
    max_timestamp: int = ...,
    limit_offset: int = -1,
    wall_ms: int = 0,
    monotonic_ms: int = 0,
    guarded: bool = False,
) -> tuple[int, int, int, int, int, int, bytes]:
    """Walk batches from the start of `data`: shape, offset continuity, epoch order and (verify) CRC of each.

    Returns (good_end, reason, next_offset, chain, epoch, max_timestamp, points): what held up to good_end, why the
    walk stopped there (0: at the end of the data), and packed index points at least `interval` bytes apart
    (stamped with the times given).
    With `guarded` the buffer may be a mapped file: OSError(EIO) instead of SIGBUS. Releases the GIL.
    """

def find_batch(data: Buffer, start: int, min_offset: int, max_offset: int, max_batch: int) -> int:
    """Position of the next whole batch with a good CRC and a base offset in [min, max]; -1 when there is none."""

def cut(data: Buffer, max_bytes: int, end_offset: int) -> tuple[int, int]:
    """Whole batches from the start of `data` that fit into max_bytes and begin before end_offset; at least one.

    Returns (bytes, next_offset); (0, -1) when not even one header is whole. The first batch may be longer than the
    buffer: then `bytes` is its size.
    """

def seek(data: Buffer, offset: int, timestamp: int = ...) -> tuple[int, int, int] | None:
    """The first batch that ends after `offset` and is not older than `timestamp`: (position, base offset, size)."""

Point = tuple[int, int, int, int]

def floor_offset(points: Buffer, relative_offset: int) -> Point | None:
    """The last index point at or before a relative offset: (relative offset, position, chain, max timestamp)."""

def floor_position(points: Buffer, position: int) -> Point | None:
    """The last index point at or before a position."""

def stamps(points: Buffer, relative_offset: int) -> tuple[int, int] | None:
    """The times of the last index point at or before a relative offset: (wall ms, monotonic ms)."""

def points_from(points: Buffer, position: int) -> bytes:
    """The packed points at or behind a position."""

def floor_timestamp(points: Buffer, timestamp: int) -> Point | None:
    """The last index point before which everything is older than `timestamp`."""

def install_guard() -> None:
    """Install the SIGBUS handler that guarded scans need; other faults go to the handler that was there before."""
