"""Sending stored bytes without waiting for the disk: sendfile only of pages that were found in the page cache."""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t length)
    int mincore(void *address, size_t length, unsigned char *vec)
    enum:
        PROT_READ
        MAP_SHARED

cdef extern from "<sys/sendfile.h>" nogil:
    ssize_t sendfile(int out_fd, int in_fd, int64_t *offset, size_t count)

cdef enum:
    PAGE = 4096
    PIECE = 1 << 20

cdef int _resident(int fd, int64_t position, size_t length) noexcept nogil:
    """1 when every page is in the cache, 0 when not, -1 when the kernel does not tell. Length at most one piece."""
    cdef int64_t first = position & ~<int64_t>(PAGE - 1)
    cdef size_t span = <size_t>(position + <int64_t>length - first), pages = (span + PAGE - 1) // PAGE, i
    cdef unsigned char vec[258]   # one piece and the page that an unaligned start adds
    cdef void *address
    cdef int result = 1
    address = mmap(NULL, span, PROT_READ, MAP_SHARED, fd, first)
    if address == <void *><size_t>-1:
        return -1
    if mincore(address, span, vec) < 0:
        result = -1
    else:
        for i in range(pages):
            if not vec[i] & 1:
                result = 0
                break
    munmap(address, span)
    return result


def resident(int fd, int64_t position, size_t length):
    cdef int result = 1
    cdef size_t piece
    with nogil:
        while length and result == 1:
            piece = min(length, <size_t>PIECE)
            result = _resident(fd, position, piece)
            position += <int64_t>piece
            length -= piece
    return result == 1


def send_cached(int out_fd, int in_fd, int64_t position, size_t length):
    """sendfile of what is resident: (bytes sent, state) with state 0 all sent, 1 the socket is full, 2 not resident."""
    cdef size_t sent = 0, piece
    cdef ssize_t n = 0
    cdef int64_t offset
    cdef int state = 0, error = 0
    with nogil:
        while sent < length:
            piece = min(length - sent, <size_t>PIECE)
            if _resident(in_fd, position + <int64_t>sent, piece) != 1:
                state = 2
                break
            offset = position + <int64_t>sent
            n = sendfile(out_fd, in_fd, &offset, piece)
            if n < 0:
                if errno == EINTR:
                    continue
                if errno == EAGAIN:
                    state = 1
                else:
                    error = errno
                break
            if n == 0:
                state = 2
                break
            sent += <size_t>n
            if <size_t>n < piece:
                state = 1
                break
    if error:
        raise OSError(error, "sendfile failed")
    return sent, state
