"""Records to batch bytes and back, one call per batch (format: cext/recordbatch.h)."""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport INT64_MAX, INT64_MIN, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from recordbatch cimport *

eb_crc32c_init()


@cython.final
@cython.freelist(1024)
cdef class Record:
    """One record as a consumer receives it; immutable, and not created by callers.

    Attributes:
        topic: the topic that it was read from.
        partition: the partition, from 0.
        offset: its number in the partition, the same at every node of the tree.
        timestamp: milliseconds since 1970, as the producer set it.
        key: bytes, or None.
        value: bytes, or None: in a table this deletes the key.
        headers: a tuple of (name, bytes or None), in the producer's order.
    """
    cdef readonly str topic
    cdef readonly int32_t partition
    cdef readonly int64_t offset
    cdef readonly int64_t timestamp
    cdef readonly object key
    cdef readonly object value
    cdef readonly tuple headers

    def __repr__(self):
        return (f"Record(topic={self.topic!r}, partition={self.partition}, offset={self.offset}, "
                f"timestamp={self.timestamp}, key={self.key!r}, value={self.value!r}, headers={self.headers!r})")


cdef tuple _headers(const uint8_t *p, const uint8_t *end, int32_t count):
    cdef list found = []
    cdef int32_t size
    for _ in range(count):
        p += eb_varint(p, end, &size)
        name = (<const char *>p)[:size].decode("utf-8")
        p += size
        p += eb_varint(p, end, &size)
        found.append((name, None if size < 0 else PyBytes_FromStringAndSize(<const char *>p, size)))
        if size > 0:
            p += size
    return tuple(found)


cdef int _decode_records(const uint8_t *p, size_t n, eb_batch *batch, int64_t first, int64_t last, str topic,
                         int32_t partition, list into) except -1:
    """Append the records whose offsets lie in [first, last]. Returns a reason."""
    cdef const uint8_t *end = p + n
    cdef eb_record found
    cdef Record record
    cdef int64_t offset
    cdef int reason
    for _ in range(batch.count):
        reason = eb_read_record(p, end, &found)
        if reason:
            return reason
        offset = batch.base_offset + found.offset_delta
        if first <= offset <= last:
            record = Record.__new__(Record)
            record.topic = topic
            record.partition = partition
            record.offset = offset
            record.timestamp = batch.base_timestamp + found.timestamp_delta
            record.key = None if found.key_length < 0 else PyBytes_FromStringAndSize(
                <const char *>found.key, found.key_length)
            record.value = None if found.value_length < 0 else PyBytes_FromStringAndSize(
                <const char *>found.value, found.value_length)
            record.headers = _headers(found.headers, found.end, found.header_count) if found.header_count else ()
            into.append(record)
        p = found.end
    return EB_OK if p == end else EB_BAD_RECORD


def decode(data, inflate, str topic, int32_t partition, int64_t first=0, int64_t last=INT64_MAX,
           size_t max_batch=1 << 31):
    cdef Py_buffer view, records
    cdef eb_batch batch
    cdef size_t position = 0
    cdef int reason = EB_OK
    cdef list into = []
    cdef const uint8_t *p
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        while position < <size_t>view.len:
            p = <const uint8_t *>view.buf + position
            reason = eb_frame_batch(p, <size_t>view.len - position, max_batch, &batch)
            if reason == EB_OK and not eb_crc_matches(p, &batch):
                reason = EB_BAD_CRC
            if reason:
                break
            if batch.attributes & EB_ATTRIBUTE_CONTROL or batch.base_offset + batch.last_delta < first:
                position += batch.size
                continue
            if batch.base_offset > last:
                break
            if batch.attributes & EB_CODEC_MASK:
                plain = inflate(batch.attributes & EB_CODEC_MASK,
                                PyBytes_FromStringAndSize(<const char *>p + EB_BATCH_HEADER,
                                                          batch.size - EB_BATCH_HEADER))
                PyObject_GetBuffer(plain, &records, PyBUF_SIMPLE)
                try:
                    reason = _decode_records(<const uint8_t *>records.buf, <size_t>records.len, &batch, first, last,
                                             topic, partition, into)
                finally:
                    PyBuffer_Release(&records)
            else:
                reason = _decode_records(p + EB_BATCH_HEADER, batch.size - EB_BATCH_HEADER, &batch, first, last,
                                         topic, partition, into)
            if reason:
                break
            position += batch.size
    finally:
        PyBuffer_Release(&view)
    return into, position, reason


def header(data, size_t position=0):
    """The fields of the batch header at `position`; nothing is verified."""
    cdef Py_buffer view
    cdef eb_batch batch
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        reason = eb_frame_batch(<const uint8_t *>view.buf + position, <size_t>view.len - position, 1 << 31, &batch) \
            if position <= <size_t>view.len else EB_TRUNCATED
    finally:
        PyBuffer_Release(&view)
    if reason:
        return reason, None
    return reason, (batch.base_offset, batch.size, batch.epoch, batch.crc, batch.attributes, batch.count,
                    batch.base_timestamp, batch.max_timestamp, batch.producer_id, batch.producer_epoch,
                    batch.base_sequence)


def chain(data, uint32_t value):
    cdef Py_buffer view
    cdef eb_batch batch
    cdef size_t position = 0
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        while position < <size_t>view.len:
            if eb_frame_batch(<const uint8_t *>view.buf + position, <size_t>view.len - position, 1 << 31, &batch):
                raise ValueError("whole batches are expected")
            value = eb_chain(value, <const uint8_t *>view.buf + position)
            position += batch.size
    finally:
        PyBuffer_Release(&view)
    return value


def check_inflated(batch_bytes, plain, size_t max_record):
    """Check the inflated records of a compressed client batch, and set its maximum timestamp right. Returns a reason."""
    cdef Py_buffer outer, inner
    cdef eb_batch batch
    cdef int64_t latest
    cdef int reason
    PyObject_GetBuffer(batch_bytes, &outer, PyBUF_WRITABLE)
    try:
        reason = eb_frame_batch(<const uint8_t *>outer.buf, <size_t>outer.len, 1 << 31, &batch)
        if reason:
            return reason
        PyObject_GetBuffer(plain, &inner, PyBUF_SIMPLE)
        try:
            with nogil:
                reason = eb_check_records(<const uint8_t *>inner.buf, <size_t>inner.len, &batch, max_record, &latest)
                if reason == EB_OK:
                    eb_correct(<const uint8_t *>outer.buf, &batch, latest)
                    if batch.corrected:
                        eb_write_correction(<uint8_t *>outer.buf, &batch)
        finally:
            PyBuffer_Release(&inner)
    finally:
        PyBuffer_Release(&outer)
    return reason


def murmur2(key):
    cdef Py_buffer view
    PyObject_GetBuffer(key, &view, PyBUF_SIMPLE)
    try:
        return eb_murmur2(<const uint8_t *>view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)


def encode_headers(headers):
    """(count, bytes) of a sequence of (name, value or None); names are str."""
    cdef list parts = []
    cdef uint8_t prefix[10]
    cdef int32_t count = 0
    for name, value in headers:
        if not isinstance(name, str):
            raise TypeError(f"header names are str, not {type(name).__name__}")
        if value is not None and not isinstance(value, bytes):
            raise TypeError(f"header values are bytes or None, not {type(value).__name__}")
        raw = (<str>name).encode("utf-8")
        parts.append(PyBytes_FromStringAndSize(<const char *>prefix, eb_put_varlong(prefix, len(raw))))
        parts.append(raw)
        parts.append(PyBytes_FromStringAndSize(
            <const char *>prefix, eb_put_varlong(prefix, -1 if value is None else len(value))))
        if value:
            parts.append(value)
        count += 1
    return count, b"".join(parts)


@cython.final
cdef class BatchBuilder:
    """Encodes records one after the other into the body of one batch. Not thread-safe."""
    cdef uint8_t *buffer
    cdef size_t used, capacity
    cdef readonly int32_t count
    cdef int64_t base_timestamp, max_timestamp

    def __cinit__(self):
        self.capacity = 4096
        self.buffer = <uint8_t *>PyMem_Malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError()
        self.used = EB_BATCH_HEADER

    def __dealloc__(self):
        PyMem_Free(self.buffer)

    @property
    def size(self):
        return self.used

    def append(self, bytes value, bytes key, int64_t timestamp, int32_t header_count=0, bytes headers=b""):
        cdef int32_t value_length = -1, key_length = -1
        cdef const uint8_t *v = NULL
        cdef const uint8_t *k = NULL
        cdef size_t bound
        if value is not None:
            v = <const uint8_t *>PyBytes_AS_STRING(value)
            value_length = <int32_t>PyBytes_GET_SIZE(value)
        if key is not None:
            k = <const uint8_t *>PyBytes_AS_STRING(key)
            key_length = <int32_t>PyBytes_GET_SIZE(key)
        bound = self.used + eb_record_bound(max(key_length, 0), max(value_length, 0), PyBytes_GET_SIZE(headers))
        if bound > self.capacity:
            grown = <uint8_t *>PyMem_Realloc(self.buffer, bound * 2)
            if grown == NULL:
                raise MemoryError()
            self.buffer = grown
            self.capacity = bound * 2
        if (self.count and (timestamp < 0) != (self.base_timestamp < 0)
                and not -(1 << 63) <= <object>timestamp - <object>self.base_timestamp < 1 << 63):
            raise OverflowError("the timestamps of one batch lie more than 2**63 ms apart")
        if self.count == 0:
            self.base_timestamp = self.max_timestamp = timestamp
        elif timestamp > self.max_timestamp:
            self.max_timestamp = timestamp
        self.used += eb_encode_record(self.buffer + self.used, timestamp - self.base_timestamp, self.count, k,
                                      key_length, v, value_length, <const uint8_t *>PyBytes_AS_STRING(headers),
                                      PyBytes_GET_SIZE(headers), header_count)
        self.count += 1

    def records(self):
        """The encoded records, for a codec."""
        return PyBytes_FromStringAndSize(<const char *>self.buffer + EB_BATCH_HEADER, self.used - EB_BATCH_HEADER)

    def build(self, bytes packed=None, uint16_t attributes=0, int64_t producer_id=-1, int16_t producer_epoch=-1,
              int32_t base_sequence=-1):
        """The whole batch; `packed` replaces the plain records when a codec was applied."""
        cdef bytes batch
        cdef uint8_t *p
        cdef size_t size = self.used - EB_BATCH_HEADER if packed is None else PyBytes_GET_SIZE(packed)
        batch = PyBytes_FromStringAndSize(NULL, EB_BATCH_HEADER + size)
        p = <uint8_t *>PyBytes_AS_STRING(batch)
        memcpy(p + EB_BATCH_HEADER,
               self.buffer + EB_BATCH_HEADER if packed is None else <const uint8_t *>PyBytes_AS_STRING(packed), size)
        eb_write_header(p, size, attributes, self.count, self.base_timestamp, self.max_timestamp, producer_id,
                        producer_epoch, base_sequence)
        return batch


def restamp(batch, int64_t base_offset=-1, int32_t epoch=-1):
    """A copy with another base offset and epoch, as an origin assigns them (both lie outside the CRC)."""
    cdef bytearray copy = bytearray(batch)
    cdef uint8_t *p = <uint8_t *><char *>copy
    if len(copy) < EB_BATCH_HEADER:
        raise ValueError("not a whole batch header")
    if base_offset >= 0:
        eb_put64(p + EB_BATCH_BASE_OFFSET, <uint64_t>base_offset)
    if epoch >= 0:
        eb_put32(p + EB_BATCH_EPOCH, <uint32_t>epoch)
    return bytes(copy)
