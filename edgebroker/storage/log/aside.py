"""Segments that were removed from a log by truncating or recreating it: retained beside it for a day.

Such a file is called BASE.diverged-TIME, the time in milliseconds. Recreating a log, and continuing it behind a gap, is
finished here as well, for a start has to do that before it opens the log: the new identity lies beside the old one
until the files are as it says.
"""

from pathlib import Path

from edgebroker.common.runtime.clock import is_plausible
from edgebroker.storage import files
from edgebroker.storage.identity import FILE_NAME, read_identity
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.segment import ASIDE, SUFFIX, segment_path

NEXT_NAME = "identity.next"
ASIDE_MS = 24 * 3600 * 1000


def segment_files(directory: Path) -> list[Path]:
    """The segments of a log, in order."""
    return sorted(path for path in directory.iterdir() if path.suffix == SUFFIX and path.stem.isdigit())


def retain_aside(path: Path, wall_ms: int) -> None:
    """Take a segment out of its log; its bytes stay. Durable when this returns. Raises OSError."""
    files.remove(index_path(path))
    files.rename_suffix(path, f"{ASIDE}{wall_ms}")


def drop_aside(directory: Path, wall_ms: int, *, everything: bool = False) -> None:
    """Remove what has been retained for more than a day, or everything; what has no plausible time gets this one.
    Nothing by age while the clock is not believed (0)."""
    for path in directory.glob(f"*{ASIDE}*"):
        stamp = path.suffix.removeprefix(ASIDE)
        if not stamp.isdigit():
            continue
        if everything or (is_plausible(int(stamp), wall_ms) and wall_ms - int(stamp) > ASIDE_MS):
            files.remove(path)
        elif wall_ms and not is_plausible(int(stamp), wall_ms):
            files.rename_suffix(path, f"{ASIDE}{wall_ms}")


def finish_rewrite(directory: Path, wall_ms: int) -> None:
    """Do what a next identity says, when there is one: without gaps the log begins again, with gaps it continues in a
    new segment behind the last of them. Raises OSError; DamagedDataError when the next identity is not whole, for then
    it was never durable."""
    if not (directory / NEXT_NAME).exists():
        return
    gaps = read_identity(directory, NEXT_NAME).gaps
    if gaps:
        _begin_segment(directory, gaps[-1].first, gaps[-1].next)
    else:
        for path in reversed(segment_files(directory)):
            retain_aside(path, wall_ms)
    files.move(directory / NEXT_NAME, directory / FILE_NAME)


def _begin_segment(directory: Path, end: int, base: int) -> None:
    """Continue at `base` a log that ends at `end`: an empty segment that begins there or in between makes room."""
    files.close(files.create_log(segment_path(directory, base)))
    for path in segment_files(directory):
        if end <= int(path.stem) < base:
            files.remove(path)
