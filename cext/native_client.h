/* A measuring client in C: one thread, poll, large reads and writes, so that a measurement shows the broker.
 *
 * Every answer is checked (code, order) and every delivered batch is walked record by record with its CRC and its
 * offsets. Functions return 0 or a negative eb_raw_error; they allocate only their own buffers.
 */
#ifndef EDGEBROKER_RAWCLIENT_H
#define EDGEBROKER_RAWCLIENT_H
#include "frames.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum eb_raw_error { EB_RAW_IO = -1, EB_RAW_PROTOCOL = -2, EB_RAW_REFUSED = -3, EB_RAW_ORDER = -4, EB_RAW_CORRUPT = -5,
                    EB_RAW_MEMORY = -6, EB_RAW_TIMEOUT = -7 };
enum { EB_RAW_TIMEOUT_MS = 30000 };

typedef struct {
    int fd;
    uint8_t *in, *out;
    size_t in_start, in_end, in_size, out_start, out_end, out_size;
} eb_raw;

static inline uint64_t eb_raw_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int eb_raw_open(eb_raw *c, const char *host, int port, size_t buffer)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1;
    memset(c, 0, sizeof *c);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || inet_pton(AF_INET, host, &address.sin_addr) != 1 ||
        connect(c->fd, (struct sockaddr *)&address, sizeof address))
        return EB_RAW_IO;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->in_size = c->out_size = buffer;
    c->in = malloc(buffer);
    c->out = malloc(buffer);
    return c->in && c->out ? 0 : EB_RAW_MEMORY;
}

static void eb_raw_close(eb_raw *c)
{
    if (c->fd >= 0)
        close(c->fd);
    free(c->in);
    free(c->out);
}

static inline uint8_t *eb_raw_room(eb_raw *c, size_t n)
{
    if (c->out_start == c->out_end)
        c->out_start = c->out_end = 0;
    if (c->out_end + n > c->out_size) {
        memmove(c->out, c->out + c->out_start, c->out_end - c->out_start);
        c->out_end -= c->out_start;
        c->out_start = 0;
    }
    return c->out_end + n > c->out_size ? NULL : c->out + c->out_end;
}

static inline uint8_t *eb_raw_frame(uint8_t *p, uint8_t type, uint64_t correlation, size_t body)
{
    eb_put32(p, (uint32_t)(body + EB_FRAME_MIN_LENGTH));
    p[4] = type;
    p[5] = p[6] = p[7] = 0;
    eb_put64(p + 8, correlation);
    return p + EB_FRAME_HEADER;
}

/* Send what fits (flags: MSG_DONTWAIT or 0). */
static int eb_raw_flush(eb_raw *c, int flags)
{
    while (c->out_start < c->out_end) {
        ssize_t n = send(c->fd, c->out + c->out_start, c->out_end - c->out_start, flags | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : EB_RAW_IO;
        c->out_start += (size_t)n;
    }
    return 0;
}

/* Receive once; 0 with nothing when flags say not to wait. */
static int eb_raw_fill(eb_raw *c, int flags)
{
    if (c->in_start == c->in_end)
        c->in_start = c->in_end = 0;
    if (c->in_end == c->in_size) {
        memmove(c->in, c->in + c->in_start, c->in_end - c->in_start);
        c->in_end -= c->in_start;
        c->in_start = 0;
        if (c->in_end == c->in_size)
            return EB_RAW_MEMORY;
    }
    for (;;) {
        ssize_t n = recv(c->fd, c->in + c->in_end, c->in_size - c->in_end, flags);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : EB_RAW_IO;
        if (n == 0)
            return EB_RAW_IO;
        c->in_end += (size_t)n;
        return 0;
    }
}

/* The next whole frame in the buffer: 1, 0 when more bytes are needed, or an error. */
static inline int eb_raw_next(eb_raw *c, eb_frame *frame, const uint8_t **body)
{
    int reason = eb_read_frame(c->in + c->in_start, c->in_end - c->in_start, c->in_size, frame);
    if (reason == EB_FRAME_MORE)
        return 0;
    if (reason)
        return EB_RAW_PROTOCOL;
    *body = c->in + c->in_start + EB_FRAME_HEADER;
    c->in_start += frame->size;
    return 1;
}

static int eb_raw_wait(eb_raw *c, eb_frame *frame, const uint8_t **body, uint8_t type)
{
    for (;;) {
        int found = eb_raw_next(c, frame, body);
        if (found < 0)
            return found;
        if (found && frame->type == type)
            return 0;
        if (!found && (found = eb_raw_fill(c, 0)))
            return found;
    }
}

static int eb_raw_connect(eb_raw *c, const char *name, int producer, int64_t *producer_id, int16_t *producer_epoch)
{
    size_t length = strlen(name), body = 8 + 1 + length + 2 + 10 + 2;
    uint8_t *p = eb_raw_room(c, EB_FRAME_HEADER + body);
    const uint8_t *answer;
    eb_frame frame;
    int error;
    if (!p)
        return EB_RAW_MEMORY;
    c->out_end += EB_FRAME_HEADER + body;
    p = eb_raw_frame(p, 1, 1, body);
    memcpy(p, "EDGE", 4);
    eb_put16(p + 4, 1);
    eb_put16(p + 6, producer ? 1 : 0);
    p[8] = (uint8_t)length;
    memcpy(p + 9, name, length);
    p += 9 + length;
    eb_put16(p, 0);
    eb_put64(p + 2, (uint64_t)-1);
    eb_put16(p + 10, 0xFFFF);
    eb_put16(p + 12, 0);
    if ((error = eb_raw_flush(c, 0)) || (error = eb_raw_wait(c, &frame, &answer, 5)))
        return error;
    if (frame.size < EB_FRAME_HEADER + 14 + 60 || eb_get16(answer + 2))
        return EB_RAW_REFUSED;
    *producer_id = (int64_t)eb_get64(answer + 14 + 50);
    *producer_epoch = (int16_t)eb_get16(answer + 14 + 58);
    return 0;
}

/* One batch of `count` equal records, ready but for producer and sequence. Returns its bytes. */
static size_t eb_raw_batch(uint8_t *p, int count, const uint8_t *value, size_t size, int64_t timestamp)
{
    uint8_t *q = p + EB_BATCH_HEADER;
    for (int i = 0; i < count; i++)
        q += eb_encode_record(q, 0, i, NULL, -1, value, (int32_t)size, NULL, 0, 0);
    eb_write_header(p, (size_t)(q - p) - EB_BATCH_HEADER, 0, count, timestamp, timestamp, -1, -1, -1);
    return (size_t)(q - p);
}

static void eb_raw_stamp(uint8_t *p, size_t n, int64_t producer_id, int16_t epoch, int32_t sequence)
{
    eb_put64(p + EB_BATCH_PRODUCER_ID, (uint64_t)producer_id);
    eb_put16(p + EB_BATCH_PRODUCER_EPOCH, (uint16_t)epoch);
    eb_put32(p + EB_BATCH_BASE_SEQUENCE, (uint32_t)sequence);
    eb_put32(p + EB_BATCH_CRC, eb_crc32c(0, p + EB_BATCH_ATTRIBUTES, n - EB_BATCH_ATTRIBUTES));
}

static inline size_t eb_raw_prefix(uint8_t *p, const char *topic, uint32_t partition, int level)
{
    size_t length = strlen(topic);
    p[0] = (uint8_t)level;
    p[1] = (uint8_t)length;
    memcpy(p + 2, topic, length);
    eb_put32(p + 2 + length, partition);
    return 6 + length;
}

/* Check one answer to a PUBLISH: OK and in order. */
static inline int eb_raw_answer(const eb_frame *frame, const uint8_t *body, uint64_t correlation, int64_t *offset)
{
    if (frame->type != 5 || frame->size < EB_FRAME_HEADER + 14 || body[0])
        return EB_RAW_PROTOCOL;
    if (eb_get16(body + 2))
        return EB_RAW_REFUSED;
    if (frame->correlation != correlation)
        return EB_RAW_ORDER;
    *offset = (int64_t)eb_get64(body + 4);
    return 0;
}

/* Publish `count` records in batches, at most `unacked` records without an answer. Writes the elapsed ns. */
static int eb_raw_produce(const char *host, int port, const char *topic, int64_t count, size_t size, int batch,
                          int64_t unacked, int level, const char *name, uint64_t *elapsed)
{
    eb_raw c;
    eb_frame frame;
    const uint8_t *body;
    uint8_t *image, *value;
    int64_t producer_id, sent = 0, acked = 0, offset, last = -1;
    int16_t epoch;
    uint64_t correlation = 2, expected = 2, began;
    size_t prefix = 6 + strlen(topic), length;
    int error = eb_raw_open(&c, host, port, 4 << 20), full = batch;
    image = malloc(EB_BATCH_HEADER + (size_t)batch * (size + 48));
    value = malloc(size + 1);
    if (!error && (!image || !value))
        error = EB_RAW_MEMORY;
    if (!error)
        error = eb_raw_connect(&c, name, 1, &producer_id, &epoch);
    if (error)
        goto end;
    for (size_t i = 0; i < size; i++)
        value[i] = (uint8_t)('a' + (i * 7 + i / 13) % 26);
    length = eb_raw_batch(image, batch, value, size, 1700000000000);
    began = eb_raw_now();
    while (acked < count) {
        while (sent < count && (level == 0 || sent - acked < unacked)) {
            int now = count - sent < batch ? (int)(count - sent) : batch;
            uint8_t *p;
            if (now != full) {
                length = eb_raw_batch(image, now, value, size, 1700000000000);
                full = now;
            }
            p = eb_raw_room(&c, EB_FRAME_HEADER + prefix + length);
            if (!p)
                break;
            c.out_end += EB_FRAME_HEADER + prefix + length;
            p = eb_raw_frame(p, EB_FRAME_PUBLISH, correlation++, prefix + length);
            p += eb_raw_prefix(p, topic, 0, level);
            memcpy(p, image, length);
            eb_raw_stamp(p, length, producer_id, epoch, (int32_t)(sent & 0x7FFFFFFF));
            sent += now;
            if (c.out_end - c.out_start > (256 << 10))
                break;
        }
        if ((error = eb_raw_flush(&c, MSG_DONTWAIT)))
            goto end;
        if (level == 0) {
            acked = sent;
            if (c.out_start < c.out_end) {
                struct pollfd wait = {c.fd, POLLOUT, 0};
                poll(&wait, 1, 1000);
            }
            continue;
        }
        int may_send = sent < count && sent - acked < unacked;
        struct pollfd wait = {c.fd, (short)(POLLIN | (c.out_start < c.out_end ? POLLOUT : 0)), 0};
        int ready = poll(&wait, 1, may_send && c.out_start == c.out_end ? 0 : EB_RAW_TIMEOUT_MS);
        if (ready == 0 && !(may_send && c.out_start == c.out_end)) {
            error = EB_RAW_TIMEOUT;
            goto end;
        }
        if (!(wait.revents & (POLLIN | POLLHUP | POLLERR)))
            continue;
        if ((error = eb_raw_fill(&c, MSG_DONTWAIT)))
            goto end;
        while ((error = eb_raw_next(&c, &frame, &body)) == 1) {
            if (frame.type != 5)
                continue;
            if ((error = eb_raw_answer(&frame, body, expected, &offset)))
                goto end;
            if (offset <= last) {
                error = EB_RAW_ORDER;
                goto end;
            }
            last = offset;
            expected++;
            acked = acked + batch < count ? acked + batch : count;
        }
        if (error < 0)
            goto end;
    }
    *elapsed = eb_raw_now() - began;
    while (level == 0 && c.out_start < c.out_end && !error)
        error = eb_raw_flush(&c, 0);
    if (error == 1)
        error = 0;
end:
    eb_raw_close(&c);
    free(image);
    free(value);
    return error;
}

/* One record at a time on one connection; latencies[count] in ns. */
static int eb_raw_one_by_one(const char *host, int port, const char *topic, int64_t count, size_t size, int level,
                             const char *name, uint64_t *latencies)
{
    eb_raw c;
    eb_frame frame;
    const uint8_t *body;
    uint8_t image[EB_BATCH_HEADER + 65536 + 64], *value = image + sizeof image - size;
    int64_t producer_id, offset;
    int16_t epoch;
    size_t prefix = 6 + strlen(topic), length;
    int error = size > 60000 ? EB_RAW_MEMORY : eb_raw_open(&c, host, port, 1 << 20);
    if (error)
        return error;
    if ((error = eb_raw_connect(&c, name, 1, &producer_id, &epoch)))
        goto end;
    memset(value, 'x', size);
    length = eb_raw_batch(image, 1, value, size, 1700000000000);
    for (int64_t i = 0; i < count; i++) {
        uint8_t *p = eb_raw_room(&c, EB_FRAME_HEADER + prefix + length);
        uint64_t began;
        c.out_end += EB_FRAME_HEADER + prefix + length;
        p = eb_raw_frame(p, EB_FRAME_PUBLISH, (uint64_t)i + 2, prefix + length);
        p += eb_raw_prefix(p, topic, 0, level);
        memcpy(p, image, length);
        eb_raw_stamp(p, length, producer_id, epoch, (int32_t)i);
        began = eb_raw_now();
        if ((error = eb_raw_flush(&c, 0)) || (error = eb_raw_wait(&c, &frame, &body, 5)) ||
            (error = eb_raw_answer(&frame, body, (uint64_t)i + 2, &offset)))
            goto end;
        latencies[i] = eb_raw_now() - began;
    }
end:
    eb_raw_close(&c);
    return error;
}

static int eb_raw_subscribe(eb_raw *c, const char *topic, const char *group, int start, uint32_t window,
                            uint32_t window_bytes)
{
    size_t t = strlen(topic), g = strlen(group), body = 1 + 1 + g + 10 + 1 + t + 4 + 1 + 16 + 4 + 8;
    uint8_t *p = eb_raw_room(c, EB_FRAME_HEADER + body);
    if (!p)
        return EB_RAW_MEMORY;
    c->out_end += EB_FRAME_HEADER + body;
    p = eb_raw_frame(p, 3, 7, body);
    *p++ = 0;
    *p++ = (uint8_t)g;
    memcpy(p, group, g);
    p += g;
    eb_put32(p, window);
    eb_put32(p + 4, window_bytes);
    eb_put16(p + 8, 1);
    p += 10;
    *p++ = (uint8_t)t;
    memcpy(p, topic, t);
    p += t;
    eb_put32(p, (uint32_t)-1);
    p[4] = (uint8_t)start;
    memset(p + 5, 0, 28);
    return eb_raw_flush(c, 0);
}

typedef struct {
    uint32_t partition, generation;
    uint64_t lease;
    int64_t first, last;
    const uint8_t *batches;
    size_t length;
} eb_raw_delivery;

static int eb_raw_read_deliver(const eb_frame *frame, const uint8_t *body, eb_raw_delivery *d)
{
    size_t n = frame->size - EB_FRAME_HEADER, head;
    if (n < 1)
        return EB_RAW_PROTOCOL;
    head = 1 + (size_t)body[0] + 4 + 16 + 4 + 4 + 8 + 24 + 4 + 1;
    if (n < head)
        return EB_RAW_PROTOCOL;
    const uint8_t *p = body + 1 + body[0];
    d->partition = eb_get32(p);
    d->generation = eb_get32(p + 24);
    d->lease = eb_get64(p + 28);
    d->first = (int64_t)eb_get64(p + 36);
    d->last = (int64_t)eb_get64(p + 44);
    head += 17 * (size_t)p[64];
    if (n < head)
        return EB_RAW_PROTOCOL;
    d->batches = body + head;
    d->length = n - head;
    return 0;
}

static int eb_raw_ack(eb_raw *c, const char *topic, const eb_raw_delivery *d)
{
    size_t t = strlen(topic), body = 1 + 1 + t + 4 + 4 + 8 + 8;
    uint8_t *p = eb_raw_room(c, EB_FRAME_HEADER + body);
    if (!p)
        return EB_RAW_MEMORY;
    c->out_end += EB_FRAME_HEADER + body;
    p = eb_raw_frame(p, 5, 0, body);
    p[0] = 1;
    p[1] = (uint8_t)t;
    memcpy(p + 2, topic, t);
    p += 2 + t;
    eb_put32(p, d->partition);
    eb_put32(p + 4, d->generation);
    eb_put64(p + 8, d->lease);
    eb_put64(p + 16, (uint64_t)(d->last + 1));
    return eb_raw_flush(c, 0);
}

/* Walk every record of a delivery: shape, CRC, density. *next is the offset expected. Returns records or an error. */
static int64_t eb_raw_walk(const eb_raw_delivery *d, int64_t *next)
{
    size_t at = 0;
    int64_t seen = 0;
    while (at < d->length) {
        eb_batch batch;
        const uint8_t *p, *end;
        if (eb_check_stored_batch(d->batches + at, d->length - at, d->length, -1, 0, 1, &batch))
            return EB_RAW_CORRUPT;
        p = d->batches + at + EB_BATCH_HEADER;
        end = d->batches + at + batch.size;
        if (!(batch.attributes & EB_CODEC_MASK))
            for (int32_t i = 0; i < batch.count; i++) {
                eb_record record;
                if (eb_read_record(p, end, &record) || record.offset_delta != i)
                    return EB_RAW_CORRUPT;
                p = record.end;
                int64_t offset = batch.base_offset + i;
                if (offset < d->first || offset > d->last)
                    continue;
                if (offset != *next)
                    return EB_RAW_ORDER;
                ++*next;
                seen++;
            }
        at += batch.size;
    }
    return seen;
}

/* Drain one partition: read `count` records from the start, acknowledging each delivery. */
static int eb_raw_consume(const char *host, int port, const char *topic, const char *group, int64_t count,
                          uint32_t window, const char *name, uint64_t *elapsed)
{
    eb_raw c;
    eb_frame frame;
    const uint8_t *body;
    int64_t id, seen = 0, next = 0;
    int16_t epoch;
    uint64_t began;
    int error = eb_raw_open(&c, host, port, 8 << 20);
    if (!error)
        error = eb_raw_connect(&c, name, 0, &id, &epoch);
    began = eb_raw_now();
    if (!error)
        error = eb_raw_subscribe(&c, topic, group, 1, window, 0);
    while (!error && seen < count) {
        eb_raw_delivery d;
        int64_t found;
        if ((error = eb_raw_wait(&c, &frame, &body, 4)) || (error = eb_raw_read_deliver(&frame, body, &d)))
            break;
        found = eb_raw_walk(&d, &next);
        if (found < 0)
            error = (int)found;
        else {
            seen += found;
            error = eb_raw_ack(&c, topic, &d);
        }
    }
    *elapsed = eb_raw_now() - began;
    eb_raw_close(&c);
    return error;
}

/* Publish at a fixed rate on one connection and time each push on another; latencies[count] in ns. */
static int eb_raw_push(const char *host, int port, const char *topic, const char *group, int64_t count, size_t size,
                       double rate, int level, const char *name, uint64_t *latencies)
{
    eb_raw p, c;
    eb_frame frame;
    const uint8_t *body;
    uint8_t image[EB_BATCH_HEADER + 8192 + 64], value[8192];
    int64_t id, producer_id, sent = 0, seen = 0;
    int16_t epoch, none;
    size_t prefix = 6 + strlen(topic), length;
    uint64_t *sent_at = calloc((size_t)count, sizeof *sent_at), began;
    int64_t base = -1;
    int error = size > sizeof value || !sent_at ? EB_RAW_MEMORY : eb_raw_open(&p, host, port, 1 << 20);
    if (error) {
        free(sent_at);
        return error;
    }
    error = eb_raw_open(&c, host, port, 4 << 20);
    if (!error)
        error = eb_raw_connect(&p, name, 1, &producer_id, &epoch);
    if (!error)
        error = eb_raw_connect(&c, group, 0, &id, &none);
    if (!error)
        error = eb_raw_subscribe(&c, topic, group, 2, 0, 0);
    if (!error)
        error = eb_raw_wait(&c, &frame, &body, 5);
    memset(value, 'x', sizeof value);
    length = eb_raw_batch(image, 1, value, size, 1700000000000);
    began = eb_raw_now() + 50000000u;
    while (!error && seen < count) {
        uint64_t now = eb_raw_now(), due = began + (uint64_t)((double)sent * 1e9 / rate);
        if (sent < count && now >= due) {
            uint8_t *q = eb_raw_room(&p, EB_FRAME_HEADER + prefix + length);
            p.out_end += EB_FRAME_HEADER + prefix + length;
            q = eb_raw_frame(q, EB_FRAME_PUBLISH, (uint64_t)sent + 2, prefix + length);
            q += eb_raw_prefix(q, topic, 0, level);
            memcpy(q, image, length);
            eb_raw_stamp(q, length, producer_id, epoch, (int32_t)sent);
            sent_at[sent++] = eb_raw_now();
            error = eb_raw_flush(&p, 0);
            continue;
        }
        struct pollfd wait[2] = {{c.fd, POLLIN, 0}, {p.fd, POLLIN, 0}};
        struct timespec left = {0, 0};
        if (sent < count) {
            left.tv_sec = (time_t)((due - now) / 1000000000u);
            left.tv_nsec = (long)((due - now) % 1000000000u);
        } else
            left.tv_sec = 10;
        int ready = ppoll(wait, 2, &left, NULL);
        if (ready == 0 && sent == count) {
            error = EB_RAW_TIMEOUT;
            break;
        }
        if (wait[1].revents) {
            error = eb_raw_fill(&p, MSG_DONTWAIT);
            while (!error && (error = eb_raw_next(&p, &frame, &body)) == 1) {
                error = frame.type == 5 && eb_get16(body + 2) ? EB_RAW_REFUSED : 0;
                if (frame.type == 5 && base < 0)
                    base = (int64_t)eb_get64(body + 4); /* what was there before is not ours to time */
            }
        }
        if (!error && wait[0].revents) {
            error = eb_raw_fill(&c, MSG_DONTWAIT);
            while (!error && (error = eb_raw_next(&c, &frame, &body)) == 1) {
                error = 0;
                if (frame.type != 4)
                    continue;
                eb_raw_delivery d;
                uint64_t arrived = eb_raw_now();
                if ((error = eb_raw_read_deliver(&frame, body, &d)))
                    break;
                for (int64_t offset = d.first; offset <= d.last && seen < count; offset++) {
                    if (base < 0 || offset < base)
                        continue;
                    if (offset - base != seen)
                        error = EB_RAW_ORDER;
                    else
                        latencies[seen] = arrived - sent_at[seen];
                    seen++;
                }
                if (!error)
                    error = eb_raw_ack(&c, topic, &d);
            }
        }
    }
    eb_raw_close(&p);
    eb_raw_close(&c);
    free(sent_at);
    return error;
}

/* `connections` clients, one record at a time each, `count` records in all. Writes the elapsed ns. */
static int eb_raw_many(const char *host, int port, const char *topic, int connections, int64_t count, size_t size,
                       int level, const char *name, uint64_t *elapsed)
{
    eb_raw *c = calloc((size_t)connections, sizeof *c);
    struct pollfd *wait = calloc((size_t)connections, sizeof *wait);
    int64_t *producers = calloc((size_t)connections, sizeof *producers), sent = 0, acked = 0, offset;
    int32_t *sequences = calloc((size_t)connections, sizeof *sequences);
    uint8_t image[EB_BATCH_HEADER + 8192 + 64], value[8192];
    size_t prefix = 6 + strlen(topic), length;
    int error = size > sizeof value || !c || !wait || !producers || !sequences ? EB_RAW_MEMORY : 0, opened = 0;
    int16_t epoch;
    uint64_t began;
    eb_frame frame;
    const uint8_t *body;
    for (; !error && opened < connections; opened++) {
        char own[64];
        snprintf(own, sizeof own, "%.40s-%d", name, opened);
        error = eb_raw_open(&c[opened], host, port, 64 << 10);
        if (!error)
            error = eb_raw_connect(&c[opened], own, 1, &producers[opened], &epoch);
        wait[opened].fd = c[opened].fd;
        wait[opened].events = POLLIN;
    }
    if (error)
        goto end;
    memset(value, 'x', sizeof value);
    length = eb_raw_batch(image, 1, value, size, 1700000000000);
    began = eb_raw_now();
    for (int i = 0; i < connections || acked < sent;) {
        int rank = i;
        if (i >= connections) {
            if (poll(wait, (nfds_t)connections, EB_RAW_TIMEOUT_MS) <= 0) {
                error = EB_RAW_TIMEOUT;
                goto end;
            }
            for (rank = 0; rank < connections && !error; rank++) {
                if (!wait[rank].revents)
                    continue;
                if ((error = eb_raw_fill(&c[rank], MSG_DONTWAIT)))
                    break;
                while (!error && (error = eb_raw_next(&c[rank], &frame, &body)) == 1) {
                    error = 0;
                    if (frame.type != 5)
                        continue;
                    if ((error = eb_raw_answer(&frame, body, (uint64_t)sequences[rank] + 1, &offset)))
                        break;
                    acked++;
                    if (sent < count) {
                        uint8_t *p = eb_raw_room(&c[rank], EB_FRAME_HEADER + prefix + length);
                        c[rank].out_end += EB_FRAME_HEADER + prefix + length;
                        p = eb_raw_frame(p, EB_FRAME_PUBLISH, (uint64_t)sequences[rank] + 2, prefix + length);
                        p += eb_raw_prefix(p, topic, 0, level);
                        memcpy(p, image, length);
                        eb_raw_stamp(p, length, producers[rank], epoch, sequences[rank]++);
                        sent++;
                        error = eb_raw_flush(&c[rank], 0);
                    }
                }
            }
            if (error)
                goto end;
            continue;
        }
        uint8_t *p = eb_raw_room(&c[rank], EB_FRAME_HEADER + prefix + length);
        c[rank].out_end += EB_FRAME_HEADER + prefix + length;
        p = eb_raw_frame(p, EB_FRAME_PUBLISH, 2, prefix + length);
        p += eb_raw_prefix(p, topic, 0, level);
        memcpy(p, image, length);
        eb_raw_stamp(p, length, producers[rank], epoch, sequences[rank]++);
        sent++;
        i++;
        if ((error = eb_raw_flush(&c[rank], 0)))
            goto end;
    }
    *elapsed = eb_raw_now() - began;
end:
    for (int i = 0; i < opened; i++)
        eb_raw_close(&c[i]);
    free(c);
    free(wait);
    free(producers);
    free(sequences);
    return error;
}

static void *eb_raw_echo(void *argument)
{
    int fd = *(int *)argument;
    char data[64];
    ssize_t n;
    while ((n = recv(fd, data, sizeof data, 0)) > 0)
        if (send(fd, data, (size_t)n, MSG_NOSIGNAL) != n)
            break;
    return NULL;
}

/* The reference for latencies: 64 bytes there and back between two threads over loopback, blocking calls; the echoing
 * thread on a CPU of its own when echo_cpu says so. */
static int eb_raw_ping(int64_t count, int echo_cpu, uint64_t *latencies)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    char data[64] = {0};
    int one = 1, error = EB_RAW_IO, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), client = -1, server = -1;
    pthread_t thread;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&address, &size))
        goto end;
    client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client < 0 || connect(client, (struct sockaddr *)&address, size) || (server = accept(listener, NULL, NULL)) < 0)
        goto end;
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (pthread_create(&thread, NULL, eb_raw_echo, &server))
        goto end;
    if (echo_cpu >= 0) {
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        CPU_SET(echo_cpu, &cpus);
        pthread_setaffinity_np(thread, sizeof cpus, &cpus);
    }
    error = 0;
    for (int64_t i = 0; i < count && !error; i++) {
        uint64_t began = eb_raw_now();
        if (send(client, data, sizeof data, MSG_NOSIGNAL) != sizeof data ||
            recv(client, data, sizeof data, MSG_WAITALL) != sizeof data)
            error = EB_RAW_IO;
        latencies[i] = eb_raw_now() - began;
    }
    shutdown(client, SHUT_RDWR);
    pthread_join(thread, NULL);
end:
    if (client >= 0) close(client);
    if (server >= 0) close(server);
    if (listener >= 0) close(listener);
    return error;
}
#endif
