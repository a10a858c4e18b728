/* SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, "SipHash: a fast short-input PRF", and its 128-bit
 * variant in their reference implementation): a hash under a secret key, of which nobody can make two inputs collide. */
#ifndef EB_SIPHASH_H
#define EB_SIPHASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EB_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define EB_SIP_ROUND(a, b, c, d) \
    do { \
        a += b; b = EB_ROTL(b, 13) ^ a; a = EB_ROTL(a, 32); \
        c += d; d = EB_ROTL(d, 16) ^ c; \
        a += d; d = EB_ROTL(d, 21) ^ a; \
        c += b; b = EB_ROTL(b, 17) ^ c; c = EB_ROTL(c, 32); \
    } while (0)

/* out[0], out[1]: the hash of n bytes under the key (k0, k1). Little-endian machines only, as all of cext. */
static inline void eb_siphash128(const uint8_t *p, size_t n, uint64_t k0, uint64_t k1, uint64_t out[2])
{
    uint64_t a = 0x736f6d6570736575ULL ^ k0, b = 0x646f72616e646f6dULL ^ k1 ^ 0xee;
    uint64_t c = 0x6c7967656e657261ULL ^ k0, d = 0x7465646279746573ULL ^ k1;
    uint64_t word, last = (uint64_t)n << 56;
    const uint8_t *stop = p + (n & ~(size_t)7);
    for (; p != stop; p += 8) {
        memcpy(&word, p, 8);
        d ^= word;
        EB_SIP_ROUND(a, b, c, d);
        EB_SIP_ROUND(a, b, c, d);
        a ^= word;
    }
    for (size_t i = 0; i < (n & 7); i++)
        last |= (uint64_t)p[i] << (8 * i);
    d ^= last;
    EB_SIP_ROUND(a, b, c, d);
    EB_SIP_ROUND(a, b, c, d);
    a ^= last;
    c ^= 0xee;
    for (int i = 0; i < 4; i++)
        EB_SIP_ROUND(a, b, c, d);
    out[0] = a ^ b ^ c ^ d;
    b ^= 0xdd;
    for (int i = 0; i < 4; i++)
        EB_SIP_ROUND(a, b, c, d);
    out[1] = a ^ b ^ c ^ d;
}

#endif
