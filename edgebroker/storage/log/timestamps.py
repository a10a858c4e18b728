"""Finding the first record that is not older than a time; on the reader thread."""

from collections.abc import Sequence

from edgebroker.common import batch
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.reader import SegmentRead, SegmentView, load_index
from edgebroker.storage.log.segment import NO_TIMESTAMP


def find_time(segments: Sequence[tuple[SegmentView, int]], timestamp: int, end: int) -> SegmentRead:
    """`segments`: views with the newest timestamp of each (unknown: NO_TIMESTAMP). The answer is in first_offset.

    Timestamps need not be in order: the answer is the first record in offset order that is not older.
    """
    for view, newest in segments:
        if view.size == 0 or NO_TIMESTAMP < newest < timestamp:
            continue
        fd = files.open_log(view.path)
        try:
            points = view.points if view.points is not None else load_index(view, fd).points
            point = segscan.floor_timestamp(points, timestamp)
            position = point[1] if point is not None else 0
            while position < view.size:
                data = files.read_at(fd, min(view.size - position, 1 << 20), position)
                found = segscan.seek(data, 0, timestamp)
                if found is not None:
                    start, base, size = found
                    whole = files.read_at(fd, size, position + start)
                    for record in batch.decode(whole):
                        if record.timestamp >= timestamp:
                            return SegmentRead(first_offset=record.offset)
                    return SegmentRead(first_offset=base)
                length, _ = segscan.cut(data, len(data), 1 << 62)
                if length == 0:
                    break
                position += length
        finally:
            files.close(fd)
    return SegmentRead(first_offset=end)
