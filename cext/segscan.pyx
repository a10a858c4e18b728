"""Walking stored batches: scan, cut, seek, search after damage; and reading mapped files without dying.

Positions are relative to the buffer. An index point is 40 bytes, little-endian (docs/storage.md):
u32 offset relative to the segment's base, u32 position, u32 chain before the batch, u32 zero,
i64 maximum timestamp of everything before it in the segment, i64 wall ms, i64 monotonic ms of the append.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport INT64_MAX, INT64_MIN, int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy

from recordbatch cimport *

eb_crc32c_init()

cdef extern from "guard.h" nogil:
    ctypedef int (*eb_guarded_call)(void *argument)
    int eb_guard_install()
    int eb_guarded(eb_guarded_call call, void *argument)

cdef enum:
    POINT_BYTES = 40

cdef packed struct Point:
    uint32_t relative_offset
    uint32_t position
    uint32_t chain
    uint32_t zero
    int64_t max_timestamp
    int64_t wall_ms
    int64_t monotonic_ms

cdef struct Scan:
    # in
    const uint8_t *data
    size_t length, max_batch
    int64_t base_offset          # of the segment, for relative offsets
    int64_t base_position        # of data[0] within the segment
    int64_t last_point           # position of the last point so far, -1 for none
    int64_t interval             # bytes between points; 0: no points
    int64_t limit_offset         # stop before a batch with base offset >= limit (-1: none)
    int64_t wall_ms, monotonic_ms
    int verify
    # in and out
    int64_t expected
    uint32_t chain
    int32_t epoch
    int64_t max_timestamp
    # out
    size_t good_end
    int reason
    Point *points
    size_t used, room
    int out_of_memory

cdef int _scan(void *argument) noexcept nogil:
    cdef Scan *scan = <Scan *>argument
    cdef eb_batch batch
    cdef const uint8_t *p
    cdef int64_t position
    scan.good_end = 0
    scan.reason = EB_OK
    while scan.good_end < scan.length:
        p = scan.data + scan.good_end
        if scan.limit_offset >= 0 and scan.expected >= scan.limit_offset:
            break
        scan.reason = eb_check_stored_batch(p, scan.length - scan.good_end, scan.max_batch, scan.expected,
                                            scan.epoch, scan.verify, &batch)
        if scan.reason:
            break
        position = scan.base_position + <int64_t>scan.good_end
        if scan.interval and (scan.last_point < 0 or position - scan.last_point >= scan.interval):
            if scan.used == scan.room:
                scan.out_of_memory = 1
                break
            scan.points[scan.used].relative_offset = <uint32_t>(batch.base_offset - scan.base_offset)
            scan.points[scan.used].position = <uint32_t>position
            scan.points[scan.used].chain = scan.chain
            scan.points[scan.used].zero = 0
            scan.points[scan.used].max_timestamp = scan.max_timestamp
            scan.points[scan.used].wall_ms = scan.wall_ms
            scan.points[scan.used].monotonic_ms = scan.monotonic_ms
            scan.used += 1
            scan.last_point = position
        scan.chain = eb_chain(scan.chain, p)
        scan.epoch = batch.epoch
        scan.expected = batch.base_offset + batch.count
        if batch.max_timestamp > scan.max_timestamp:
            scan.max_timestamp = batch.max_timestamp
        scan.good_end += batch.size
    return 0


def scan(data, int64_t expected, uint32_t chain, int32_t epoch, size_t max_batch, *, bint verify=True,
         int64_t base_offset=0, int64_t base_position=0, int64_t interval=0, int64_t last_point=-1,
         int64_t max_timestamp=INT64_MIN, int64_t limit_offset=-1, int64_t wall_ms=0, int64_t monotonic_ms=0,
         bint guarded=False):
    cdef Py_buffer view
    cdef Scan state
    cdef int faulted = 0
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    state.points = NULL
    try:
        state.data = <const uint8_t *>view.buf
        state.length = <size_t>view.len
        state.max_batch = max_batch
        state.base_offset, state.base_position = base_offset, base_position
        state.last_point, state.interval, state.limit_offset = last_point, interval, limit_offset
        state.verify = verify
        state.wall_ms, state.monotonic_ms = wall_ms, monotonic_ms
        state.expected, state.chain, state.epoch, state.max_timestamp = expected, chain, epoch, max_timestamp
        state.used = 0
        state.out_of_memory = 0
        state.room = <size_t>(view.len // interval + 2) if interval else 0
        if interval:
            state.points = <Point *>PyMem_Malloc(state.room * sizeof(Point))
            if state.points == NULL:
                raise MemoryError()
        with nogil:
            if guarded:
                faulted = eb_guarded(_scan, &state)
            else:
                _scan(&state)
        points = PyBytes_FromStringAndSize(<const char *>state.points, state.used * sizeof(Point)) if interval else b""
    finally:
        PyMem_Free(state.points)
        PyBuffer_Release(&view)
    if faulted:
        raise OSError(5, "the mapped file could not be read (SIGBUS)")
    return (state.good_end, state.reason, state.expected, state.chain, state.epoch, state.max_timestamp, points)


def find_batch(data, size_t start, int64_t min_offset, int64_t max_offset, size_t max_batch):
    """Position of the next whole batch with a good CRC and a base offset in [min, max]; -1 when there is none."""
    cdef Py_buffer view
    cdef eb_batch batch
    cdef const uint8_t *p
    cdef size_t i, n
    cdef int64_t found = -1, base
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        p = <const uint8_t *>view.buf
        n = <size_t>view.len
        with nogil:
            i = start
            while i + EB_BATCH_HEADER <= n:
                if p[i + 16] == 2 and p[i] == 0:
                    base = <int64_t>eb_get64(p + i)
                    if min_offset <= base <= max_offset and eb_check_stored_batch(
                            p + i, n - i, max_batch, -1, 0, 1, &batch) == EB_OK:
                        found = <int64_t>i
                        break
                i += 1
    finally:
        PyBuffer_Release(&view)
    return found


def cut(data, int64_t max_bytes, int64_t end_offset):
    """Walk headers for as many whole batches as fit into max_bytes, stopping at end_offset; at least one.

    Returns (bytes, next_offset), (0, -1) when not even one header is whole, and, when the first batch is longer than
    the buffer, (its size, its next offset).
    """
    cdef Py_buffer view
    cdef eb_batch batch
    cdef size_t position = 0
    cdef int64_t next_offset = -1
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            while <size_t>view.len - position >= EB_BATCH_HEADER:
                if eb_frame_batch(<const uint8_t *>view.buf + position, <size_t>view.len - position,
                                  <size_t>1 << 31, &batch) not in (EB_OK, EB_TRUNCATED):
                    break
                if next_offset >= 0 and (batch.base_offset >= end_offset
                                         or <int64_t>(position + batch.size) > max_bytes
                                         or position + batch.size > <size_t>view.len):
                    break
                position += batch.size
                next_offset = batch.base_offset + batch.count
                if position >= <size_t>view.len or next_offset >= end_offset:
                    break
    finally:
        PyBuffer_Release(&view)
    return position, next_offset


def seek(data, int64_t offset, int64_t timestamp=INT64_MIN):
    """The first batch whose last offset is at least `offset` and whose newest record is not before `timestamp`.

    Returns (position, base offset, size), or None when the buffer ends first.
    """
    cdef Py_buffer view
    cdef eb_batch batch
    cdef size_t position = 0
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        while position + EB_BATCH_HEADER <= <size_t>view.len:
            if eb_frame_batch(<const uint8_t *>view.buf + position, <size_t>view.len - position, <size_t>1 << 31,
                              &batch) not in (EB_OK, EB_TRUNCATED):
                return None
            if batch.base_offset + batch.count > offset and batch.max_timestamp >= timestamp:
                return position, batch.base_offset, batch.size
            position += batch.size
    finally:
        PyBuffer_Release(&view)
    return None


cdef size_t _floor(const uint8_t *p, size_t n, uint32_t wanted, size_t field) noexcept nogil:
    """How many points have field <= wanted."""
    cdef size_t low = 0, high = n, middle
    cdef uint32_t value
    while low < high:
        middle = (low + high) // 2
        memcpy(&value, p + middle * POINT_BYTES + field, 4)
        if value <= wanted:
            low = middle + 1
        else:
            high = middle
    return low


def floor_offset(points, int64_t relative_offset):
    """The last point at or before a relative offset: (relative_offset, position, chain, max_timestamp), or None."""
    return _point(points, relative_offset, 0)


def floor_position(points, int64_t position):
    """The last point at or before a position, as floor_offset."""
    return _point(points, position, 4)


cdef object _point(points, int64_t wanted, size_t field):
    cdef Py_buffer view
    cdef Point found
    cdef size_t rank
    if wanted < 0:
        return None
    PyObject_GetBuffer(points, &view, PyBUF_SIMPLE)
    try:
        rank = _floor(<const uint8_t *>view.buf, <size_t>view.len // POINT_BYTES,
                      <uint32_t>min(wanted, 0xFFFFFFFF), field)
        if rank == 0:
            return None
        memcpy(&found, <const uint8_t *>view.buf + (rank - 1) * POINT_BYTES, POINT_BYTES)
    finally:
        PyBuffer_Release(&view)
    return found.relative_offset, found.position, found.chain, found.max_timestamp


def stamps(points, int64_t relative_offset):
    """(wall ms, monotonic ms) of the last point at or before a relative offset, or None."""
    cdef Py_buffer view
    cdef Point found
    cdef size_t rank
    PyObject_GetBuffer(points, &view, PyBUF_SIMPLE)
    try:
        rank = _floor(<const uint8_t *>view.buf, <size_t>view.len // POINT_BYTES,
                      <uint32_t>min(max(relative_offset, 0), 0xFFFFFFFF), 0)
        if rank == 0:
            return None
        memcpy(&found, <const uint8_t *>view.buf + (rank - 1) * POINT_BYTES, POINT_BYTES)
    finally:
        PyBuffer_Release(&view)
    return found.wall_ms, found.monotonic_ms


def points_from(points, int64_t position):
    """The packed points at or behind a position."""
    cdef Py_buffer view
    cdef size_t rank
    PyObject_GetBuffer(points, &view, PyBUF_SIMPLE)
    try:
        rank = 0 if position <= 0 else _floor(<const uint8_t *>view.buf, <size_t>view.len // POINT_BYTES,
                                              <uint32_t>min(position - 1, 0xFFFFFFFF), 4)
        return PyBytes_FromStringAndSize(<const char *>view.buf + rank * POINT_BYTES, view.len - rank * POINT_BYTES)
    finally:
        PyBuffer_Release(&view)


def floor_timestamp(points, int64_t timestamp):
    """The last point before which everything is older than `timestamp`, as floor_offset."""
    cdef Py_buffer view
    cdef Point found
    cdef size_t low = 0, high, middle
    PyObject_GetBuffer(points, &view, PyBUF_SIMPLE)
    try:
        high = <size_t>view.len // POINT_BYTES
        while low < high:
            middle = (low + high) // 2
            memcpy(&found, <const uint8_t *>view.buf + middle * POINT_BYTES, POINT_BYTES)
            if found.max_timestamp < timestamp:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return None
        memcpy(&found, <const uint8_t *>view.buf + (low - 1) * POINT_BYTES, POINT_BYTES)
    finally:
        PyBuffer_Release(&view)
    return found.relative_offset, found.position, found.chain, found.max_timestamp


def install_guard():
    """Install the SIGBUS handler that guarded scans need; other SIGBUS go to the handler that was there before."""
    if eb_guard_install():
        raise OSError(22, "cannot install the SIGBUS handler")
