from typing_extensions import Buffer

MOST_PRODUCERS: int

def give_back_large() -> None:
    """From now on a block of 128 KiB or more is the system's again once it is freed: for a process as a whole."""

def trim() -> int:
    """Give recycled buffers back to the system; call when nothing was staged for a while. Returns the bytes freed."""

class Chunk:
    """Numbered batches on their way to the disk; a read-only buffer whose memory lives as long as the object."""

    first_offset: int
    next_offset: int
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Stage:
    """The staging area of one partition: client batches in, numbered chunks out. Owned by the loop thread.

    A run of frames may be refused frame by frame. `next_offset` is the offset that the next record will get;
    `window` is how many batches are remembered per producer to recognise duplicates.
    """

    next_offset: int
    epoch: int
    pending_bytes: int
    def __init__(self, next_offset: int, epoch: int, max_batch: int, max_record: int, window: int) -> None: ...
    def append(
        self, data: Buffer, spans: bytes, now: float, inflated: bool = False, granted: int | None = None
    ) -> tuple[bytes, int, int, int]:
        """Stage the PUBLISH frames of `spans`. Returns (answers, frames, wait, records).

        granted: the only producer id that these frames may carry (others are FENCED); None: any.

        answers: packed native (i64 offset, i32 code, i32 reason) for the frames handled; frames: how many, fewer than
        given when the next one holds compressed records that are not inflated yet (`inflated` says they are);
        wait: the durable end that makes every answer true; records: how many were new. Nothing is durable yet.
        """

    def append_numbered(self, data: Buffer, now: float, max_epoch: int = ...) -> tuple[int, int]:
        """Stage batches that carry their offsets: CRC, density and epoch order checked, none beyond `max_epoch`.
        (bytes taken, reason)."""

    def take(self, max_bytes: int) -> Chunk | None:
        """Hand over staged batches, whole ones, at most max_bytes unless the first is larger. None when empty."""

    def rollback(self, next_offset: int, epoch: int) -> None:
        """Forget everything from next_offset on, staged or taken: it was not stored. Producers may send it again.
        `epoch` is the history that the next record belongs to."""

    def settle(self, durable_end: int) -> None:
        """Everything below is durable: a rollback will not come back there."""

    def replay(self, data: Buffer, now: float, below: int = -1) -> int:
        """Feed stored batches from offset `below` on to the producer windows (recovery). Returns the bytes walked."""

    def resume(self, next_offset: int, epoch: int) -> None:
        """Continue at another end. ValueError while batches are staged."""

    def expire(self, before: float) -> int:
        """Forget producers that sent nothing since `before` (monotonic seconds). Returns how many."""

    @property
    def producer_count(self) -> int: ...
    def epochs(self) -> dict[int, int]:
        """The epoch of every producer that is remembered, by its id."""

    def dump(self, below: int) -> list[tuple[int, int, float, bytes]]:
        """What is remembered of batches below an offset: (producer id, epoch, last seen, packed entries)."""

    def load(self, found: list[tuple[int, int, float, bytes]]) -> None:
        """Take back what dump() gave."""
