/* Frame headers and PUBLISH prefixes from any bytes: nothing outside of the buffer is read, every limit holds, and the
 * walk over a stream always ends. The first two bytes choose max_frame. */
#include <assert.h>
#include <stdlib.h>

#include "frames.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t max_frame = ((size_t)data[0] << 8 | data[1]) + 1;
    size_t n = size - 2, position = 0;
    uint8_t *p = malloc(n ? n : 1); /* of exactly this size: the sanitizer sees a byte too many */
    assert(p != NULL);
    memcpy(p, data + 2, n);
    for (;;) {
        eb_frame frame = {0, 0, 0};
        int reason = eb_read_frame(p + position, n - position, max_frame, &frame);
        if (reason == EB_FRAME_MORE && n - position < EB_FRAME_HEADER)
            break;
        assert(frame.correlation == eb_get64(p + position + 8));
        if (reason == EB_FRAME_TOO_LARGE)
            assert(frame.size > max_frame);
        if (reason == EB_FRAME_MORE)
            assert(frame.size > n - position && frame.size <= max_frame);
        if (reason)
            break;
        assert(frame.size >= EB_FRAME_HEADER && frame.size <= n - position && frame.size <= max_frame);
        assert(frame.type >= 1 && frame.type <= EB_FRAME_LAST_TYPE);
        size_t body = frame.size - EB_FRAME_HEADER;
        size_t prefix = eb_publish_prefix(p + position + EB_FRAME_HEADER, body);
        assert(prefix <= body && (prefix == 0 || prefix == 6 + (size_t)p[position + EB_FRAME_HEADER + 1]));
        position += frame.size;
    }
    free(p);
    return 0;
}
