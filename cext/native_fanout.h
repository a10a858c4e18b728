/* Many readers of one topic, measured from one thread: how long it takes to bring everything to everybody, how soon after
 * they connect all of them receive, and how late each push is.
 */
#ifndef EDGEBROKER_RAWFAN_H
#define EDGEBROKER_RAWFAN_H
#include "native_client.h"
#include <sys/epoll.h>

/* Records without an answer, and in flight to each reader; bytes in flight, and room for one delivery of them: the memory
 * that a hundred readers touch for the first time would else be what is measured. */
enum { EB_RAW_FAN_UNACKED = 100000, EB_RAW_FAN_WINDOW = 384 << 10, EB_RAW_FAN_BUFFER = 512 << 10 };

typedef struct {
    const char *host, *topic, *name;
    int port, readers, batch;
    int64_t count;
    size_t size;
    double rate;          /* records a second, one to a batch, each push timed; 0: batches as fast as it goes */
    uint64_t elapsed;     /* out: ns from the first publish to the last delivery */
    uint64_t ready;       /* out: ns from the first connect until every reader had received a record */
    uint64_t *latencies;  /* out, with a rate: ns of each delivery, count * readers of them */
} eb_raw_fan;

typedef struct {
    eb_raw raw;
    int64_t next;
} eb_raw_reader;

typedef struct {
    eb_raw_fan *fan;
    eb_raw producer;
    eb_raw_reader *readers;
    uint8_t *image, *value;
    uint64_t *sent_at, *latency;
    int64_t producer_id, sent, frames, acked, first, total, done;
    int16_t epoch;
    int poller, opened;
} eb_raw_fanout;

/* Publish the next `n` records as one batch. */
static int eb_raw_fan_publish(eb_raw_fanout *f, int n)
{
    size_t prefix = 6 + strlen(f->fan->topic);
    size_t length = eb_raw_batch(f->image, n, f->value, f->fan->size, 1700000000000);
    uint8_t *p = eb_raw_room(&f->producer, EB_FRAME_HEADER + prefix + length);
    if (!p)
        return EB_RAW_MEMORY;
    f->producer.out_end += EB_FRAME_HEADER + prefix + length;
    p = eb_raw_frame(p, EB_FRAME_PUBLISH, (uint64_t)++f->frames, prefix + length);
    p += eb_raw_prefix(p, f->fan->topic, 0, 2);
    memcpy(p, f->image, length);
    eb_raw_stamp(p, length, f->producer_id, f->epoch, (int32_t)f->sent);
    if (f->sent_at)
        f->sent_at[f->sent] = eb_raw_now();
    f->sent += n;
    return eb_raw_flush(&f->producer, 0);
}

static int eb_raw_fan_answers(eb_raw_fanout *f)
{
    eb_frame frame;
    const uint8_t *body;
    int64_t offset;
    int error = eb_raw_fill(&f->producer, MSG_DONTWAIT);
    while (!error && (error = eb_raw_next(&f->producer, &frame, &body)) == 1) {
        error = 0;
        if (frame.type == 5 && !(error = eb_raw_answer(&frame, body, (uint64_t)f->acked + 1, &offset)) && !f->acked++)
            f->first = offset;
    }
    return error;
}

static int eb_raw_fan_deliveries(eb_raw_fanout *f, eb_raw_reader *reader)
{
    eb_frame frame;
    const uint8_t *body;
    int error = eb_raw_fill(&reader->raw, MSG_DONTWAIT);
    uint64_t now = eb_raw_now();
    while (!error && (error = eb_raw_next(&reader->raw, &frame, &body)) == 1) {
        eb_raw_delivery d;
        int64_t found;
        error = 0;
        if (frame.type != 4)
            continue;
        if ((error = eb_raw_read_deliver(&frame, body, &d)))
            break;
        if ((found = eb_raw_walk(&d, &reader->next)) < 0)
            return (int)found;
        for (int64_t i = 0; f->latency && i < found; i++)
            *f->latency++ = now - f->sent_at[reader->next - found + i - f->first];
        if (found && reader->next == f->total)
            f->done++;
        error = eb_raw_ack(&reader->raw, f->fan->topic, &d);
    }
    return error;
}

/* Turn until every reader has come to `total`; publishes meanwhile up to record `last`. */
static int eb_raw_fan_turn(eb_raw_fanout *f, int64_t last)
{
    uint64_t began = eb_raw_now();
    int64_t before = f->sent;
    int error = 0;
    for (f->done = 0; !error && (f->done < f->fan->readers || f->acked < f->frames);) {
        struct epoll_event events[256];
        int wait = EB_RAW_TIMEOUT_MS, ready;
        while (!error && f->sent < last && f->sent - f->acked * (int64_t)f->fan->batch < EB_RAW_FAN_UNACKED) {
            int64_t n = last - f->sent < f->fan->batch ? last - f->sent : f->fan->batch;
            if (f->latency) {
                uint64_t due = began + (uint64_t)((double)(f->sent - before) * 1e9 / f->fan->rate), now = eb_raw_now();
                if (now < due) {
                    wait = (int)((due - now) / 1000000u) + 1;
                    break;
                }
                n = 1;
            }
            error = eb_raw_fan_publish(f, (int)n);
        }
        if (error)
            break;
        if ((ready = epoll_wait(f->poller, events, 256, wait)) == 0 && wait == EB_RAW_TIMEOUT_MS)
            return EB_RAW_TIMEOUT;
        for (int i = 0; i < ready && !error; i++)
            error = events[i].data.u32 == (uint32_t)f->fan->readers
                        ? eb_raw_fan_answers(f)
                        : eb_raw_fan_deliveries(f, &f->readers[events[i].data.u32]);
    }
    return error;
}

static int eb_raw_fan_open(eb_raw_fanout *f)
{
    eb_raw_fan *fan = f->fan;
    struct epoll_event event = {.events = EPOLLIN};
    eb_frame frame;
    const uint8_t *body;
    int64_t id;
    int16_t none;
    int error;
    for (; f->opened < fan->readers;) {
        char own[64];
        eb_raw *c = &f->readers[f->opened].raw;
        snprintf(own, sizeof own, "%.40s-%d", fan->name, f->opened);
        error = eb_raw_open(c, fan->host, fan->port, EB_RAW_FAN_BUFFER);
        event.data.u32 = (uint32_t)f->opened++;
        if (error || (error = eb_raw_connect(c, own, 0, &id, &none)) ||
            (error = eb_raw_subscribe(c, fan->topic, "", 2, EB_RAW_FAN_UNACKED, EB_RAW_FAN_WINDOW)))
            return error;
        if (epoll_ctl(f->poller, EPOLL_CTL_ADD, c->fd, &event))
            return EB_RAW_IO;
    }
    for (int i = 0; i < fan->readers; i++) {
        if ((error = eb_raw_wait(&f->readers[i].raw, &frame, &body, 5)))
            return error;
        if (eb_get16(body + 2))
            return EB_RAW_REFUSED;
    }
    event.data.u32 = (uint32_t)fan->readers;
    return epoll_ctl(f->poller, EPOLL_CTL_ADD, f->producer.fd, &event) ? EB_RAW_IO : 0;
}

static int eb_raw_run_fan(eb_raw_fan *fan)
{
    eb_raw_fanout f = {.fan = fan};
    uint64_t began = eb_raw_now();
    int error = EB_RAW_MEMORY;
    f.producer.fd = -1;
    f.poller = epoll_create1(EPOLL_CLOEXEC);
    f.readers = calloc((size_t)fan->readers, sizeof *f.readers);
    f.image = malloc((size_t)fan->batch * (fan->size + 40) + EB_BATCH_HEADER);
    f.value = malloc(fan->size);
    if (fan->rate > 0)
        f.sent_at = calloc((size_t)fan->count + 2, sizeof *f.sent_at);
    if (f.poller < 0 || !f.readers || !f.image || !f.value || (fan->rate > 0 && !f.sent_at))
        goto end;
    memset(f.value, 'x', fan->size);
    /* One record makes the topic; a second one comes to every reader, which shows that all of them are there. */
    if ((error = eb_raw_open(&f.producer, fan->host, fan->port, 8 << 20)) ||
        (error = eb_raw_connect(&f.producer, fan->name, 1, &f.producer_id, &f.epoch)) ||
        (error = eb_raw_fan_publish(&f, 1)))
        goto end;
    while (!error && !f.acked)
        error = eb_raw_fan_answers(&f);
    if (error || (error = eb_raw_fan_open(&f)))
        goto end;
    for (int i = 0; i < fan->readers; i++)
        f.readers[i].next = f.first + 1;
    f.total = f.first + 2;
    if ((error = eb_raw_fan_turn(&f, 2)))
        goto end;
    fan->ready = eb_raw_now() - began;
    began = eb_raw_now();
    f.latency = fan->latencies;
    f.total = f.first + 2 + fan->count;
    error = eb_raw_fan_turn(&f, 2 + fan->count);
    fan->elapsed = eb_raw_now() - began;
end:
    for (int i = 0; i < f.opened; i++)
        eb_raw_close(&f.readers[i].raw);
    eb_raw_close(&f.producer);
    if (f.poller >= 0)
        close(f.poller);
    free(f.readers);
    free(f.image);
    free(f.value);
    free(f.sent_at);
    return error;
}
#endif
