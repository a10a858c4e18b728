"""The producer's memory: records become batches as they are sent, one C call per record.

A Batch keeps its encoded records until it is acknowledged, so that it can be framed again with another sequence.
Every method runs with the GIL held from its beginning to its end, which is what makes send() safe to call while the
I/O thread works on other batches.
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from recordbatch cimport *

eb_crc32c_init()

cdef enum:
    FRAME_HEADER = 16
    FRAME_PUBLISH = 2


cdef double _monotonic() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec / 1e9


cdef int64_t _wall_ms() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_REALTIME, &t)
    return <int64_t>t.tv_sec * 1000 + t.tv_nsec // 1000000


@cython.final
cdef class Batch:
    """Records for one partition on their way; also what the futures of those records look at."""
    cdef uint8_t *buffer
    cdef size_t used, capacity
    cdef int64_t base_timestamp, max_timestamp
    cdef readonly str topic
    cdef readonly int32_t partition
    cdef readonly int32_t count
    cdef readonly double created
    cdef readonly object owner
    cdef public int64_t base_offset
    cdef public object error
    cdef public bint done
    cdef public list callbacks
    cdef public int32_t sequence
    cdef public int64_t correlation

    def __cinit__(self, owner, str topic, int32_t partition, size_t room):
        self.owner, self.topic, self.partition = owner, topic, partition
        self.capacity = min(room, 4096) + EB_BATCH_HEADER
        self.buffer = <uint8_t *>PyMem_Malloc(self.capacity)
        if self.buffer == NULL:
            raise MemoryError()
        self.used = EB_BATCH_HEADER
        self.base_offset = self.correlation = -1
        self.sequence = -1
        self.created = _monotonic()

    def __dealloc__(self):
        PyMem_Free(self.buffer)

    @property
    def size(self):
        return self.used

    cdef int append(self, bytes value, bytes key, int64_t timestamp, int32_t header_count, bytes headers) except -1:
        cdef int32_t value_length = -1, key_length = -1
        cdef const uint8_t *v = NULL
        cdef const uint8_t *k = NULL
        cdef const uint8_t *h = NULL
        cdef size_t bound, capacity, headers_length = 0
        cdef uint8_t *grown
        if value is not None:
            v = <const uint8_t *>PyBytes_AS_STRING(value)
            value_length = <int32_t>PyBytes_GET_SIZE(value)
        if key is not None:
            k = <const uint8_t *>PyBytes_AS_STRING(key)
            key_length = <int32_t>PyBytes_GET_SIZE(key)
        if headers is not None:
            h = <const uint8_t *>PyBytes_AS_STRING(headers)
            headers_length = <size_t>PyBytes_GET_SIZE(headers)
        bound = self.used + eb_record_bound(max(key_length, 0), max(value_length, 0), headers_length)
        if bound > self.capacity:
            capacity = bound * 2
            grown = <uint8_t *>PyMem_Realloc(self.buffer, capacity)
            if grown == NULL:
                raise MemoryError()
            self.buffer = grown
            self.capacity = capacity
        if self.count == 0:
            self.base_timestamp = self.max_timestamp = timestamp
        elif timestamp > self.max_timestamp:
            self.max_timestamp = timestamp
        self.used += eb_encode_record(self.buffer + self.used, timestamp - self.base_timestamp, self.count, k,
                                      key_length, v, value_length, h, headers_length, header_count)
        self.count += 1
        return 0

    def records(self):
        """The encoded records, for a codec."""
        return PyBytes_FromStringAndSize(<const char *>self.buffer + EB_BATCH_HEADER, self.used - EB_BATCH_HEADER)

    def frame(self, int64_t correlation, bytes prefix, int64_t producer_id, int16_t producer_epoch, int32_t sequence,
              uint16_t codec=0, bytes packed=None):
        """A whole PUBLISH frame."""
        cdef size_t records = self.used - EB_BATCH_HEADER if packed is None else <size_t>PyBytes_GET_SIZE(packed)
        cdef size_t prefix_length = <size_t>PyBytes_GET_SIZE(prefix)
        cdef size_t size = FRAME_HEADER + prefix_length + EB_BATCH_HEADER + records
        cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
        cdef uint8_t *p = <uint8_t *>PyBytes_AS_STRING(out)
        eb_put32(p, <uint32_t>(size - 4))
        p[4] = FRAME_PUBLISH
        p[5] = p[6] = p[7] = 0
        eb_put64(p + 8, <uint64_t>correlation)
        memcpy(p + FRAME_HEADER, PyBytes_AS_STRING(prefix), prefix_length)
        p += FRAME_HEADER + prefix_length
        if packed is None:
            memcpy(p + EB_BATCH_HEADER, self.buffer + EB_BATCH_HEADER, records)
        else:
            memcpy(p + EB_BATCH_HEADER, PyBytes_AS_STRING(packed), records)
        eb_write_header(p, records, codec, self.count, self.base_timestamp, self.max_timestamp, producer_id,
                        producer_epoch, sequence)
        self.sequence = sequence
        self.correlation = correlation
        return out


@cython.final
@cython.freelist(4096)
cdef class Sent:
    """The future of one record: done(), result(), add_done_callback()."""
    cdef Batch batch
    cdef int32_t index

    @property
    def topic(self):
        return self.batch.topic

    @property
    def partition(self):
        return self.batch.partition

    def done(self):
        return self.batch.done

    def result(self, timeout=None):
        if not self.batch.done:
            self.batch.owner.wait_for(self.batch, timeout)
        if self.batch.error is not None:
            raise self.batch.error
        return self.batch.base_offset + self.index if self.batch.base_offset >= 0 else -1

    def exception(self, timeout=None):
        if not self.batch.done:
            self.batch.owner.wait_for(self.batch, timeout)
        return self.batch.error

    def add_done_callback(self, callback):
        if self.batch.done:
            callback(self)
            return
        if self.batch.callbacks is None:
            self.batch.callbacks = []
        self.batch.callbacks.append((callback, self))
        if self.batch.done:  # it became done while the callback was being added
            self.batch.owner.run_callbacks(self.batch)


@cython.final
cdef class Topic:
    cdef readonly str name
    cdef readonly int32_t partitions
    cdef list open
    cdef int32_t sticky

    def __cinit__(self, str name, int32_t partitions):
        self.name, self.partitions = name, partitions
        self.open = [None] * partitions


cdef class Accumulator:
    """Base of Producer: what happens in the caller's thread for each record.

    A subclass gives open_topic(name) -> Topic, batch_full(), batch_begun(), wait_for_room() which raises when `closed`,
    and counts `unacked` down as batches are acknowledged.
    """
    cdef dict topics
    cdef list sealed
    cdef public bint closed
    cdef public int64_t unacked, unacked_bytes
    cdef readonly int64_t max_unacked, max_unacked_bytes
    cdef readonly int32_t batch_records
    cdef readonly size_t batch_bytes, max_record

    def __init__(self, int32_t batch_records, size_t batch_bytes, int64_t max_unacked, int64_t max_unacked_bytes,
                 size_t max_record):
        self.topics = {}
        self.sealed = []
        self.batch_records, self.batch_bytes = batch_records, batch_bytes
        self.max_unacked, self.max_unacked_bytes = max_unacked, max_unacked_bytes
        self.max_record = max_record

    cdef Topic topic_of(self, str name):
        topic = self.topics.get(name)
        if topic is None:
            # Several threads may ask at once; all must get the same one.
            topic = self.topics.setdefault(name, self.open_topic(name))
        return <Topic>topic

    def send(self, str topic not None, bytes value, bytes key=None, *, headers=None, int32_t partition=-1,
             int64_t timestamp=-1):
        cdef Batch batch
        cdef int32_t header_count = 0
        cdef bytes raw = None
        cdef size_t size = 32
        cdef Topic place
        cdef Sent sent
        if self.closed or self.unacked >= self.max_unacked or self.unacked_bytes >= self.max_unacked_bytes:
            self.wait_for_room()
        place = self.topic_of(topic)
        if value is not None:
            size += <size_t>PyBytes_GET_SIZE(value)
        if key is not None:
            size += <size_t>PyBytes_GET_SIZE(key)
        if headers is not None:
            header_count, raw = self.encode_headers(headers)
            size += <size_t>PyBytes_GET_SIZE(raw)
        if size > self.max_record:
            raise ValueError(f"a record of {size} bytes; the broker allows {self.max_record}")
        if partition < 0:
            if key is not None:
                partition = <int32_t>((eb_murmur2(<const uint8_t *>PyBytes_AS_STRING(key),
                                                  <size_t>PyBytes_GET_SIZE(key)) & 0x7FFFFFFF) % place.partitions)
            else:
                partition = place.sticky
        elif partition >= place.partitions:
            raise ValueError(f"topic {topic} has {place.partitions} partitions, there is no {partition}")
        batch = <Batch>place.open[partition]
        if batch is not None and batch.used + size > self.batch_bytes:
            place.open[partition] = None
            self.sealed.append(batch)
            self.batch_full()
            batch = <Batch>place.open[partition]
        if batch is None:
            batch = Batch.__new__(Batch, self, topic, partition, self.batch_bytes)
            place.open[partition] = batch
        batch.append(value, key, timestamp if timestamp >= 0 else _wall_ms(), header_count, raw)
        self.unacked += 1
        self.unacked_bytes += size
        sent = Sent.__new__(Sent)
        sent.batch = batch
        sent.index = batch.count - 1
        if batch.count >= self.batch_records or batch.used >= self.batch_bytes:
            place.open[partition] = None
            self.sealed.append(batch)
            if key is None and place.partitions > 1:
                place.sticky = (partition + 1) % place.partitions
            self.batch_full()
        elif batch.count == 1:
            self.batch_begun()
        return sent

    def send_many(self, str topic not None, values, bytes key=None, *, int32_t partition=-1):
        """send() for each value; the last future, None when there was no value."""
        cdef object sent = None
        for value in values:
            sent = self.send(topic, value, key, partition=partition)
        return sent

    def limit_to(self, size_t max_record, size_t max_batch):
        """What the broker allows."""
        self.max_record = max_record
        self.batch_bytes = min(self.batch_bytes, max_batch)

    def take(self, double older_than):
        """The full batches and those begun before a monotonic time, in order; when the oldest that stays was begun
        (0: none stays)."""
        cdef Topic place
        cdef Batch batch
        cdef double oldest = 0.0
        taken = self.sealed
        self.sealed = []
        for value in list(self.topics.values()):
            place = <Topic>value
            for partition in range(place.partitions):
                batch = <Batch>place.open[partition]
                if batch is None:
                    continue
                if batch.created <= older_than:
                    place.open[partition] = None
                    taken.append(batch)
                elif oldest == 0.0 or batch.created < oldest:
                    oldest = batch.created
        return taken, oldest

    def acknowledged(self, Batch batch, int64_t base_offset, error):
        """A batch is over: its futures are done (callbacks are the subclass's business)."""
        batch.base_offset = base_offset
        batch.error = error
        batch.done = True
        self.unacked -= batch.count
        self.unacked_bytes = max(0, self.unacked_bytes - <int64_t>batch.used - 24 * <int64_t>batch.count)
        if self.unacked == 0:
            self.unacked_bytes = 0
