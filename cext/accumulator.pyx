"""The producer's memory: records become batches as they are sent, one C call per record.

A PendingBatch keeps its encoded records until it is acknowledged, so that it can be framed again with another sequence.
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
cdef class PendingBatch:
    """Records for one partition until they are acknowledged; what the futures of those records look at."""
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
    cdef public int32_t sequence, sendings
    cdef public int64_t correlation, ordinal
    cdef public object answer
    cdef readonly bint chosen
    cdef readonly list moved

    def __cinit__(self, owner, str topic, int32_t partition, bint chosen, size_t room):
        self.owner, self.topic, self.partition, self.chosen = owner, topic, partition, chosen
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
        cdef eb_record record
        cdef size_t headers_length = 0
        record.value_length = record.key_length = -1
        record.value = record.key = record.headers = NULL
        record.header_count = header_count
        if value is not None:
            record.value = <const uint8_t *>PyBytes_AS_STRING(value)
            record.value_length = <int32_t>PyBytes_GET_SIZE(value)
        if key is not None:
            record.key = <const uint8_t *>PyBytes_AS_STRING(key)
            record.key_length = <int32_t>PyBytes_GET_SIZE(key)
        if headers is not None:
            record.headers = <const uint8_t *>PyBytes_AS_STRING(headers)
            headers_length = <size_t>PyBytes_GET_SIZE(headers)
        return self.put(&record, headers_length, timestamp)

    cdef int put(self, const eb_record *record, size_t headers_length, int64_t timestamp) except -1:
        cdef size_t capacity, bound
        cdef uint8_t *grown
        bound = self.used + eb_record_bound(max(record.key_length, 0), max(record.value_length, 0), headers_length)
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
        self.used += eb_encode_record(self.buffer + self.used, timestamp - self.base_timestamp, self.count,
                                      record.key, record.key_length, record.value, record.value_length,
                                      record.headers, headers_length, record.header_count)
        self.count += 1
        return 0

    def records(self):
        """The encoded records, for a codec."""
        return PyBytes_FromStringAndSize(<const char *>self.buffer + EB_BATCH_HEADER, self.used - EB_BATCH_HEADER)

    def frame(self, int64_t correlation, bytes prefix, int64_t producer_id, int16_t producer_epoch, int32_t sequence,
              uint16_t codec=0, bytes packed=None):
        """A whole PUBLISH frame; remembers its correlation."""
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
        self.correlation = correlation
        return out


@cython.final
@cython.freelist(4096)
cdef class Sent:
    """The future of one record, as Producer.send() returns it.

    Threads:
        Every method may be called from any thread.
    """
    cdef PendingBatch batch
    cdef int32_t index

    cdef PendingBatch found(self):
        """The batch that holds the record now."""
        cdef Sent other
        while self.batch.moved is not None:
            other = <Sent>self.batch.moved[self.index]
            self.batch, self.index = other.batch, other.index
        return self.batch

    cdef PendingBatch wait(self, timeout):
        cdef double deadline = 0.0 if timeout is None else _monotonic() + <double>timeout
        while not self.found().done:
            self.batch.owner.wait_for(self.batch, None if timeout is None else max(0.0, deadline - _monotonic()))
        return self.batch

    @property
    def topic(self):
        """The topic of the record."""
        return self.batch.topic

    @property
    def partition(self):
        """The partition that the record was put into. While it is not done, a topic that is created again with another
        number of partitions may move it."""
        return self.found().partition

    def done(self):
        """Tell whether the record is acknowledged or has failed. Never blocks."""
        return self.found().done

    def result(self, timeout=None):
        """Send the open batches now and wait until this record is acknowledged.

        Args:
            timeout: seconds to wait at most; None: no limit but the producer's own `timeout`.

        Returns:
            The offset of the record, or -1 at ack level "none".

        Raises:
            TimeoutError: it was not acknowledged within `timeout`; it still may be, later.
            AnswerError: the broker refused the record.
            UnreachableError: no acknowledgement within the producer's `timeout`, or the producer was closed before;
                whether the record is stored is unknown.

        Durability:
            When it returns, the record is as durable as the producer's `ack` says.
        """
        cdef PendingBatch batch = self.wait(timeout)
        if batch.error is not None:
            raise batch.error
        return batch.base_offset + self.index if batch.base_offset >= 0 else -1

    def exception(self, timeout=None):
        """Wait like result(), and return what went wrong instead of raising it.

        Args:
            timeout: seconds to wait at most; None: no limit but the producer's own `timeout`.

        Returns:
            None when the record is acknowledged, else what result() would raise.

        Raises:
            TimeoutError: the outcome was not known within `timeout`.
        """
        return self.wait(timeout).error

    def add_done_callback(self, callback):
        """Have `callback` called with this future once the record is acknowledged or has failed.

        It is called on the producer's I/O thread, where it must not block, or at once when the record is done. An
        exception that it raises on the I/O thread is logged and goes no further.

        Args:
            callback: called with this future as its only argument.
        """
        cdef PendingBatch batch = self.found()
        if batch.done:
            callback(self)
            return
        if batch.callbacks is None:
            batch.callbacks = []
        batch.callbacks.append((callback, self))
        if batch.done:  # it became done while the callback was being added
            batch.owner.run_callbacks(batch)


@cython.final
cdef class TopicBatches:
    """The open batch of each partition of a topic."""
    cdef readonly str name
    cdef readonly int32_t partitions
    cdef list open
    cdef int32_t sticky

    def __cinit__(self, str name, int32_t partitions):
        self.name, self.partitions = name, partitions
        self.open = [None] * partitions


@cython.final
cdef class Accumulator:
    """What happens in the caller's thread for each record.

    The owner provides open_topic(name) -> TopicBatches, batch_full(), batch_begun(), wait_for_room(), which raises
    when `closed`, invalid(message) and too_large(message) -> an exception, encode_headers(), and what Sent needs:
    wait_for() and run_callbacks(). It calls acknowledged() for each batch that take() gave it.
    """
    cdef readonly object owner
    cdef dict topics
    cdef list sealed
    cdef public bint closed
    cdef public int64_t unacked, unacked_bytes
    cdef readonly int64_t max_unacked, max_unacked_bytes
    cdef readonly int32_t batch_records
    cdef readonly size_t batch_bytes, max_record

    def __init__(self, owner, *, int32_t batch_records, size_t batch_bytes, int64_t max_unacked,
                 int64_t max_unacked_bytes, size_t max_record):
        self.owner = owner
        self.topics = {}
        self.sealed = []
        self.batch_records, self.batch_bytes = batch_records, batch_bytes
        self.max_unacked, self.max_unacked_bytes = max_unacked, max_unacked_bytes
        self.max_record = max_record

    cdef TopicBatches topic_of(self, str name):
        topic = self.topics.get(name)
        if topic is None:
            # Several threads may ask at once; all must get the same one.
            topic = self.topics.setdefault(name, self.owner.open_topic(name))
        return <TopicBatches>topic

    def send(self, str topic not None, bytes value, bytes key=None, *, headers=None, int64_t partition=-1,
             int64_t timestamp=-1):
        """Producer.send(), which documents it."""
        cdef PendingBatch batch
        cdef int32_t header_count = 0
        cdef bytes raw = None
        cdef size_t size = 32
        cdef TopicBatches found
        cdef Sent sent
        cdef bint chosen = partition != -1
        if self.closed or self.unacked >= self.max_unacked or self.unacked_bytes >= self.max_unacked_bytes:
            self.owner.wait_for_room()
        if value is not None:
            size += <size_t>PyBytes_GET_SIZE(value)
        if key is not None:
            size += <size_t>PyBytes_GET_SIZE(key)
        if headers is not None:
            header_count, raw = self.owner.encode_headers(headers)
            size += <size_t>PyBytes_GET_SIZE(raw)
        if size > self.max_record:
            raise self.owner.too_large(f"a record of {size} bytes is too large: the broker allows {self.max_record}")
        if timestamp < -1:
            raise self.owner.invalid(f"a timestamp is milliseconds since 1970, from 0 on, not {timestamp}")
        while True:
            # What calls into Python may let the I/O thread exchange the topic meanwhile: look again after it.
            found = self.topic_of(topic)
            if not chosen and key is not None:
                partition = <int32_t>((eb_murmur2(<const uint8_t *>PyBytes_AS_STRING(key),
                                                  <size_t>PyBytes_GET_SIZE(key)) & 0x7FFFFFFF) % found.partitions)
            elif not chosen:
                partition = found.sticky
            elif not 0 <= partition < found.partitions:
                raise self.owner.invalid(f"topic {topic} has no partition {partition}; it has {found.partitions}, "
                                         "numbered from 0")
            batch = <PendingBatch>found.open[partition]
            if batch is None:
                batch = PendingBatch.__new__(PendingBatch, self.owner, topic, partition, chosen, self.batch_bytes)
                if self.topics.get(topic) is not found:
                    continue
                found.open[partition] = batch
            elif batch.used + size > self.batch_bytes or batch.chosen != chosen:
                found.open[partition] = None
                self.sealed.append(batch)
                self.owner.batch_full()
                continue
            break
        batch.append(value, key, timestamp if timestamp >= 0 else _wall_ms(), header_count, raw)
        self.unacked += 1
        self.unacked_bytes += size
        sent = Sent.__new__(Sent)
        sent.batch = batch
        sent.index = batch.count - 1
        if batch.count >= self.batch_records or batch.used >= self.batch_bytes:
            found.open[partition] = None
            self.sealed.append(batch)
            if key is None and found.partitions > 1:
                found.sticky = (partition + 1) % found.partitions
            self.owner.batch_full()
        elif batch.count == 1:
            self.owner.batch_begun()
        return sent

    def ready(self, str topic not None):
        """Would send() not wait?"""
        return (topic in self.topics and not self.closed and self.unacked < self.max_unacked
                and self.unacked_bytes < self.max_unacked_bytes)

    def send_many(self, str topic not None, values, bytes key=None, *, int64_t partition=-1):
        """Producer.send_many(), which documents it."""
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
        cdef TopicBatches found
        cdef PendingBatch batch
        cdef double oldest = 0.0
        taken = self.sealed
        self.sealed = []
        for value in list(self.topics.values()):
            found = <TopicBatches>value
            for partition in range(found.partitions):
                batch = <PendingBatch>found.open[partition]
                if batch is None:
                    continue
                if batch.created <= older_than:
                    found.open[partition] = None
                    taken.append(batch)
                elif oldest == 0.0 or batch.created < oldest:
                    oldest = batch.created
        return taken, oldest

    def repartition(self, str name not None, int32_t partitions):
        """From now on a topic has so many partitions (0: ask again with its next record). Its open batches are full."""
        cdef TopicBatches found = <TopicBatches>self.topics.pop(name, None)
        if found is not None:
            self.sealed += [batch for batch in found.open if batch is not None]
            found.open = [None] * found.partitions
        if partitions > 0:
            self.topics[name] = TopicBatches(name, partitions)

    def move(self, PendingBatch batch, int32_t partitions):
        """Put the records of a batch into batches for as many partitions, in the order that they have; their futures
        follow. Returns the new batches. Not for a batch whose partition the caller chose."""
        cdef const uint8_t *p = batch.buffer + EB_BATCH_HEADER
        cdef const uint8_t *end = batch.buffer + batch.used
        cdef dict targets = {}
        cdef list moved = []
        cdef PendingBatch target
        cdef eb_record record
        cdef int32_t partition
        cdef Sent sent
        while p < end:
            if eb_read_record(p, end, &record):
                raise ValueError("a batch holds something that is not a record")
            partition = batch.partition % partitions
            if record.key_length >= 0:
                partition = <int32_t>((eb_murmur2(record.key, <size_t>record.key_length) & 0x7FFFFFFF) % partitions)
            target = <PendingBatch>targets.get(partition)
            if target is None:
                target = PendingBatch.__new__(PendingBatch, batch.owner, batch.topic, partition, False, batch.used)
                target.created = batch.created
                targets[partition] = target
            target.put(&record, <size_t>(record.end - record.headers), batch.base_timestamp + record.timestamp_delta)
            sent = Sent.__new__(Sent)
            sent.batch, sent.index = target, target.count - 1
            moved.append(sent)
            p = record.end
        batch.moved = moved
        callbacks, batch.callbacks = batch.callbacks, None
        for callback, waiting in callbacks or ():
            waiting.add_done_callback(callback)
        return list(targets.values())

    def acknowledged(self, PendingBatch batch, int64_t base_offset, error):
        """A batch is over: its futures are done (callbacks are the owner's business)."""
        batch.base_offset = base_offset
        batch.error = error
        batch.done = True
        self.unacked -= batch.count
        self.unacked_bytes = max(0, self.unacked_bytes - <int64_t>batch.used - 24 * <int64_t>batch.count)
        if self.unacked == 0:
            self.unacked_bytes = 0
