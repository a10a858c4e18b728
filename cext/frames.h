/* The frame header of the TCP protocol (docs/protocol.md), big-endian:
 *
 *   0 u32 length of what follows this field (12 .. limit)   4 u8 type   5 u8 flags = 0   6 u16 reserved = 0
 *   8 u64 correlation   16 body
 *
 * Pure C without allocation, as recordbatch.h: the fuzzer drives it.
 */
#ifndef EDGEBROKER_FRAMES_H
#define EDGEBROKER_FRAMES_H
#include "recordbatch.h"

enum { EB_FRAME_HEADER = 16, EB_FRAME_MIN_LENGTH = 12, EB_FRAME_PUBLISH = 2, EB_FRAME_LAST_TYPE = 8 };
enum eb_frame_reason { EB_FRAME_OK = 0, EB_FRAME_MORE = 1, EB_FRAME_BAD_LENGTH = 2, EB_FRAME_BAD_TYPE = 3,
                       EB_FRAME_TOO_LARGE = 4, EB_FRAME_BAD_BODY = 5 };

typedef struct {
    uint64_t correlation;
    size_t size; /* header and body */
    uint8_t type;
} eb_frame;

/* Read the frame at p. The header is judged before the body has arrived, so nothing is buffered for a refused one. */
static inline int eb_read_frame(const uint8_t *p, size_t n, size_t max_frame, eb_frame *frame)
{
    if (n < EB_FRAME_HEADER)
        return EB_FRAME_MORE;
    uint32_t length = eb_get32(p);
    frame->type = p[4];
    frame->correlation = eb_get64(p + 8);
    frame->size = (size_t)length + 4;
    if (length < EB_FRAME_MIN_LENGTH)
        return EB_FRAME_BAD_LENGTH;
    if (frame->type == 0 || frame->type > EB_FRAME_LAST_TYPE || p[5] || p[6] || p[7])
        return EB_FRAME_BAD_TYPE;
    if (frame->size > max_frame)
        return EB_FRAME_TOO_LARGE;
    return frame->size > n ? EB_FRAME_MORE : EB_FRAME_OK;
}

/* Length of a PUBLISH prefix (u8 ack level, u8 topic length, topic, u32 partition); 0 when the body is too short. */
static inline size_t eb_publish_prefix(const uint8_t *body, size_t n)
{
    if (n < 2)
        return 0;
    size_t prefix = 2 + (size_t)body[1] + 4;
    return prefix <= n ? prefix : 0;
}
#endif
