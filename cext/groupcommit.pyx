"""The commit thread's work without the GIL: write a group of chunks, sync their files, say so through an eventfd.

One group is in flight at a time; the loop submits the next when it collected the last (natural group commit).
The thread sleeps on `wake`, an eventfd; a Python closure is announced by the same eventfd with no group waiting, and
run() returns so that the caller can run it.
"""
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EINTR, EIO, ENOSYS, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK
cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *data, size_t n)
    ssize_t read(int fd, void *data, size_t n)
    ssize_t pwrite(int fd, const void *data, size_t n, int64_t offset)
    int fdatasync(int fd)
    int syncfs(int fd)
    int close(int fd)
cdef extern from "<sys/utsname.h>" nogil:
    struct utsname:
        char release[65]
    int uname(utsname *name)
cdef extern from "<stdio.h>" nogil:
    int sscanf(const char *text, const char *layout, ...)
cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, int64_t offset, int64_t length)
    enum:
        FALLOC_FL_KEEP_SIZE

cdef extern from *:
    int __ATOMIC_ACQUIRE
    int __ATOMIC_RELEASE
    int __atomic_load_n(int *address, int order) nogil
    void __atomic_store_n(int *address, int value, int order) nogil

cdef enum:
    # From this many dirty files on, one syncfs is cheaper than a sync of each.
    SYNCFS_ABOVE = 8
    IDLE = 0
    WRITING = 1
    WRITTEN = 2
    DONE = 3

cdef struct Write:
    int fd
    int64_t position
    const uint8_t *data
    size_t length
    int64_t allocate_from, allocate_bytes   # bytes 0: nothing to preallocate
    int write_error, sync_error

cdef int64_t _now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec

cdef void _signal(int fd) noexcept nogil:
    cdef uint64_t one = 1
    while write(fd, &one, 8) < 0 and errno == EINTR:
        pass

cdef int _write_all(Write *job) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t n
    if job.allocate_bytes and fallocate(job.fd, FALLOC_FL_KEEP_SIZE, job.allocate_from, job.allocate_bytes) < 0:
        if errno != EOPNOTSUPP and errno != ENOSYS and errno != EINTR:
            return errno
    while done < job.length:
        n = pwrite(job.fd, job.data + done, job.length - done, job.position + <int64_t>done)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        if n == 0:
            return EIO
        done += <size_t>n
    return 0


cdef int syncfs_reports_errors() noexcept:
    """Linux tells of a failed write-back or journal commit by syncfs only since 5.17."""
    cdef utsname name
    cdef int major = 0, minor = 0
    if uname(&name) or sscanf(name.release, "%d.%d", &major, &minor) != 2:
        return 0
    return major > 5 or (major == 5 and minor >= 17)


cdef class GroupCommit:
    """Submit from the loop thread, run() on the commit thread."""
    cdef readonly int wake_fd, done_fd
    cdef Write *writes
    cdef size_t count
    cdef int sync, announce_written, syncfs_reports
    cdef int state, called
    cdef int64_t started_ns, written_ns, synced_ns
    cdef object keep

    def __cinit__(self):
        self.wake_fd = eventfd(0, EFD_CLOEXEC)
        self.done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.syncfs_reports = syncfs_reports_errors()
        if self.wake_fd < 0 or self.done_fd < 0:
            raise OSError(errno, "cannot make an eventfd")

    def __dealloc__(self):
        PyMem_Free(self.writes)

    def close(self):
        close(self.wake_fd)
        close(self.done_fd)

    @property
    def idle(self):
        return self.state == IDLE

    @property
    def seconds_in_flight(self):
        """How long the group in flight has been with the disk; 0 when there is none."""
        return 0.0 if self.state in (IDLE, DONE) else (_now_ns() - self.started_ns) / 1e9

    def submit(self, list jobs, bint sync, bint announce_written):
        """jobs: (fd, position, buffer address, length, allocate from, allocate bytes, keep-alive object) each."""
        cdef Py_ssize_t i = 0
        if self.state != IDLE:
            raise RuntimeError("a group is in flight")
        PyMem_Free(self.writes)
        self.writes = <Write *>PyMem_Malloc(max(1, len(jobs)) * sizeof(Write))
        if self.writes == NULL:
            raise MemoryError()
        for fd, position, address, length, allocate_from, allocate_bytes, _ in jobs:
            self.writes[i].fd = fd
            self.writes[i].position = position
            self.writes[i].data = <const uint8_t *><size_t>address
            self.writes[i].length = length
            self.writes[i].allocate_from = allocate_from
            self.writes[i].allocate_bytes = allocate_bytes
            self.writes[i].write_error = self.writes[i].sync_error = 0
            i += 1
        self.count = i
        self.sync, self.announce_written = sync, announce_written
        self.keep = jobs
        self.started_ns = _now_ns()
        __atomic_store_n(&self.state, WRITING, __ATOMIC_RELEASE)
        _signal(self.wake_fd)

    def call(self):
        """Make run() return once, so that the commit thread runs a closure."""
        self.called = 1
        _signal(self.wake_fd)

    def run(self):
        """Work on groups; returns when woken without one. Called on the commit thread only."""
        with nogil:
            while self._wait():
                self._work()
                if self.called:
                    break  # one wake-up may have stood for a group and for a call
        self.called = 0

    cdef bint _wait(self) noexcept nogil:
        cdef uint64_t count
        while read(self.wake_fd, &count, 8) < 0:
            if errno != EINTR:
                return False
        return __atomic_load_n(&self.state, __ATOMIC_ACQUIRE) == WRITING

    cdef void _work(self) noexcept nogil:
        cdef size_t i
        cdef int error = 0
        for i in range(self.count):
            self.writes[i].write_error = _write_all(&self.writes[i])
        self.written_ns = _now_ns()
        if self.announce_written:
            __atomic_store_n(&self.state, WRITTEN, __ATOMIC_RELEASE)
            _signal(self.done_fd)
        if self.sync:
            if self.count > SYNCFS_ABOVE and self.syncfs_reports:
                error = errno if syncfs(self.writes[0].fd) < 0 else 0
                for i in range(self.count):
                    self.writes[i].sync_error = error
            else:
                for i in range(self.count):
                    if self.writes[i].write_error == 0 and fdatasync(self.writes[i].fd) < 0:
                        self.writes[i].sync_error = errno
        self.synced_ns = _now_ns()
        __atomic_store_n(&self.state, DONE, __ATOMIC_RELEASE)
        _signal(self.done_fd)

    def collect(self):
        """What happened: None (nothing new), or (done, [(write errno, sync errno)], write ns, sync ns).

        With done False only the writes are over (announce_written was asked); call again after the next signal.
        """
        cdef uint64_t count
        cdef int state
        # First empty the eventfd, then look: the other order would swallow a signal that comes in between.
        read(self.done_fd, &count, 8)
        state = __atomic_load_n(&self.state, __ATOMIC_ACQUIRE)
        if state != WRITTEN and state != DONE:
            return None
        errors = [(self.writes[i].write_error, self.writes[i].sync_error) for i in range(self.count)]
        if state == WRITTEN:
            return False, errors, self.written_ns - self.started_ns, 0
        self.state = IDLE
        self.keep = None
        return True, errors, self.written_ns - self.started_ns, self.synced_ns - self.written_ns
