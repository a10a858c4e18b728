"""The live records of a table's log: which record of each key is the last one, and these records as new batches.

    note()   for all batches in the order of the log: remembers the last record of each key
    live()   for the same batches again: those records, in batches of their own

A key is remembered by 128 bits of its hash under a secret key (cext/siphash.h), 32 bytes a key with the offset and the
size of its last record: that two of a hundred million keys have one hash has a chance of 1 to 10**22, and nobody can
make two that do.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from recordbatch cimport *

cdef extern from "siphash.h" nogil:
    void eb_siphash128(const uint8_t *p, size_t n, uint64_t k0, uint64_t k1, uint64_t *out)

eb_crc32c_init()

cdef enum:
    BATCH_BYTES = 256 << 10
    FIRST_SLOTS = 1024
    # Beside the reasons of recordbatch.h.
    NO_KEY = 100
    TOO_MANY = 101

cdef struct Slot:
    uint64_t hash[2]
    # Behind the last record of the key, negative when that deleted it.
    int64_t next_offset
    # Of that record; 0: the slot is free.
    uint32_t size


class NoTableError(Exception):
    """A record without a key."""


class TooManyKeysError(Exception):
    """The keys take more memory than is allowed."""


@cython.final
cdef class LiveKeys:
    """Not thread-safe. Batches are whole and verified, and come in the order of the log. `keys` live ones were noted,
    and their records take `size` bytes.

    Args:
        max_bytes: memory for the keys; more raises TooManyKeysError.
        secret: 16 random bytes, the key of the hash.
    """
    cdef Slot *slots
    cdef size_t capacity, used, max_bytes
    cdef uint64_t secret[2]
    cdef readonly int64_t keys
    cdef readonly int64_t size
    cdef uint8_t *batch
    cdef size_t batch_used, batch_capacity
    cdef int32_t batch_count
    cdef int64_t base_timestamp, max_timestamp

    def __cinit__(self, size_t max_bytes, bytes secret):
        if len(secret) != 16:
            raise ValueError("16 random bytes are expected")
        self.max_bytes = max_bytes
        self.capacity = FIRST_SLOTS
        self.slots = <Slot *>calloc(self.capacity, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()
        memcpy(self.secret, PyBytes_AS_STRING(secret), 16)
        self.batch_used = EB_BATCH_HEADER

    def __dealloc__(self):
        free(self.slots)
        PyMem_Free(self.batch)

    cdef Slot *_find(self, const uint8_t *key, size_t n) noexcept nogil:
        """The slot of a key, or the free one where it belongs."""
        cdef uint64_t found[2]
        cdef size_t at
        eb_siphash128(key, n, self.secret[0], self.secret[1], found)
        at = found[0] & (self.capacity - 1)
        while self.slots[at].size and (self.slots[at].hash[0] != found[0] or self.slots[at].hash[1] != found[1]):
            at = (at + 1) & (self.capacity - 1)
        self.slots[at].hash[0] = found[0]
        self.slots[at].hash[1] = found[1]
        return &self.slots[at]

    cdef int _grow(self) noexcept nogil:
        """Twice the slots; TOO_MANY when that is not allowed."""
        cdef size_t capacity = self.capacity * 2, at, i
        cdef Slot *larger
        if capacity * sizeof(Slot) > self.max_bytes:
            return TOO_MANY
        larger = <Slot *>calloc(capacity, sizeof(Slot))
        if larger == NULL:
            return TOO_MANY
        for i in range(self.capacity):
            if self.slots[i].size:
                at = self.slots[i].hash[0] & (capacity - 1)
                while larger[at].size:
                    at = (at + 1) & (capacity - 1)
                larger[at] = self.slots[i]
        free(self.slots)
        self.slots = larger
        self.capacity = capacity
        return EB_OK

    cdef int _note(self, const uint8_t *p, const uint8_t *end, const eb_batch *batch, int64_t stop) noexcept nogil:
        cdef eb_record record
        cdef Slot *slot
        cdef int reason
        cdef uint32_t size
        for _ in range(batch.count):
            reason = eb_read_record(p, end, &record)
            if reason:
                return reason
            if record.key_length < 0:
                return NO_KEY
            if batch.base_offset + record.offset_delta >= stop:
                return EB_OK
            if self.used * 4 >= self.capacity * 3:
                reason = self._grow()
                if reason:
                    return reason
            size = <uint32_t>(record.end - p)
            slot = self._find(record.key, record.key_length)
            if slot.size == 0:
                self.used += 1
            elif slot.next_offset > 0:
                self.keys -= 1
                self.size -= slot.size
            slot.size = size
            slot.next_offset = batch.base_offset + record.offset_delta + 1
            if record.value_length < 0:
                slot.next_offset = -slot.next_offset
            else:
                self.keys += 1
                self.size += size
            p = record.end
        return EB_OK

    def note(self, data, inflate, int64_t stop=INT64_MAX):
        """Remember the last record of each key, of the records before offset `stop`.

        `inflate(codec, packed)` gives the records of a compressed batch. Raises NoTableError, TooManyKeysError,
        ValueError for what is not a batch.
        """
        for batch, records in _each(data, inflate):
            _raise_for(self._noted(batch, records, stop))

    cdef int _noted(self, Batch batch, records, int64_t stop) except -1:
        cdef Py_buffer view
        cdef int reason
        PyObject_GetBuffer(records, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                reason = self._note(<const uint8_t *>view.buf, <const uint8_t *>view.buf + view.len, &batch.fields, stop)
        finally:
            PyBuffer_Release(&view)
        return reason

    def live(self, data, inflate, int64_t stop=INT64_MAX):
        """The batches that became full with the live records of these ones (of those before `stop`); flush() gives the
        rest. Raises ValueError for what is not a batch."""
        cdef list full = []
        cdef Py_buffer view
        for batch, records in _each(data, inflate):
            PyObject_GetBuffer(records, &view, PyBUF_SIMPLE)
            try:
                _raise_for(self._live(<const uint8_t *>view.buf, <size_t>view.len, batch, stop, full))
            finally:
                PyBuffer_Release(&view)
        return full

    cdef int _live(self, const uint8_t *p, size_t n, Batch batch, int64_t stop, list full) except -1:
        cdef const uint8_t *end = p + n
        cdef eb_record record
        cdef Slot *slot
        cdef int64_t offset, timestamp
        cdef int reason
        for _ in range(batch.fields.count):
            reason = eb_read_record(p, end, &record)
            if reason:
                return reason
            offset = batch.fields.base_offset + record.offset_delta
            if offset >= stop:
                return EB_OK
            slot = self._find(record.key, record.key_length) if record.key_length >= 0 else NULL
            if slot != NULL and slot.next_offset == offset + 1:
                timestamp = batch.fields.base_timestamp + record.timestamp_delta
                self._add(&record, timestamp, full)
            p = record.end
        return EB_OK

    cdef int _add(self, const eb_record *record, int64_t timestamp, list full) except -1:
        cdef size_t headers = record.end - record.headers
        cdef size_t bound = eb_record_bound(max(record.key_length, 0), max(record.value_length, 0), headers)
        apart = self.batch_count and (timestamp < 0) != (self.base_timestamp < 0)
        if self.batch_count and (apart or self.batch_used + bound > BATCH_BYTES):
            full.append(self.flush())
        if self.batch_used + bound > self.batch_capacity:
            grown = <uint8_t *>PyMem_Realloc(self.batch, max(self.batch_used + bound, <size_t>BATCH_BYTES))
            if grown == NULL:
                raise MemoryError()
            self.batch = grown
            self.batch_capacity = max(self.batch_used + bound, <size_t>BATCH_BYTES)
        if self.batch_count == 0:
            self.base_timestamp = self.max_timestamp = timestamp
        self.max_timestamp = max(self.max_timestamp, timestamp)
        self.batch_used += eb_encode_record(
            self.batch + self.batch_used, timestamp - self.base_timestamp, self.batch_count,
            record.key if record.key_length >= 0 else NULL, record.key_length,
            record.value if record.value_length >= 0 else NULL, record.value_length,
            record.headers, headers, record.header_count)
        self.batch_count += 1
        return 0

    def flush(self):
        """The last batch of live records; None when there is none."""
        cdef bytes batch
        if self.batch_count == 0:
            return None
        batch = PyBytes_FromStringAndSize(<const char *>self.batch, self.batch_used)
        eb_write_header(<uint8_t *>PyBytes_AS_STRING(batch), self.batch_used - EB_BATCH_HEADER, 0, self.batch_count,
                        self.base_timestamp, self.max_timestamp, -1, -1, -1)
        self.batch_used, self.batch_count = EB_BATCH_HEADER, 0
        return batch


@cython.final
cdef class Batch:
    """The header of a batch."""
    cdef eb_batch fields


def _each(data, inflate):
    """(header, records) of every batch that is not a control batch."""
    cdef Py_buffer view
    cdef Batch batch
    cdef size_t position = 0
    cdef const uint8_t *p
    whole = memoryview(data)
    while position < <size_t>len(whole):
        batch = Batch.__new__(Batch)
        PyObject_GetBuffer(whole, &view, PyBUF_SIMPLE)
        try:
            p = <const uint8_t *>view.buf + position
            reason = eb_frame_batch(p, <size_t>view.len - position, 1 << 31, &batch.fields)
        finally:
            PyBuffer_Release(&view)
        if reason:
            raise ValueError("whole batches are expected")
        records = whole[position + EB_BATCH_HEADER : position + batch.fields.size]
        position += batch.fields.size
        if batch.fields.attributes & EB_ATTRIBUTE_CONTROL:
            continue
        codec = batch.fields.attributes & EB_CODEC_MASK
        yield batch, inflate(codec, bytes(records)) if codec else records


cdef int _raise_for(int reason) except -1:
    if reason == NO_KEY:
        raise NoTableError("a record has no key")
    if reason == TOO_MANY:
        raise TooManyKeysError("the keys take more memory than a snapshot may use")
    if reason:
        raise ValueError("a record cannot be read")
    return 0
