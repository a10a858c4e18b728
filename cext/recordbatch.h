/* RecordBatch v2 (Kafka "Message Format", magic 2): header access, record walking, checking and scanning.
 *
 *   0 baseOffset i64 | 8 batchLength i32 (bytes after this field) | 12 partitionLeaderEpoch i32 | 16 magic i8 = 2
 *  17 crc u32 (CRC-32C of everything from attributes on) | 21 attributes i16 | 23 lastOffsetDelta i32
 *  27 baseTimestamp i64 | 35 maxTimestamp i64 | 43 producerId i64 | 51 producerEpoch i16 | 53 baseSequence i32
 *  57 recordCount i32 | 61 records
 *
 * record: varint length; i8 attributes = 0; varlong timestampDelta; varint offsetDelta; varint keyLength (-1 null);
 * key; varint valueLength (-1 null); value; varint headerCount; headers (varint keyLength, UTF-8 key, varint
 * valueLength or -1, value). All varints are zigzag.
 *
 * Pure C without allocation and without Python: the fuzzer drives exactly this file (tests/fuzz/). Every function
 * takes the span it may read and never reads outside of it.
 */
#ifndef EDGEBROKER_RECORDBATCH_H
#define EDGEBROKER_RECORDBATCH_H
#include "crc32c.h"

enum {
    EB_BATCH_BASE_OFFSET = 0, EB_BATCH_LENGTH = 8, EB_BATCH_EPOCH = 12, EB_BATCH_MAGIC = 16, EB_BATCH_CRC = 17,
    EB_BATCH_ATTRIBUTES = 21, EB_BATCH_LAST_DELTA = 23, EB_BATCH_BASE_TIMESTAMP = 27, EB_BATCH_MAX_TIMESTAMP = 35,
    EB_BATCH_PRODUCER_ID = 43, EB_BATCH_PRODUCER_EPOCH = 51, EB_BATCH_BASE_SEQUENCE = 53, EB_BATCH_COUNT = 57,
    EB_BATCH_HEADER = 61, EB_BATCH_LENGTH_PREFIX = 12
};
enum { EB_CODEC_MASK = 7, EB_CODEC_NONE = 0, EB_CODEC_GZIP = 1, EB_CODEC_SNAPPY = 2, EB_CODEC_LZ4 = 3,
       EB_CODEC_ZSTD = 4, EB_ATTRIBUTE_CONTROL = 0x20 };

/* Why a batch was refused or a scan stopped; 0 is good. Names stand in edgebroker/common/batch.py in this order. */
enum eb_reason {
    EB_OK = 0, EB_TRUNCATED = 1, EB_BAD_LENGTH = 2, EB_BAD_MAGIC = 3, EB_BAD_CRC = 4, EB_BAD_OFFSET = 5,
    EB_BAD_EPOCH = 6, EB_BAD_ATTRIBUTES = 7, EB_BAD_CODEC = 8, EB_BAD_COUNT = 9, EB_BAD_PRODUCER = 10,
    EB_BAD_RECORD = 11, EB_BAD_TIMESTAMP = 12, EB_TOO_LARGE = 13, EB_ZEROES = 14
};

static inline uint16_t eb_get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static inline uint32_t eb_get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
static inline uint64_t eb_get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }
static inline void eb_put16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)(v >> 8); p[1] = (uint8_t)v; }
static inline void eb_put32(uint8_t *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); }
static inline void eb_put64(uint8_t *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }

typedef struct {
    int64_t base_offset, base_timestamp, max_timestamp, producer_id;
    int32_t length, epoch, last_delta, base_sequence, count;
    uint32_t crc;
    int16_t producer_epoch;
    uint16_t attributes;
    int corrected; /* maximum timestamp and CRC are not the ones in the bytes: eb_correct() */
    size_t size;   /* whole batch in bytes: length + 12 */
} eb_batch;

static inline void eb_read_header(const uint8_t *p, eb_batch *batch)
{
    batch->base_offset = (int64_t)eb_get64(p + EB_BATCH_BASE_OFFSET);
    batch->length = (int32_t)eb_get32(p + EB_BATCH_LENGTH);
    batch->epoch = (int32_t)eb_get32(p + EB_BATCH_EPOCH);
    batch->crc = eb_get32(p + EB_BATCH_CRC);
    batch->corrected = 0;
    batch->attributes = eb_get16(p + EB_BATCH_ATTRIBUTES);
    batch->last_delta = (int32_t)eb_get32(p + EB_BATCH_LAST_DELTA);
    batch->base_timestamp = (int64_t)eb_get64(p + EB_BATCH_BASE_TIMESTAMP);
    batch->max_timestamp = (int64_t)eb_get64(p + EB_BATCH_MAX_TIMESTAMP);
    batch->producer_id = (int64_t)eb_get64(p + EB_BATCH_PRODUCER_ID);
    batch->producer_epoch = (int16_t)eb_get16(p + EB_BATCH_PRODUCER_EPOCH);
    batch->base_sequence = (int32_t)eb_get32(p + EB_BATCH_BASE_SEQUENCE);
    batch->count = (int32_t)eb_get32(p + EB_BATCH_COUNT);
    batch->size = (size_t)(batch->length < 0 ? 0 : batch->length) + EB_BATCH_LENGTH_PREFIX;
}

/* The outer shape only: room for a header, magic, a length that lies within max_batch and within the span. */
static inline int eb_frame_batch(const uint8_t *p, size_t n, size_t max_batch, eb_batch *batch)
{
    if (n < EB_BATCH_HEADER) {
        for (size_t i = 0; i < n; i++)
            if (p[i])
                return EB_TRUNCATED;
        return n ? EB_ZEROES : EB_TRUNCATED;
    }
    eb_read_header(p, batch);
    if (batch->length == 0 && p[EB_BATCH_MAGIC] == 0)
        return EB_ZEROES;
    if (p[EB_BATCH_MAGIC] != 2)
        return EB_BAD_MAGIC;
    if (batch->length < EB_BATCH_HEADER - EB_BATCH_LENGTH_PREFIX)
        return EB_BAD_LENGTH;
    if (batch->size > max_batch)
        return EB_TOO_LARGE;
    if (batch->size > n)
        return EB_TRUNCATED;
    return EB_OK;
}

static inline int eb_crc_matches(const uint8_t *p, const eb_batch *batch)
{
    return eb_crc32c(0, p + EB_BATCH_ATTRIBUTES, batch->size - EB_BATCH_ATTRIBUTES) == batch->crc;
}

/* chain' = crc32c(chain, the 61 header bytes): what covers the bytes that the batch CRC does not. */
static inline uint32_t eb_chain(uint32_t chain, const uint8_t *p) { return eb_crc32c(chain, p, EB_BATCH_HEADER); }

/* Zigzag varints. Return the bytes used, 0 when the value is cut off or longer than its type allows. */
static inline size_t eb_varint(const uint8_t *p, const uint8_t *end, int32_t *value)
{
    uint32_t raw = 0;
    for (size_t i = 0; i < 5 && p + i < end; i++) {
        uint8_t byte = p[i];
        if (i == 4 && byte > 0x0F)
            return 0;
        raw |= (uint32_t)(byte & 0x7F) << (7 * i);
        if (!(byte & 0x80)) {
            *value = (int32_t)(raw >> 1) ^ -(int32_t)(raw & 1);
            return i + 1;
        }
    }
    return 0;
}

static inline size_t eb_varlong(const uint8_t *p, const uint8_t *end, int64_t *value)
{
    uint64_t raw = 0;
    for (size_t i = 0; i < 10 && p + i < end; i++) {
        uint8_t byte = p[i];
        if (i == 9 && byte > 0x01)
            return 0;
        raw |= (uint64_t)(byte & 0x7F) << (7 * i);
        if (!(byte & 0x80)) {
            *value = (int64_t)(raw >> 1) ^ -(int64_t)(raw & 1);
            return i + 1;
        }
    }
    return 0;
}

static inline size_t eb_put_varlong(uint8_t *p, int64_t value)
{
    uint64_t raw = ((uint64_t)value << 1) ^ (uint64_t)(value >> 63);
    size_t i = 0;
    while (raw >= 0x80) {
        p[i++] = (uint8_t)(raw | 0x80);
        raw >>= 7;
    }
    p[i++] = (uint8_t)raw;
    return i;
}

static inline size_t eb_varlong_size(int64_t value)
{
    uint64_t raw = ((uint64_t)value << 1) ^ (uint64_t)(value >> 63);
    size_t i = 1;
    while (raw >= 0x80) {
        raw >>= 7;
        i++;
    }
    return i;
}

static int eb_is_utf8(const uint8_t *p, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint8_t c = p[i];
        size_t extra;
        uint32_t code;
        if (c < 0x80) {
            i++;
            continue;
        } else if (c >= 0xC2 && c <= 0xDF) {
            extra = 1; code = c & 0x1F;
        } else if (c >= 0xE0 && c <= 0xEF) {
            extra = 2; code = c & 0x0F;
        } else if (c >= 0xF0 && c <= 0xF4) {
            extra = 3; code = c & 0x07;
        } else
            return 0;
        if (n - i <= extra)
            return 0;
        for (size_t k = 1; k <= extra; k++) {
            if ((p[i + k] & 0xC0) != 0x80)
                return 0;
            code = code << 6 | (p[i + k] & 0x3F);
        }
        if ((extra == 2 && (code < 0x800 || (code >= 0xD800 && code <= 0xDFFF))) ||
            (extra == 3 && (code < 0x10000 || code > 0x10FFFF)))
            return 0;
        i += extra + 1;
    }
    return 1;
}

typedef struct {
    const uint8_t *key, *value, *headers;   /* headers: the first byte after headerCount */
    int64_t timestamp_delta;
    int32_t key_length, value_length, header_count, offset_delta;
    const uint8_t *end;
} eb_record;

/* Parse one record at p; every length inside is checked against the record's own end. */
static inline int eb_read_record(const uint8_t *p, const uint8_t *end, eb_record *record)
{
    int32_t length;
    size_t used = eb_varint(p, end, &length);
    if (!used || length < 0 || (size_t)length > (size_t)(end - p) - used)
        return EB_BAD_RECORD;
    p += used;
    const uint8_t *stop = p + length;
    if (p >= stop || *p++ != 0)
        return EB_BAD_RECORD;
    if (!(used = eb_varlong(p, stop, &record->timestamp_delta)))
        return EB_BAD_RECORD;
    p += used;
    if (!(used = eb_varint(p, stop, &record->offset_delta)))
        return EB_BAD_RECORD;
    p += used;
    if (!(used = eb_varint(p, stop, &record->key_length)) || record->key_length < -1)
        return EB_BAD_RECORD;
    p += used;
    record->key = p;
    if (record->key_length > 0) {
        if (record->key_length > stop - p)
            return EB_BAD_RECORD;
        p += record->key_length;
    }
    if (!(used = eb_varint(p, stop, &record->value_length)) || record->value_length < -1)
        return EB_BAD_RECORD;
    p += used;
    record->value = p;
    if (record->value_length > 0) {
        if (record->value_length > stop - p)
            return EB_BAD_RECORD;
        p += record->value_length;
    }
    if (!(used = eb_varint(p, stop, &record->header_count)) || record->header_count < 0)
        return EB_BAD_RECORD;
    p += used;
    record->headers = p;
    for (int32_t i = 0; i < record->header_count; i++) {
        int32_t size;
        if (!(used = eb_varint(p, stop, &size)) || size < 0 || size > stop - p - (ptrdiff_t)used)
            return EB_BAD_RECORD;
        p += used;
        if (!eb_is_utf8(p, (size_t)size))
            return EB_BAD_RECORD;
        p += size;
        if (!(used = eb_varint(p, stop, &size)) || size < -1 || size > stop - p - (ptrdiff_t)used)
            return EB_BAD_RECORD;
        p += used + (size_t)(size > 0 ? size : 0);
    }
    if (p != stop)
        return EB_BAD_RECORD;
    record->end = stop;
    return EB_OK;
}

/* Walk the (uncompressed) records of a client's batch: count, dense offset deltas, sizes. *latest: the maximum timestamp. */
static inline int eb_check_records(const uint8_t *p, size_t n, const eb_batch *batch, size_t max_record,
                                   int64_t *latest)
{
    const uint8_t *end = p + n;
    *latest = INT64_MIN;
    for (int32_t i = 0; i < batch->count; i++) {
        eb_record record;
        int64_t timestamp;
        int reason = eb_read_record(p, end, &record);
        if (reason)
            return reason;
        if (record.offset_delta != i)
            return EB_BAD_RECORD;
        if ((size_t)(record.end - p) > max_record)
            return EB_TOO_LARGE;
        if (__builtin_add_overflow(batch->base_timestamp, record.timestamp_delta, &timestamp))
            return EB_BAD_TIMESTAMP;
        if (timestamp > *latest)
            *latest = timestamp;
        p = record.end;
    }
    return p == end ? EB_OK : EB_BAD_RECORD;
}

/* Some clients write another maximum timestamp than the latest record's. As Kafka's broker does, this one sets it right:
 * the fields of *batch, whose bytes at p stay as they are. */
static inline void eb_correct(const uint8_t *p, eb_batch *batch, int64_t latest)
{
    uint8_t right[8];
    size_t after = EB_BATCH_MAX_TIMESTAMP + sizeof right;
    if (latest == batch->max_timestamp)
        return;
    eb_put64(right, (uint64_t)latest);
    uint32_t crc = eb_crc32c(0, p + EB_BATCH_ATTRIBUTES, EB_BATCH_MAX_TIMESTAMP - EB_BATCH_ATTRIBUTES);
    crc = eb_crc32c(crc, right, sizeof right);
    batch->crc = eb_crc32c(crc, p + after, batch->size - after);
    batch->max_timestamp = latest;
    batch->corrected = 1;
}

/* Write what eb_correct() found into the batch at p. */
static inline void eb_write_correction(uint8_t *p, const eb_batch *batch)
{
    eb_put64(p + EB_BATCH_MAX_TIMESTAMP, (uint64_t)batch->max_timestamp);
    eb_put32(p + EB_BATCH_CRC, batch->crc);
}

/* A client's batch at p: everything but the records of a compressed one. Fills *batch when the outer shape holds. */
static inline int eb_check_client_batch(const uint8_t *p, size_t n, size_t max_batch, size_t max_record,
                                        eb_batch *batch)
{
    int reason = eb_frame_batch(p, n, max_batch, batch);
    if (reason)
        return reason;
    unsigned codec = batch->attributes & EB_CODEC_MASK;
    if (codec == EB_CODEC_SNAPPY || codec > EB_CODEC_ZSTD)
        return EB_BAD_CODEC;
    if (batch->attributes & ~EB_CODEC_MASK)
        return EB_BAD_ATTRIBUTES;
    if (batch->count < 1 || batch->last_delta != batch->count - 1)
        return EB_BAD_COUNT;
    /* The smallest record takes seven bytes: this bounds the count before anything is sized by it. */
    if (codec == EB_CODEC_NONE && (size_t)batch->count > (batch->size - EB_BATCH_HEADER) / 7)
        return EB_BAD_COUNT;
    /* Without a producer id, what epoch and sequence say means nothing (aiokafka and KafkaJS leave zeroes there). */
    if (batch->producer_id >= 0 && (batch->producer_epoch < 0 || batch->base_sequence < 0))
        return EB_BAD_PRODUCER;
    if (!eb_crc_matches(p, batch))
        return EB_BAD_CRC;
    if (codec == EB_CODEC_NONE) {
        int64_t latest;
        reason = eb_check_records(p + EB_BATCH_HEADER, batch->size - EB_BATCH_HEADER, batch, max_record, &latest);
        if (reason == EB_OK)
            eb_correct(p, batch, latest);
    }
    return reason;
}

/* A stored batch at p: shape, offset continuity, epoch order, CRC. expected < 0 accepts any base offset. */
static inline int eb_check_stored_batch(const uint8_t *p, size_t n, size_t max_batch, int64_t expected,
                                        int32_t min_epoch, int verify, eb_batch *batch)
{
    int reason = eb_frame_batch(p, n, max_batch, batch);
    if (reason)
        return reason;
    if (batch->count < 1 || batch->last_delta != batch->count - 1)
        return EB_BAD_COUNT;
    if (batch->base_offset < 0 || (expected >= 0 && batch->base_offset != expected) ||
        batch->base_offset > INT64_MAX - batch->count)
        return EB_BAD_OFFSET;
    if (batch->epoch < min_epoch)
        return EB_BAD_EPOCH;
    if (verify && !eb_crc_matches(p, batch))
        return EB_BAD_CRC;
    return EB_OK;
}

/* Bytes eb_encode_record needs at most, headers already encoded (count excluded). */
static inline size_t eb_record_bound(size_t key, size_t value, size_t headers) { return 48 + key + value + headers; }

/* Write one record at p (room as eb_record_bound says); lengths of -1 mean null. Returns the bytes written. */
static inline size_t eb_encode_record(uint8_t *p, int64_t timestamp_delta, int32_t offset_delta,
                                      const uint8_t *key, int32_t key_length, const uint8_t *value,
                                      int32_t value_length, const uint8_t *headers, size_t headers_length,
                                      int32_t header_count)
{
    size_t body = 1 + eb_varlong_size(timestamp_delta) + eb_varlong_size(offset_delta) + eb_varlong_size(key_length) +
                  (size_t)(key_length > 0 ? key_length : 0) + eb_varlong_size(value_length) +
                  (size_t)(value_length > 0 ? value_length : 0) + eb_varlong_size(header_count) + headers_length;
    uint8_t *start = p;
    p += eb_put_varlong(p, (int64_t)body);
    *p++ = 0;
    p += eb_put_varlong(p, timestamp_delta);
    p += eb_put_varlong(p, offset_delta);
    p += eb_put_varlong(p, key_length);
    if (key_length > 0) {
        memcpy(p, key, (size_t)key_length);
        p += key_length;
    }
    p += eb_put_varlong(p, value_length);
    if (value_length > 0) {
        memcpy(p, value, (size_t)value_length);
        p += value_length;
    }
    p += eb_put_varlong(p, header_count);
    if (headers_length)
        memcpy(p, headers, headers_length);
    return (size_t)(p - start) + headers_length;
}

/* Write the 61 header bytes of a batch whose records (n bytes, perhaps compressed) follow at p + 61; sets the CRC.
 * Base offset and epoch are 0: the origin assigns them, they lie outside the CRC. */
static inline void eb_write_header(uint8_t *p, size_t n, uint16_t attributes, int32_t count, int64_t base_timestamp,
                                   int64_t max_timestamp, int64_t producer_id, int16_t producer_epoch,
                                   int32_t base_sequence)
{
    eb_put64(p + EB_BATCH_BASE_OFFSET, 0);
    eb_put32(p + EB_BATCH_LENGTH, (uint32_t)(n + EB_BATCH_HEADER - EB_BATCH_LENGTH_PREFIX));
    eb_put32(p + EB_BATCH_EPOCH, 0);
    p[EB_BATCH_MAGIC] = 2;
    eb_put16(p + EB_BATCH_ATTRIBUTES, attributes);
    eb_put32(p + EB_BATCH_LAST_DELTA, (uint32_t)(count - 1));
    eb_put64(p + EB_BATCH_BASE_TIMESTAMP, (uint64_t)base_timestamp);
    eb_put64(p + EB_BATCH_MAX_TIMESTAMP, (uint64_t)max_timestamp);
    eb_put64(p + EB_BATCH_PRODUCER_ID, (uint64_t)producer_id);
    eb_put16(p + EB_BATCH_PRODUCER_EPOCH, (uint16_t)producer_epoch);
    eb_put32(p + EB_BATCH_BASE_SEQUENCE, (uint32_t)base_sequence);
    eb_put32(p + EB_BATCH_COUNT, (uint32_t)count);
    eb_put32(p + EB_BATCH_CRC, eb_crc32c(0, p + EB_BATCH_ATTRIBUTES, n + EB_BATCH_HEADER - EB_BATCH_ATTRIBUTES));
}

/* Kafka's murmur2 (seed 0x9747b28c), which maps a key to a partition: (hash & 0x7fffffff) % partitions. */
static inline uint32_t eb_murmur2(const uint8_t *p, size_t n)
{
    const uint32_t m = 0x5bd1e995u;
    uint32_t h = 0x9747b28cu ^ (uint32_t)n;
    for (; n >= 4; n -= 4, p += 4) {
        uint32_t k = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        k *= m;
        k ^= k >> 24;
        h = (h * m) ^ (k * m);
    }
    if (n == 3) h ^= (uint32_t)p[2] << 16;
    if (n >= 2) h ^= (uint32_t)p[1] << 8;
    if (n >= 1) {
        h ^= p[0];
        h *= m;
    }
    h ^= h >> 13;
    h *= m;
    return h ^ (h >> 15);
}
#endif
