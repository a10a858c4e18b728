"""Header chain checksums at batch boundaries of a stored log: two nodes compare them to find where their logs agree."""

from collections.abc import Sequence

from edgebroker.common.errors import EdgeBrokerError
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.reader import SegmentView, load_index
from edgebroker.storage.log.walk import walk_file, walk_start
from edgebroker.storage.types import UNKNOWN_CHAIN, ChainPoint


class DamagedLogError(EdgeBrokerError):
    """A batch on the way is damaged: the one at `offset`."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def find_chains(views: Sequence[SegmentView], offsets: Sequence[int]) -> list[ChainPoint]:
    """For each offset the first batch boundary at or after it, as far as it is known; on the reader thread.

    `views` are the segments that hold them, in order. Raises OSError when the device refuses, DamagedLogError when
    a batch before an offset is damaged, which was not known yet: that does not mean that the histories differ.
    """
    found: dict[int, ChainPoint] = {}
    for offset in offsets:
        view = next((view for view in reversed(views) if view.base <= offset), None)
        if view is None or view.base_chain == UNKNOWN_CHAIN or offset > view.end_offset:
            continue
        point = ChainPoint(view.base, view.base_chain) if offset == view.base else _walk_to(view, offset)
        found[point.offset] = point
    return [found[offset] for offset in sorted(found)]


def _walk_to(view: SegmentView, offset: int) -> ChainPoint:
    fd = files.open_log(view.path)
    try:
        points = view.points if view.points is not None else load_index(view, fd).points
        point = segscan.floor_offset(points, offset - view.base)
        relative, position, chain, _ = point or (0, 0, view.base_chain, 0)
        state = walk_file(
            fd,
            walk_start(view.base + relative, chain, position=position, epoch=view.epoch),
            view.size,
            base_offset=view.base,
            max_batch=view.max_batch,
            max_epoch=view.max_epoch,
            limit_offset=offset,
        )
        if state.next_offset < offset:
            raise DamagedLogError(f"{view.path.name}: the batch at {state.next_offset} is damaged", state.next_offset)
        return ChainPoint(state.next_offset, state.chain)
    finally:
        files.close(fd)
