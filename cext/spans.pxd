# The packed facts of a run of publishes; edgebroker/common/spans.py says what they mean.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef packed struct Span:
    uint64_t correlation
    uint32_t start
    uint32_t end

cdef packed struct Placed:
    int64_t offset
    int32_t code
    int32_t reason
