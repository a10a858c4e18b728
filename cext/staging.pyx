"""The staging area of one partition: takes client batches, checks them, finds duplicates, assigns offsets, copies.

One call handles a whole run of PUBLISH frames. `spans` is packed native u64 correlation, u32 start, u32 end for each
frame (edgebroker.network.wire.framing makes it); the answer is packed native i64 offset, i32 code, i32 reason for each.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from spans cimport Placed, Span
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from recordbatch cimport *

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t pad)
    int mallopt(int parameter, int value)
    enum:
        M_MMAP_THRESHOLD

eb_crc32c_init()

cdef enum:
    # edgebroker.common.errors.Code; a test holds the two together.
    CODE_OK = 0
    CODE_INVALID_BATCH = 4
    CODE_UNSUPPORTED_CODEC = 5
    CODE_TOO_LARGE = 7
    CODE_OUT_OF_ORDER = 15
    CODE_FENCED = 16
    EB_BAD_CODEC_ = 8
    EB_TOO_LARGE_ = 13
    POOL_SLOTS = 16
    POOL_BYTES = 16 << 20
    FIRST_BUFFER = 64 << 10
    FIRST_WINDOW = 8

cdef struct Entry:
    int64_t offset
    int32_t sequence, count
    uint32_t crc, zero           # zero: dump() writes the whole struct

# ---- buffers are recycled: fresh pages cost the kernel more than the copy into them ----

cdef struct Free:
    uint8_t *buffer
    size_t capacity

cdef Free _pool[POOL_SLOTS]
cdef size_t _pooled = 0, _pooled_bytes = 0

cdef uint8_t *_take_buffer(size_t *capacity) noexcept:
    global _pooled, _pooled_bytes
    cdef size_t i
    cdef uint8_t *buffer
    for i in range(_pooled):
        if _pool[i].capacity >= capacity[0]:
            buffer = _pool[i].buffer
            capacity[0] = _pool[i].capacity
            _pooled -= 1
            _pooled_bytes -= capacity[0]
            _pool[i] = _pool[_pooled]
            return buffer
    return <uint8_t *>malloc(capacity[0])

cdef void _give_buffer(uint8_t *buffer, size_t capacity) noexcept:
    global _pooled, _pooled_bytes
    if buffer == NULL:
        return
    if _pooled == POOL_SLOTS or _pooled_bytes + capacity > POOL_BYTES:
        free(buffer)
        return
    _pool[_pooled].buffer = buffer
    _pool[_pooled].capacity = capacity
    _pooled += 1
    _pooled_bytes += capacity

def give_back_large():
    """From now on a block of 128 KiB or more is the system's again once it is freed. Without this glibc raises its threshold
    with each such block, up to 32 MiB, and what is freed between others stays with the process."""
    mallopt(M_MMAP_THRESHOLD, 128 << 10)

def trim():
    """Give recycled buffers back to the system; call when nothing was staged for a while. Returns the bytes freed."""
    global _pooled, _pooled_bytes
    freed = _pooled_bytes
    while _pooled:
        _pooled -= 1
        free(_pool[_pooled].buffer)
    _pooled_bytes = 0
    malloc_trim(0)
    return freed


@cython.final
cdef class Chunk:
    """Numbered batches on their way to the disk; a read-only buffer whose memory lives as long as the object."""
    cdef uint8_t *buffer
    cdef size_t length, capacity
    cdef readonly int64_t first_offset, next_offset

    def __dealloc__(self):
        _give_buffer(self.buffer, self.capacity)

    def __len__(self):
        return self.length

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.buffer, self.length, 1, flags)

    @property
    def address(self):
        return <size_t>self.buffer


# Producers that are remembered, in one partition and in all: anybody can invent ids. The one heard of longest ago goes.
MOST_PRODUCERS, MOST_PRODUCERS_OF_ALL, LEAST_PRODUCERS = 10_000, 100_000, 100
cdef Py_ssize_t most_producers = MOST_PRODUCERS, most_of_all = MOST_PRODUCERS_OF_ALL, least_producers = LEAST_PRODUCERS
cdef Py_ssize_t windows_alive = 0


@cython.final
cdef class Window:
    """The last batches of one producer in this partition, oldest first, in a ring."""
    cdef Entry *entries
    cdef size_t head, used, room
    cdef int16_t epoch
    cdef int32_t next_sequence
    cdef double last_seen
    cdef Window previous    # what an epoch that is not settled yet replaced

    def __cinit__(self):
        global windows_alive
        windows_alive += 1

    def __dealloc__(self):
        global windows_alive
        windows_alive -= 1
        free(self.entries)

    cdef Entry *at(self, size_t rank) noexcept:
        return &self.entries[(self.head + rank) % self.room]

    cdef Window copy(self):
        cdef Window twin = Window.__new__(Window)
        twin.entries = <Entry *>malloc(self.room * sizeof(Entry))
        if twin.entries == NULL:
            raise MemoryError()
        memcpy(twin.entries, self.entries, self.room * sizeof(Entry))
        twin.head, twin.used, twin.room = self.head, self.used, self.room
        twin.previous = self.previous
        twin.epoch, twin.next_sequence, twin.last_seen = self.epoch, self.next_sequence, self.last_seen
        return twin

    cdef int push(self, Entry entry, size_t limit, int64_t settled) except -1:
        """Remember a batch. Only settled entries beyond the limit make room: a rollback takes the others back."""
        cdef Entry *grown
        cdef size_t i, room
        while self.used > limit and self.at(limit).offset < settled:
            self.head = (self.head + 1) % self.room
            self.used -= 1
        if self.used == self.room:
            room = max(FIRST_WINDOW, self.room * 2)
            grown = <Entry *>malloc(room * sizeof(Entry))
            if grown == NULL:
                raise MemoryError()
            for i in range(self.used):
                grown[i] = self.at(i)[0]
            free(self.entries)
            self.entries = grown
            self.head = 0
            self.room = room
        self.at(self.used)[0] = entry
        self.used += 1
        self.advance()
        if self.previous is not None and self.at(0).offset < settled:
            self.previous = None
        return 0

    cdef void advance(self) noexcept:
        cdef Entry *last = self.at(self.used - 1)
        self.next_sequence = <int32_t>((<uint32_t>last.sequence + <uint32_t>last.count) & 0x7FFFFFFF)

    cdef bint take_back(self, int64_t next_offset) noexcept:
        """Forget entries from an offset on; False when none is left."""
        while self.used and self.at(self.used - 1).offset >= next_offset:
            self.used -= 1
        if self.used:
            self.advance()
        return self.used > 0

    cdef Entry *find(self, int32_t sequence, size_t limit) noexcept:
        """The entry of the last `limit` that begins with a sequence: sequences are contiguous and may wrap once."""
        cdef uint32_t oldest, wanted
        cdef size_t low = self.used - min(self.used, limit), high = self.used, middle
        if self.used == 0:
            return NULL
        oldest = <uint32_t>self.at(0).sequence
        wanted = (<uint32_t>sequence - oldest) & 0x7FFFFFFF
        while low < high:
            middle = (low + high) // 2
            if ((<uint32_t>self.at(middle).sequence - oldest) & 0x7FFFFFFF) < wanted:
                low = middle + 1
            else:
                high = middle
        if low < self.used and self.at(low).sequence == sequence:
            return self.at(low)
        return NULL


@cython.final
cdef class Stage:
    """Client batches in, numbered chunks out. Owned by the loop thread.

    A run of frames may be refused frame by frame; a frame is taken whole or not at all. `next_offset` is the offset
    that the next record will get.
    """
    cdef readonly int64_t next_offset
    cdef readonly int32_t epoch
    cdef readonly size_t pending_bytes
    cdef size_t capacity, max_batch, max_record, window
    cdef uint8_t *buffer
    cdef int64_t first_offset, settled
    cdef dict producers
    cdef int64_t cached_id
    cdef Window cached

    def __cinit__(self, int64_t next_offset, int32_t epoch, size_t max_batch, size_t max_record, size_t window):
        self.next_offset = self.first_offset = self.settled = next_offset
        self.epoch = epoch
        self.max_batch, self.max_record, self.window = max_batch, max_record, window
        self.producers = {}
        self.cached_id = -1

    def __dealloc__(self):
        _give_buffer(self.buffer, self.capacity)

    cdef int reserve(self, size_t more) except -1:
        cdef size_t capacity = self.pending_bytes + more
        cdef uint8_t *grown
        if capacity <= self.capacity:
            return 0
        capacity = max(capacity, FIRST_BUFFER) if self.buffer == NULL else max(capacity, 2 * self.capacity)
        grown = _take_buffer(&capacity)
        if grown == NULL:
            raise MemoryError()
        if self.buffer != NULL:
            memcpy(grown, self.buffer, self.pending_bytes)
            _give_buffer(self.buffer, self.capacity)
        self.buffer = grown
        self.capacity = capacity
        return 0

    cdef int place(self, const uint8_t *p, const eb_batch *batch) except -1:
        self.reserve(batch.size)
        memcpy(self.buffer + self.pending_bytes, p, batch.size)
        if batch.corrected:
            eb_write_correction(self.buffer + self.pending_bytes, batch)
        eb_put64(self.buffer + self.pending_bytes, <uint64_t>self.next_offset)
        eb_put32(self.buffer + self.pending_bytes + EB_BATCH_EPOCH, <uint32_t>self.epoch)
        self.pending_bytes += batch.size
        self.next_offset += batch.count
        return 0

    cdef Window window_of(self, int64_t producer_id):
        if producer_id != self.cached_id:
            self.cached = self.producers.get(producer_id)
            self.cached_id = producer_id if self.cached is not None else -1
        return self.cached

    cdef int admit(self, eb_batch *batch, double now, int64_t *duplicate_of) except -1:
        """Decide one idempotent batch: a code; *duplicate_of is its old offset or -1 when it is new."""
        cdef Window window = self.window_of(batch.producer_id)
        cdef Entry *entry
        duplicate_of[0] = -1
        if window is None:
            return CODE_OK if batch.base_sequence == 0 else CODE_OUT_OF_ORDER
        window.last_seen = now
        if batch.producer_epoch < window.epoch:
            return CODE_FENCED
        if batch.producer_epoch > window.epoch:
            return CODE_OK if batch.base_sequence == 0 else CODE_OUT_OF_ORDER
        if batch.base_sequence == window.next_sequence:
            return CODE_OK
        entry = window.find(batch.base_sequence, self.window)
        if entry != NULL and entry.count == batch.count and entry.crc == batch.crc:
            duplicate_of[0] = entry.offset
            return CODE_OK
        return CODE_OUT_OF_ORDER

    cdef int make_room(self) except -1:
        """For a producer that is new here."""
        cdef Py_ssize_t count = len(self.producers)
        if count >= most_producers or (windows_alive > most_of_all and count > least_producers):
            oldest = next(iter(self.producers))
            if oldest == self.cached_id:
                self.cached, self.cached_id = None, -1
            del self.producers[oldest]
        return 0

    cdef int remember(self, eb_batch *batch, int64_t offset, double now) except -1:
        cdef Window window = self.window_of(batch.producer_id), replaced
        cdef Entry entry
        # A stored log may hold a producer that expired and began again; its latest run is what counts.
        if window is None or batch.producer_epoch != window.epoch or batch.base_sequence != window.next_sequence:
            replaced = window
            window = Window.__new__(Window)
            window.epoch = batch.producer_epoch
            window.previous = replaced
            if replaced is None:
                self.make_room()
            self.producers[batch.producer_id] = window
            self.cached, self.cached_id = window, batch.producer_id
        elif len(self.producers) > least_producers:  # behind those that were heard of before
            self.producers[batch.producer_id] = self.producers.pop(batch.producer_id)
        window.last_seen = now
        entry.offset, entry.sequence, entry.count, entry.crc = offset, batch.base_sequence, batch.count, batch.crc
        entry.zero = 0
        window.push(entry, self.window, self.settled)
        return 0

    def append(self, data, bytes spans, double now, bint inflated=False, granted=None):
        """Stage the frames of `spans`. Returns (answers, frames, wait, records).

        granted: the only producer id that these frames may carry; None: any.

        answers: packed Placed for the frames handled; frames: how many, fewer than given when the next one holds
        compressed records that are not inflated yet (`inflated` says they are); wait: the durable end that makes
        every answer true; records: how many were new.
        """
        cdef Py_buffer view
        cdef const Span *span = <const Span *>PyBytes_AS_STRING(spans)
        cdef Py_ssize_t frames = len(spans) // <Py_ssize_t>sizeof(Span), i, batches
        cdef bytes answers = PyBytes_FromStringAndSize(NULL, frames * sizeof(Placed))
        cdef Placed *placed = <Placed *>PyBytes_AS_STRING(answers)
        cdef eb_batch batch
        cdef size_t position, end
        cdef int64_t wait = 0, records = 0, duplicate_of, offset, before, frame_wait
        cdef size_t bytes_before
        cdef Window window
        cdef dict undo
        cdef const uint8_t *base
        cdef int reason, code
        cdef bint corrected, anybody = granted is None
        cdef int64_t owner = -1 if anybody else granted
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            base = <const uint8_t *>view.buf
            for i in range(frames):
                position, end = span[i].start, span[i].end
                if end > <size_t>view.len or position > end:
                    raise ValueError("a span lies outside of the buffer")
                reason = EB_TRUNCATED if position == end else EB_OK
                batches = 0
                corrected = False
                while position < end and reason == EB_OK:
                    reason = eb_check_client_batch(base + position, end - position, self.max_batch, self.max_record,
                                                   &batch)
                    if reason == EB_OK and batch.attributes & EB_CODEC_MASK and not inflated:
                        return answers[:i * sizeof(Placed)], i, wait, records
                    corrected = corrected or batch.corrected
                    position += batch.size
                    batches += 1
                placed[i].offset = -1
                placed[i].reason = reason
                if reason:
                    placed[i].code = (CODE_UNSUPPORTED_CODEC if reason == EB_BAD_CODEC_ else
                                      CODE_TOO_LARGE if reason == EB_TOO_LARGE_ else CODE_INVALID_BATCH)
                    continue
                placed[i].code = CODE_OK
                position = span[i].start
                before, bytes_before, frame_wait = self.next_offset, self.pending_bytes, 0
                undo = {} if batches > 1 else None
                while position < end:
                    if corrected:
                        eb_check_client_batch(base + position, end - position, self.max_batch, self.max_record, &batch)
                    else:
                        eb_frame_batch(base + position, end - position, self.max_batch, &batch)
                    duplicate_of = -1
                    if batch.producer_id >= 0:
                        code = CODE_FENCED
                        if anybody or batch.producer_id == owner:
                            code = self.admit(&batch, now, &duplicate_of)
                        if code:
                            placed[i].code = code
                            placed[i].offset = -1
                            if self.next_offset != before:
                                self.next_offset, self.pending_bytes = before, bytes_before
                                for producer_id, window in undo.items():
                                    if window is None:
                                        self.producers.pop(producer_id, None)
                                    else:
                                        self.producers[producer_id] = window
                                self.cached, self.cached_id = None, -1
                            frame_wait = 0
                            break
                    if duplicate_of >= 0:
                        offset = duplicate_of
                        frame_wait = max(frame_wait, duplicate_of + batch.count)
                    else:
                        offset = self.next_offset
                        self.place(base + position, &batch)
                        if batch.producer_id >= 0:
                            if undo is not None and batch.producer_id not in undo:
                                window = self.window_of(batch.producer_id)
                                undo[batch.producer_id] = None if window is None else window.copy()
                            self.remember(&batch, offset, now)
                        frame_wait = max(frame_wait, self.next_offset)
                    if placed[i].offset < 0:
                        placed[i].offset = offset
                    position += batch.size
                records += self.next_offset - before
                wait = max(wait, frame_wait)
        finally:
            PyBuffer_Release(&view)
        return answers, frames, wait, records

    def append_numbered(self, data, double now, int32_t max_epoch=0x7FFFFFFF):
        """Stage batches that carry their offsets already: CRC, density and epoch order are checked, bytes kept.

        Returns (bytes taken, reason it stopped).
        """
        cdef Py_buffer view
        cdef eb_batch batch
        cdef size_t position = 0
        cdef int reason = EB_OK
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            while position < <size_t>view.len:
                reason = eb_check_stored_batch(<const uint8_t *>view.buf + position, <size_t>view.len - position,
                                               self.max_batch, self.next_offset, self.epoch, 1, &batch)
                if reason == EB_OK and batch.epoch > max_epoch:
                    reason = EB_BAD_EPOCH
                if reason:
                    break
                self.reserve(batch.size)
                memcpy(self.buffer + self.pending_bytes, <const uint8_t *>view.buf + position, batch.size)
                self.pending_bytes += batch.size
                if batch.producer_id >= 0:
                    self.remember(&batch, self.next_offset, now)
                self.next_offset += batch.count
                self.epoch = batch.epoch
                position += batch.size
        finally:
            PyBuffer_Release(&view)
        return position, reason

    def take(self, size_t max_bytes):
        """Hand over staged batches, whole ones, at most max_bytes unless the first is larger. None when empty."""
        cdef Chunk chunk
        cdef eb_batch batch
        cdef size_t end = self.pending_bytes, capacity
        cdef int64_t next_offset = self.next_offset
        cdef uint8_t *rest
        if end == 0:
            return None
        if end > max_bytes:
            end = 0
            while end < self.pending_bytes:
                eb_frame_batch(self.buffer + end, self.pending_bytes - end, <size_t>1 << 31, &batch)
                if end and end + batch.size > max_bytes:
                    break
                end += batch.size
                next_offset = batch.base_offset + batch.count
        chunk = Chunk.__new__(Chunk)
        chunk.first_offset, chunk.next_offset = self.first_offset, next_offset
        rest = NULL
        capacity = self.pending_bytes - end
        if capacity:
            rest = _take_buffer(&capacity)
            if rest == NULL:
                raise MemoryError()
            memcpy(rest, self.buffer + end, self.pending_bytes - end)
        chunk.buffer, chunk.length, chunk.capacity = self.buffer, end, self.capacity
        self.buffer, self.capacity = rest, capacity if rest != NULL else 0
        self.pending_bytes -= end
        self.first_offset = next_offset
        return chunk

    def rollback(self, int64_t next_offset, int32_t epoch):
        """Forget everything from next_offset on, staged or taken: it was not stored. Producers may send it again."""
        cdef Window window
        self.pending_bytes = 0
        self.epoch = epoch
        self.next_offset = self.first_offset = next_offset
        self.cached, self.cached_id = None, -1
        for producer_id in list(self.producers):
            window = self.producers[producer_id]
            while window is not None and not window.take_back(next_offset):
                window = window.previous
            if window is None:
                del self.producers[producer_id]
            else:
                self.producers[producer_id] = window

    def settle(self, int64_t durable_end):
        """Everything below is durable: a rollback will not come back there."""
        self.settled = durable_end

    def replay(self, data, double now, int64_t below=-1):
        """Feed stored batches from offset `below` on to the producer windows (recovery); nothing is staged."""
        cdef Py_buffer view
        cdef eb_batch batch
        cdef size_t position = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            while eb_frame_batch(<const uint8_t *>view.buf + position, <size_t>view.len - position, <size_t>1 << 31,
                                 &batch) == EB_OK:
                if batch.producer_id >= 0 and batch.base_offset >= below:
                    self.remember(&batch, batch.base_offset, now)
                position += batch.size
        finally:
            PyBuffer_Release(&view)
        return position

    def resume(self, int64_t next_offset, int32_t epoch):
        """Continue at another end (recovery, a new epoch); nothing may be staged."""
        if self.pending_bytes:
            raise ValueError("batches are staged")
        self.next_offset = self.first_offset = next_offset
        self.epoch = epoch

    def expire(self, double before):
        """Forget producers that sent nothing since `before`. Returns how many."""
        gone = [producer_id for producer_id, window in self.producers.items() if (<Window>window).last_seen < before]
        for producer_id in gone:
            del self.producers[producer_id]
        self.cached, self.cached_id = None, -1
        return len(gone)

    @property
    def producer_count(self):
        return len(self.producers)

    def epochs(self):
        """{producer id: epoch} of everybody remembered."""
        cdef Window window
        found = {}
        for producer_id, value in self.producers.items():
            window = value
            found[producer_id] = window.epoch
        return found

    def dump(self, int64_t below):
        """[(producer id, epoch, age stamp, packed (i64 offset, i32 sequence, i32 count, u32 crc, u32 0) entries)] of
        batches below an offset."""
        cdef Window window
        cdef Entry *entry
        cdef size_t i
        found = []
        for producer_id, value in self.producers.items():
            window = value
            packed = bytearray()
            for i in range(window.used):
                entry = window.at(i)
                if entry.offset < below:
                    packed += (<const char *>entry)[:sizeof(Entry)]
            packed = packed[max(0, len(packed) - <Py_ssize_t>(self.window * sizeof(Entry))):]
            if packed:
                found.append((producer_id, window.epoch, window.last_seen, bytes(packed)))
        return found

    def load(self, found):
        """Take back what dump() gave."""
        cdef Window window
        cdef Entry entry
        cdef bytes packed
        cdef Py_ssize_t i
        for producer_id, epoch, last_seen, packed in found:
            window = Window.__new__(Window)
            window.epoch = epoch
            window.last_seen = last_seen
            for i in range(len(packed) // <Py_ssize_t>sizeof(Entry)):
                memcpy(&entry, PyBytes_AS_STRING(packed) + i * sizeof(Entry), sizeof(Entry))
                window.push(entry, self.window, self.settled)
            if window.used:
                self.producers[producer_id] = window
        self.cached, self.cached_id = None, -1
