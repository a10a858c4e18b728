/* CRC-32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720 appendix B.4 has test vectors).
 *
 * Two implementations with identical results, chosen once per process by eb_crc32c_init():
 *  - hardware: the SSE4.2 crc32 instruction on three interleaved streams (the instruction has a latency of three
 *    cycles and a throughput of one), merged with one carry-less multiplication per stream (PCLMUL);
 *  - portable: slicing by eight bytes with tables computed at start.
 *
 * A merge multiplies a remainder by x^(8n) mod P. In the reflected representation the 64-bit product of two 32-bit
 * remainders, fed to one crc32 instruction, comes out multiplied by x^33; the constants are therefore x^(8n-33).
 */
#ifndef EDGEBROKER_CRC32C_H
#define EDGEBROKER_CRC32C_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EB_CRC32C_POLYNOMIAL 0x82F63B78u
#define EB_CRC32C_LONG 4096u
#define EB_CRC32C_SHORT 256u

static uint32_t eb_crc32c_table[8][256];
static uint32_t eb_crc32c_shift_long[2], eb_crc32c_shift_short[2];
static int eb_crc32c_hardware = -1;

static uint32_t eb_crc32c_update_portable(uint32_t crc, const uint8_t *p, size_t n)
{
    while (n && ((uintptr_t)p & 7)) {
        crc = eb_crc32c_table[0][(crc ^ *p++) & 255] ^ (crc >> 8);
        n--;
    }
    while (n >= 8) {
        uint32_t low = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        low ^= crc;
        crc = eb_crc32c_table[7][low & 255] ^ eb_crc32c_table[6][(low >> 8) & 255] ^
              eb_crc32c_table[5][(low >> 16) & 255] ^ eb_crc32c_table[4][low >> 24] ^
              eb_crc32c_table[3][p[4]] ^ eb_crc32c_table[2][p[5]] ^
              eb_crc32c_table[1][p[6]] ^ eb_crc32c_table[0][p[7]];
        p += 8;
        n -= 8;
    }
    while (n--)
        crc = eb_crc32c_table[0][(crc ^ *p++) & 255] ^ (crc >> 8);
    return crc;
}

/* x^power mod P, reflected (bit 31 is x^0). */
static uint32_t eb_crc32c_power(uint32_t power)
{
    uint32_t value = 0x80000000u;
    while (power--)
        value = (value >> 1) ^ (value & 1 ? EB_CRC32C_POLYNOMIAL : 0);
    return value;
}

#if defined(__x86_64__)
#include <nmmintrin.h>
#include <wmmintrin.h>

__attribute__((target("sse4.2,pclmul")))
static inline uint32_t eb_crc32c_shift(uint32_t crc, uint32_t constant)
{
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)crc), _mm_cvtsi32_si128((int)constant), 0);
    return (uint32_t)_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

__attribute__((target("sse4.2,pclmul")))
static inline uint32_t eb_crc32c_three(uint32_t crc, const uint8_t *p, size_t block, const uint32_t *shift)
{
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < block; i += 8) {
        uint64_t x, y, z;
        memcpy(&x, p + i, 8);
        memcpy(&y, p + block + i, 8);
        memcpy(&z, p + 2 * block + i, 8);
        a = _mm_crc32_u64(a, x);
        b = _mm_crc32_u64(b, y);
        c = _mm_crc32_u64(c, z);
    }
    return eb_crc32c_shift((uint32_t)a, shift[1]) ^ eb_crc32c_shift((uint32_t)b, shift[0]) ^ (uint32_t)c;
}

__attribute__((target("sse4.2,pclmul")))
static uint32_t eb_crc32c_update_hardware(uint32_t crc, const uint8_t *p, size_t n)
{
    while (n >= 3 * EB_CRC32C_LONG) {
        crc = eb_crc32c_three(crc, p, EB_CRC32C_LONG, eb_crc32c_shift_long);
        p += 3 * EB_CRC32C_LONG;
        n -= 3 * EB_CRC32C_LONG;
    }
    while (n >= 3 * EB_CRC32C_SHORT) {
        crc = eb_crc32c_three(crc, p, EB_CRC32C_SHORT, eb_crc32c_shift_short);
        p += 3 * EB_CRC32C_SHORT;
        n -= 3 * EB_CRC32C_SHORT;
    }
    uint64_t wide = crc;
    while (n >= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        wide = _mm_crc32_u64(wide, word);
        p += 8;
        n -= 8;
    }
    crc = (uint32_t)wide;
    while (n--)
        crc = _mm_crc32_u8(crc, *p++);
    return crc;
}
#endif

/* Fill the tables and choose the path. Call once before any other function of this header; idempotent. */
static void eb_crc32c_init(void)
{
    if (eb_crc32c_hardware >= 0)
        return;
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? EB_CRC32C_POLYNOMIAL : 0);
        eb_crc32c_table[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int slice = 1; slice < 8; slice++) {
            uint32_t previous = eb_crc32c_table[slice - 1][byte];
            eb_crc32c_table[slice][byte] = (previous >> 8) ^ eb_crc32c_table[0][previous & 255];
        }
    eb_crc32c_shift_long[0] = eb_crc32c_power(8 * EB_CRC32C_LONG - 33);
    eb_crc32c_shift_long[1] = eb_crc32c_power(16 * EB_CRC32C_LONG - 33);
    eb_crc32c_shift_short[0] = eb_crc32c_power(8 * EB_CRC32C_SHORT - 33);
    eb_crc32c_shift_short[1] = eb_crc32c_power(16 * EB_CRC32C_SHORT - 33);
    eb_crc32c_hardware = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    eb_crc32c_hardware = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
#endif
}

/* Continue `value` (0 to begin) over n bytes. */
static inline uint32_t eb_crc32c_portable(uint32_t value, const void *data, size_t n)
{
    return ~eb_crc32c_update_portable(~value, (const uint8_t *)data, n);
}

static inline uint32_t eb_crc32c(uint32_t value, const void *data, size_t n)
{
#if defined(__x86_64__)
    if (eb_crc32c_hardware > 0)
        return ~eb_crc32c_update_hardware(~value, (const uint8_t *)data, n);
#endif
    return eb_crc32c_portable(value, data, n);
}
#endif
