/* libFuzzer target for cext/recordbatch.h.
 *
 * The input is copied into an allocation of exactly its size, so that AddressSanitizer sees a read of one byte too
 * many. It is then taken as a client's batch, as stored batches, as records and as varints; what is accepted is walked
 * again and must say the same. A broken promise aborts.
 *
 * Checksums would stop nearly every mutation at the door, so a second pass runs over a copy in which magic, length and
 * CRC were made right.
 *
 * The checks of each header stand in their own file-local functions behind one entry in `targets`: another header's
 * check is added there, and as a separate binary by another fuzz_*.c (run.sh builds every one of them).
 */
#include <stdio.h>
#include <stdlib.h>

#include "recordbatch.h"

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

enum { MAX_BATCH = 1 << 16, MAX_RECORD = 1 << 12 };

static volatile uint8_t sink;

static void touch(const uint8_t *p, const uint8_t *from, const uint8_t *end, int64_t n)
{
    if (n <= 0)
        return;
    REQUIRE(p >= from && p <= end && n <= end - p);
    for (int64_t i = 0; i < n; i++)
        sink = (uint8_t)(sink + p[i]);
}

/* A good record: its parts lie inside it, and encoding them again gives something that reads the same. */
static void check_record(const uint8_t *p, const eb_record *record)
{
    const uint8_t *end = record->end;
    REQUIRE(end > p && end - p >= 7);
    touch(record->key, p, end, record->key_length);
    touch(record->value, p, end, record->value_length);
    REQUIRE(record->headers >= p && record->headers <= end);
    REQUIRE(record->header_count <= (end - record->headers) / 2);
    size_t headers = (size_t)(end - record->headers);
    size_t bound = eb_record_bound((size_t)(record->key_length > 0 ? record->key_length : 0),
                                   (size_t)(record->value_length > 0 ? record->value_length : 0), headers);
    uint8_t *copy = malloc(bound);
    REQUIRE(copy);
    size_t used = eb_encode_record(copy, record->timestamp_delta, record->offset_delta, record->key,
                                   record->key_length, record->value, record->value_length, record->headers, headers,
                                   record->header_count);
    REQUIRE(used <= bound && used <= (size_t)(end - p));
    eb_record again;
    REQUIRE(eb_read_record(copy, copy + used, &again) == EB_OK);
    REQUIRE(again.end == copy + used && again.timestamp_delta == record->timestamp_delta);
    REQUIRE(again.offset_delta == record->offset_delta && again.header_count == record->header_count);
    REQUIRE(again.key_length == record->key_length && again.value_length == record->value_length);
    if (record->key_length > 0)
        REQUIRE(!memcmp(again.key, record->key, (size_t)record->key_length));
    if (record->value_length > 0)
        REQUIRE(!memcmp(again.value, record->value, (size_t)record->value_length));
    free(copy);
}

static void check_varints(const uint8_t *p, size_t n)
{
    int32_t narrow;
    int64_t wide;
    uint8_t again[10];
    size_t used = eb_varint(p, p + n, &narrow), long_used = eb_varlong(p, p + n, &wide);
    REQUIRE(used <= 5 && used <= n && long_used <= 10 && long_used <= n);
    if (used)
        REQUIRE(long_used == used && wide == narrow);
    if (long_used) {
        size_t written = eb_put_varlong(again, wide);
        int64_t back;
        REQUIRE(written == eb_varlong_size(wide) && written <= long_used);
        REQUIRE(eb_varlong(again, again + written, &back) == written && back == wide);
    }
}

static void check_records(const uint8_t *p, size_t n)
{
    const uint8_t *end = p + n;
    eb_record record;
    while (p < end) {
        check_varints(p, (size_t)(end - p));
        if (eb_read_record(p, end, &record) != EB_OK)
            return;
        REQUIRE(record.end <= end);
        check_record(p, &record);
        p = record.end;
    }
    REQUIRE(eb_read_record(end, end, &record) == EB_BAD_RECORD);
}

static void check_client(const uint8_t *p, size_t n)
{
    eb_batch batch, again;
    if (eb_check_client_batch(p, n, MAX_BATCH, MAX_RECORD, &batch) != EB_OK)
        return;
    REQUIRE(batch.size >= EB_BATCH_HEADER && batch.size <= n && batch.size <= MAX_BATCH);
    REQUIRE(p[EB_BATCH_MAGIC] == 2 && batch.count >= 1 && batch.last_delta == batch.count - 1);
    REQUIRE(!(batch.attributes & ~EB_CODEC_MASK));
    /* Offset and epoch lie outside of the CRC; what a client's batch becomes is a good stored batch. */
    uint8_t *stored = malloc(batch.size);
    REQUIRE(stored);
    memcpy(stored, p, batch.size);
    if (batch.corrected)
        eb_write_correction(stored, &batch);
    REQUIRE(eb_crc_matches(stored, &batch));
    REQUIRE(eb_crc32c_portable(0, stored + EB_BATCH_ATTRIBUTES, batch.size - EB_BATCH_ATTRIBUTES) == batch.crc);
    eb_put64(stored, 1234);
    eb_put32(stored + EB_BATCH_EPOCH, 7);
    REQUIRE(eb_check_stored_batch(stored, batch.size, MAX_BATCH, 1234, 7, 1, &again) == EB_OK);
    REQUIRE(again.size == batch.size && again.epoch == 7);
    REQUIRE(eb_check_stored_batch(stored, batch.size - 1, MAX_BATCH, -1, 0, 1, &again) == EB_TRUNCATED);
    REQUIRE(eb_check_stored_batch(stored, batch.size, MAX_BATCH, 1235, 0, 1, &again) == EB_BAD_OFFSET);
    REQUIRE(eb_check_stored_batch(stored, batch.size, MAX_BATCH, -1, 8, 1, &again) == EB_BAD_EPOCH);
    free(stored);
    if ((batch.attributes & EB_CODEC_MASK) != EB_CODEC_NONE)
        return;
    const uint8_t *at = p + EB_BATCH_HEADER, *end = p + batch.size;
    int64_t latest = INT64_MIN;
    for (int32_t i = 0; i < batch.count; i++) {
        eb_record record;
        int64_t timestamp;
        REQUIRE(eb_read_record(at, end, &record) == EB_OK);
        REQUIRE(record.offset_delta == i && (size_t)(record.end - at) <= MAX_RECORD);
        REQUIRE(!__builtin_add_overflow(batch.base_timestamp, record.timestamp_delta, &timestamp));
        latest = timestamp > latest ? timestamp : latest;
        check_record(at, &record);
        at = record.end;
    }
    REQUIRE(at == end && latest == batch.max_timestamp);
}

static void check_stored(const uint8_t *p, size_t n)
{
    size_t position = 0, steps = 0;
    int64_t expected = -1;
    int32_t epoch = 0;
    uint32_t chain = 0;
    while (position < n) {
        eb_batch batch;
        int unverified = eb_check_stored_batch(p + position, n - position, MAX_BATCH, expected, epoch, 0, &batch);
        int reason = eb_check_stored_batch(p + position, n - position, MAX_BATCH, expected, epoch, 1, &batch);
        REQUIRE(unverified == reason || (unverified == EB_OK && reason == EB_BAD_CRC));
        if (reason)
            break;
        REQUIRE(batch.size >= EB_BATCH_HEADER && batch.size <= n - position && batch.count >= 1);
        REQUIRE(batch.base_offset >= 0 && (expected < 0 || batch.base_offset == expected) && batch.epoch >= epoch);
        chain = eb_chain(chain, p + position);
        expected = batch.base_offset + batch.count;
        REQUIRE(expected > batch.base_offset);
        epoch = batch.epoch;
        check_records(p + position + EB_BATCH_HEADER, batch.size - EB_BATCH_HEADER);
        position += batch.size;
        REQUIRE(++steps <= n / EB_BATCH_HEADER);
    }
    sink = (uint8_t)(sink + chain);
}

static void check_rest(const uint8_t *p, size_t n)
{
    check_varints(p, n);
    check_records(p, n);
    sink = (uint8_t)(sink + (unsigned)eb_is_utf8(p, n) + (uint32_t)eb_murmur2(p, n));
    REQUIRE(eb_crc32c(0, p, n) == eb_crc32c_portable(0, p, n));
}

static void (*const targets[])(const uint8_t *, size_t) = {check_client, check_stored, check_rest};

static void run(const uint8_t *data, size_t n, int repair)
{
    uint8_t *exact = malloc(n ? n : 1), *p = exact + (n ? 0 : 1);
    REQUIRE(exact);
    if (n)
        memcpy(p, data, n);
    if (repair) {
        eb_put32(p + EB_BATCH_LENGTH, (uint32_t)(n - EB_BATCH_LENGTH_PREFIX));
        p[EB_BATCH_MAGIC] = 2;
        eb_put32(p + EB_BATCH_CRC, eb_crc32c(0, p + EB_BATCH_ATTRIBUTES, n - EB_BATCH_ATTRIBUTES));
    }
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        targets[i](p, n);
    free(exact);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    eb_crc32c_init();
    run(data, n, 0);
    if (n >= EB_BATCH_HEADER)
        run(data, n, 1);
    return 0;
}
