def resident(fd: int, position: int, length: int) -> bool:
    """True when every page of the range is in the page cache now. Touches nothing, never waits for the disk."""

def send_cached(out_fd: int, in_fd: int, position: int, length: int) -> tuple[int, int]:
    """sendfile from one file to a non-blocking socket, only of pages found in the cache just before.

    Returns (bytes sent, state): 0 all sent, 1 the socket takes no more, 2 the next piece is not in the cache.
    A page evicted between the look and the call is read by the kernel in this call (docs/design.md). Raises OSError.
    """
