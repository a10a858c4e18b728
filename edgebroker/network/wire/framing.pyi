from typing_extensions import Buffer

def split(
    data: Buffer, start: int, max_frame: int, most: int = ...
) -> tuple[list[tuple[int, int, int, int] | tuple[int, int, int, bytes]], int, int, tuple[int, int, int]]:
    """Split data[start:] into frames, at most so many events: (events, good_end, reason, (type, correlation, size)).

    An event is (type, correlation, body start, body end); a run of PUBLISH frames to one place is
    (2, prefix start, prefix end, spans), spans packed native (u64 correlation, u32 batches start, u32 end).
    reason: 0 all used, or as many events as were asked for, 1 the rest is the beginning of a frame (size: all of it in
    bytes, 0 when not yet known), 2 length below 12, 3 unknown type or flags, 4 larger than max_frame, 5 a PUBLISH
    shorter than its prefix.
    Limits are checked on the header alone; nothing is allocated from a length on the wire.
    """

def encode_answers(spans: bytes, answers: bytes, explanations: list[bytes]) -> bytes:
    """The ACK frames for a run of PUBLISH frames; explanations are indexed by the reason of an answer."""
