"""C declarations of cext/recordbatch.h, shared by the extensions at compile time (nothing is imported at run time)."""
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "recordbatch.h" nogil:
    enum:
        EB_BATCH_BASE_OFFSET
        EB_BATCH_EPOCH
        EB_BATCH_CRC
        EB_BATCH_ATTRIBUTES
        EB_BATCH_PRODUCER_ID
        EB_BATCH_PRODUCER_EPOCH
        EB_BATCH_BASE_SEQUENCE
        EB_BATCH_HEADER
        EB_CODEC_MASK
        EB_CODEC_NONE
        EB_ATTRIBUTE_CONTROL
        EB_OK
        EB_TRUNCATED
        EB_BAD_CRC
        EB_BAD_RECORD
        EB_BAD_OFFSET
        EB_BAD_EPOCH
    ctypedef struct eb_batch:
        int64_t base_offset, base_timestamp, max_timestamp, producer_id
        int32_t length, epoch, last_delta, base_sequence, count
        uint32_t crc
        int16_t producer_epoch
        uint16_t attributes
        int corrected
        size_t size
    ctypedef struct eb_record:
        const uint8_t *key
        const uint8_t *value
        const uint8_t *headers
        int64_t timestamp_delta
        int32_t key_length, value_length, header_count, offset_delta
        const uint8_t *end
    void eb_crc32c_init()
    uint32_t eb_crc32c(uint32_t value, const void *data, size_t n)
    uint16_t eb_get16(const uint8_t *p)
    uint32_t eb_get32(const uint8_t *p)
    uint64_t eb_get64(const uint8_t *p)
    void eb_put16(uint8_t *p, uint16_t v)
    void eb_put32(uint8_t *p, uint32_t v)
    void eb_put64(uint8_t *p, uint64_t v)
    int eb_frame_batch(const uint8_t *p, size_t n, size_t max_batch, eb_batch *batch)
    int eb_crc_matches(const uint8_t *p, const eb_batch *batch)
    uint32_t eb_chain(uint32_t chain, const uint8_t *p)
    size_t eb_varint(const uint8_t *p, const uint8_t *end, int32_t *value)
    int eb_read_record(const uint8_t *p, const uint8_t *end, eb_record *record)
    int eb_check_records(const uint8_t *p, size_t n, const eb_batch *batch, size_t max_record, int64_t *latest)
    void eb_correct(const uint8_t *p, eb_batch *batch, int64_t latest)
    void eb_write_correction(uint8_t *p, const eb_batch *batch)
    int eb_check_client_batch(const uint8_t *p, size_t n, size_t max_batch, size_t max_record, eb_batch *batch)
    int eb_check_stored_batch(const uint8_t *p, size_t n, size_t max_batch, int64_t expected, int32_t min_epoch,
                              int verify, eb_batch *batch)
    size_t eb_put_varlong(uint8_t *p, int64_t value)
    size_t eb_record_bound(size_t key, size_t value, size_t headers)
    size_t eb_encode_record(uint8_t *p, int64_t timestamp_delta, int32_t offset_delta, const uint8_t *key,
                            int32_t key_length, const uint8_t *value, int32_t value_length, const uint8_t *headers,
                            size_t headers_length, int32_t header_count)
    void eb_write_header(uint8_t *p, size_t n, uint16_t attributes, int32_t count, int64_t base_timestamp,
                         int64_t max_timestamp, int64_t producer_id, int16_t producer_epoch, int32_t base_sequence)
    uint32_t eb_murmur2(const uint8_t *p, size_t n)
