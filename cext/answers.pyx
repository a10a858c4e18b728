"""What became of a run of publishes, as packed facts: counted and changed in one call, whatever the run's length."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t
from spans cimport Placed


def refuse(bytes answers, int32_t code):
    """The answers with every OK turned into a code and no offset: what was staged is not stored after all."""
    cdef bytearray changed = bytearray(answers)
    cdef Placed *placed = <Placed *><char *>changed
    cdef Py_ssize_t i
    for i in range(len(answers) // <Py_ssize_t>sizeof(Placed)):
        if placed[i].code == 0:
            placed[i].code = code
            placed[i].offset = -1
    return bytes(changed)


def failed(bytes answers):
    """How many of the answers are not OK."""
    cdef const Placed *placed = <const Placed *>PyBytes_AS_STRING(answers)
    cdef Py_ssize_t i
    cdef int count = 0
    for i in range(len(answers) // <Py_ssize_t>sizeof(Placed)):
        count += placed[i].code != 0
    return count


def uniform(Py_ssize_t count, int32_t code):
    """Answers that refuse `count` frames with one code."""
    cdef bytes answers = PyBytes_FromStringAndSize(NULL, count * sizeof(Placed))
    cdef Placed *placed = <Placed *>PyBytes_AS_STRING(answers)
    cdef Py_ssize_t i
    for i in range(count):
        placed[i].offset = -1
        placed[i].code = code
        placed[i].reason = 0
    return answers
