"""Frames: split a receive buffer in one call, and encode the answers to a run of PUBLISH frames in one call."""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from spans cimport Placed, Span
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from "frames.h" nogil:
    enum:
        EB_FRAME_HEADER
        EB_FRAME_PUBLISH
        EB_FRAME_OK
        EB_FRAME_BAD_BODY
    ctypedef struct eb_frame:
        uint64_t correlation
        size_t size
        uint8_t type
    int eb_read_frame(const uint8_t *p, size_t n, size_t max_frame, eb_frame *frame)
    size_t eb_publish_prefix(const uint8_t *body, size_t n)
    void eb_put16(uint8_t *p, uint16_t v)
    void eb_put32(uint8_t *p, uint32_t v)
    void eb_put64(uint8_t *p, uint64_t v)

cdef enum:
    ANSWER_BYTES = 30       # frame header and an answer without a message
    FRAME_ACK = 5


def split(data, size_t start, size_t max_frame, size_t most=<size_t>-1):
    """Up to `most` events of data[start:]; consecutive PUBLISH frames with the same prefix come as one."""
    cdef Py_buffer view
    cdef const uint8_t *base
    cdef eb_frame frame
    cdef size_t position = start, end, prefix, run_prefix, run_start, count, body
    cdef int reason = EB_FRAME_OK
    cdef list events = []
    cdef bytes spans
    cdef Span *span
    cdef uint8_t frame_type
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        base = <const uint8_t *>view.buf
        end = <size_t>view.len
        while position < end:
            if <size_t>len(events) == most:
                reason = EB_FRAME_OK
                break
            reason = eb_read_frame(base + position, end - position, max_frame, &frame)
            if reason:
                break
            if frame.type != EB_FRAME_PUBLISH:
                events.append((frame.type, frame.correlation, position + EB_FRAME_HEADER, position + frame.size))
                position += frame.size
                continue
            run_start = position + EB_FRAME_HEADER
            run_prefix = eb_publish_prefix(base + run_start, frame.size - EB_FRAME_HEADER)
            if run_prefix == 0:
                reason = EB_FRAME_BAD_BODY
                break
            # First count the run, then fill: the size of the span table is known before it is made.
            count, body = 0, position
            while True:
                count += 1
                body += frame.size
                if eb_read_frame(base + body, end - body, max_frame, &frame) or frame.type != EB_FRAME_PUBLISH:
                    break
                prefix = eb_publish_prefix(base + body + EB_FRAME_HEADER, frame.size - EB_FRAME_HEADER)
                if prefix != run_prefix or memcmp(base + body + EB_FRAME_HEADER, base + run_start, prefix):
                    break
            spans = PyBytes_FromStringAndSize(NULL, count * sizeof(Span))
            span = <Span *>PyBytes_AS_STRING(spans)
            while count:
                eb_read_frame(base + position, end - position, max_frame, &frame)
                span.correlation = frame.correlation
                span.start = <uint32_t>(position + EB_FRAME_HEADER + run_prefix)
                span.end = <uint32_t>(position + frame.size)
                span += 1
                position += frame.size
                count -= 1
            events.append((EB_FRAME_PUBLISH, run_start, run_start + run_prefix, spans))
        else:
            reason = EB_FRAME_OK
        if reason > 1:
            frame_type, correlation, size = frame.type, frame.correlation, frame.size
        else:
            frame_type, correlation, size = 0, 0, frame.size if reason and end - position >= EB_FRAME_HEADER else 0
    finally:
        PyBuffer_Release(&view)
    return events, position, reason, (frame_type, correlation, size)


def encode_answers(bytes spans, bytes answers, list explanations):
    """The ACK frames for a run: `answers` as edgebroker.storage.log.staging gives them, explanations by reason."""
    cdef const Span *span = <const Span *>PyBytes_AS_STRING(spans)
    cdef const Placed *placed = <const Placed *>PyBytes_AS_STRING(answers)
    cdef Py_ssize_t count = len(answers) // <Py_ssize_t>sizeof(Placed), i
    cdef size_t size = count * ANSWER_BYTES, text
    cdef bytes out, message
    cdef uint8_t *p
    if count * <Py_ssize_t>sizeof(Span) > len(spans):
        raise ValueError("more answers than frames")
    for i in range(count):
        if placed[i].reason:
            size += len(<bytes>explanations[placed[i].reason])
    out = PyBytes_FromStringAndSize(NULL, size)
    p = <uint8_t *>PyBytes_AS_STRING(out)
    for i in range(count):
        text = 0
        if placed[i].reason:
            message = <bytes>explanations[placed[i].reason]
            text = len(message)
            memcpy(p + ANSWER_BYTES, PyBytes_AS_STRING(message), text)
        eb_put32(p, <uint32_t>(ANSWER_BYTES - 4 + text))
        p[4] = FRAME_ACK
        p[5] = p[6] = p[7] = 0
        eb_put64(p + 8, span[i].correlation)
        p[16] = p[17] = 0
        eb_put16(p + 18, <uint16_t>placed[i].code)
        eb_put64(p + 20, <uint64_t>placed[i].offset)
        eb_put16(p + 28, <uint16_t>text)
        p += ANSWER_BYTES + text
    return out
