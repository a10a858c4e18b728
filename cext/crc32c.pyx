"""CRC-32C for Python callers. The algorithm and its sources: cext/crc32c.h."""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t

cdef extern from "crc32c.h" nogil:
    int eb_crc32c_hardware
    void eb_crc32c_init()
    uint32_t eb_crc32c(uint32_t value, const void *data, size_t n)
    uint32_t eb_crc32c_portable(uint32_t value, const void *data, size_t n)

eb_crc32c_init()

cdef enum:
    RELEASE_GIL_ABOVE = 16384


def implementation():
    return "hardware" if eb_crc32c_hardware > 0 else "portable"


def crc32c(data, uint32_t value=0):
    cdef Py_buffer view
    cdef uint32_t result
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len > RELEASE_GIL_ABOVE:
            with nogil:
                result = eb_crc32c(value, view.buf, <size_t>view.len)
        else:
            result = eb_crc32c(value, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return result


def crc32c_portable(data, uint32_t value=0):
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return eb_crc32c_portable(value, view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
