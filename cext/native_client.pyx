"""The measuring client (cext/native_client.h) for Python callers; the GIL is released while it runs."""
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "native_client.h" nogil:
    void eb_crc32c_init()
    int eb_raw_produce(const char *host, int port, const char *topic, int64_t count, size_t size, int batch,
                       int64_t unacked, int level, const char *name, uint64_t *elapsed)
    int eb_raw_one_by_one(const char *host, int port, const char *topic, int64_t count, size_t size, int level,
                          const char *name, uint64_t *latencies)
    int eb_raw_consume(const char *host, int port, const char *topic, const char *group, int64_t count,
                       uint32_t window, const char *name, uint64_t *elapsed)
    int eb_raw_push(const char *host, int port, const char *topic, const char *group, int64_t count, size_t size,
                    double rate, int level, const char *name, uint64_t *latencies)
    int eb_raw_many(const char *host, int port, const char *topic, int connections, int64_t count, size_t size,
                    int level, const char *name, uint64_t *elapsed)
    int eb_raw_ping(int64_t count, int echo_cpu, uint64_t *latencies)

cdef extern from "native_fanout.h" nogil:
    ctypedef struct eb_raw_fan:
        const char *host
        const char *topic
        const char *name
        int port, readers, batch
        int64_t count
        size_t size
        double rate
        uint64_t elapsed, ready
        uint64_t *latencies
    int eb_raw_run_fan(eb_raw_fan *fan)

eb_crc32c_init()

REASONS = {
    -1: "the connection failed", -2: "the broker sent what the protocol does not allow",
    -3: "the broker refused a request", -4: "answers or offsets came out of order", -5: "a batch is corrupt",
    -6: "a buffer is too small, or memory is short", -7: "no answer within 30 s",
}


cdef int _check(int error) except -1:
    if error:
        raise OSError(5, REASONS.get(error, f"error {error}"))
    return 0


def produce(bytes host, int port, bytes topic, int64_t count, size_t size, int batch, int64_t unacked, int level,
            bytes name):
    cdef uint64_t elapsed = 0
    cdef int error
    cdef const char *h = host
    cdef const char *t = topic
    cdef const char *n = name
    with nogil:
        error = eb_raw_produce(h, port, t, count, size, batch, unacked, level, n, &elapsed)
    _check(error)
    return elapsed / 1e9


def consume(bytes host, int port, bytes topic, bytes group, int64_t count, uint32_t window, bytes name):
    cdef uint64_t elapsed = 0
    cdef int error
    cdef const char *h = host
    cdef const char *t = topic
    cdef const char *g = group
    cdef const char *n = name
    with nogil:
        error = eb_raw_consume(h, port, t, g, count, window, n, &elapsed)
    _check(error)
    return elapsed / 1e9


def many(bytes host, int port, bytes topic, int connections, int64_t count, size_t size, int level, bytes name):
    cdef uint64_t elapsed = 0
    cdef int error
    cdef const char *h = host
    cdef const char *t = topic
    cdef const char *n = name
    with nogil:
        error = eb_raw_many(h, port, t, connections, count, size, level, n, &elapsed)
    _check(error)
    return elapsed / 1e9


cdef class _Times:
    """Room for so many measured times, in ns."""
    cdef uint64_t *ns
    cdef int64_t count

    def __cinit__(self, int64_t count):
        self.count = count
        self.ns = <uint64_t *>PyMem_Malloc(max(1, count) * sizeof(uint64_t))
        if self.ns == NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_Free(self.ns)

    cdef list seconds(self):
        return [self.ns[i] / 1e9 for i in range(self.count)]


def fanout(bytes host, int port, bytes topic, int readers, int64_t count, size_t size, int batch, double rate,
           bytes name):
    cdef eb_raw_fan fan
    cdef int error
    cdef _Times times = _Times(count * readers if rate > 0 else 0)
    fan.host, fan.port, fan.topic, fan.name = host, port, topic, name
    fan.readers, fan.batch, fan.count, fan.size, fan.rate = readers, batch, count, size, rate
    fan.elapsed = fan.ready = 0
    fan.latencies = times.ns if rate > 0 else NULL
    with nogil:
        error = eb_raw_run_fan(&fan)
    _check(error)
    return fan.elapsed / 1e9, fan.ready / 1e9, times.seconds()


def one_by_one(bytes host, int port, bytes topic, int64_t count, size_t size, int level, bytes name):
    cdef int error
    cdef const char *h = host
    cdef const char *t = topic
    cdef const char *n = name
    cdef _Times times = _Times(count)
    with nogil:
        error = eb_raw_one_by_one(h, port, t, count, size, level, n, times.ns)
    _check(error)
    return times.seconds()


def push(bytes host, int port, bytes topic, bytes group, int64_t count, size_t size, double rate, int level,
         bytes name):
    cdef int error
    cdef const char *h = host
    cdef const char *t = topic
    cdef const char *g = group
    cdef const char *n = name
    cdef _Times times = _Times(count)
    with nogil:
        error = eb_raw_push(h, port, t, g, count, size, rate, level, n, times.ns)
    _check(error)
    return times.seconds()


def ping(int64_t count, int echo_cpu=-1):
    cdef int error
    cdef _Times times = _Times(count)
    with nogil:
        error = eb_raw_ping(count, echo_cpu, times.ns)
    _check(error)
    return times.seconds()
