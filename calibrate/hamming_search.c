/* Exact search among packed ±1 codes by XOR and popcount. C99, nothing but the standard headers.
 *
 * Build: cc -O3 -march=native -shared -fPIC hamming_search.c -o libhamming_search.so
 * AVX-512 (VPOPCNTDQ), AVX2 or NEON are used where the compiler's flags allow them, else 64-bit words in portable C.
 * All give the same bits, as long as -ffast-math is not among the flags.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define TF_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define TF_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define TF_NEON 1
#include <arm_neon.h>
#endif

static int64_t ones(uint64_t x) {
#if defined(__GNUC__) && (defined(__POPCNT__) || defined(__aarch64__))
    return __builtin_popcountll(x);
#else
    x -= (x >> 1) & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (int64_t)((x * 0x0101010101010101u) >> 56);
#endif
}

#ifdef TF_AVX2
/* Ones of 32 bytes, as four sums: half-bytes looked up in a table (Mula, Kurz and Lemire, arXiv 1611.07612). */
static __m256i ones_256(__m256i x) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1,
                                           2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
    __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
    return _mm256_sad_epu8(_mm256_add_epi8(a, b), _mm256_setzero_si256());
}
#endif

/* In how many bits two strings of `count` bytes differ. */
static int64_t differing(const uint8_t *a, const uint8_t *b, size_t count) {
    size_t i = 0;
    int64_t total = 0;
#if defined(TF_AVX512)
    __m512i sum = _mm512_setzero_si512();
    for (; i + 64 <= count; i += 64)
        sum = _mm512_add_epi64(
            sum, _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i))));
    if (i < count) {
        __mmask64 rest = ~(uint64_t)0 >> (64 - (count - i));
        __m512i x = _mm512_maskz_loadu_epi8(rest, a + i), y = _mm512_maskz_loadu_epi8(rest, b + i);
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(x, y)));
    }
    return _mm512_reduce_add_epi64(sum);
#elif defined(TF_AVX2)
    if (count >= 128) { /* below, the sums at the end cost more than they save */
        __m256i sum = _mm256_setzero_si256();
        for (; i + 32 <= count; i += 32) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(a + i)), y = _mm256_loadu_si256((const __m256i *)(b + i));
            sum = _mm256_add_epi64(sum, ones_256(_mm256_xor_si256(x, y)));
        }
        int64_t parts[4];
        _mm256_storeu_si256((__m256i *)parts, sum);
        total = parts[0] + parts[1] + parts[2] + parts[3];
    }
#elif defined(TF_NEON)
    for (; i + 16 <= count; i += 16)
        total += vaddlvq_u8(vcntq_u8(veorq_u8(vld1q_u8(a + i), vld1q_u8(b + i))));
#endif
    for (; i + 8 <= count; i += 8) {
        uint64_t x, y;
        memcpy(&x, a + i, 8);
        memcpy(&y, b + i, 8);
        total += ones(x ^ y);
    }
    if (i < count) {
        uint64_t x = 0, y = 0;
        memcpy(&x, a + i, count - i);
        memcpy(&y, b + i, count - i);
        total += ones(x ^ y);
    }
    return total;
}

/* The sum over plane pairs (s, t) of 4^(planes - 1) 2^-(s+t) <a_s, b_t>. */
static int64_t likeness(const uint8_t *a, const uint8_t *b, size_t plane_bytes, int planes) {
    int64_t total = 0;
    for (int s = 0; s < planes; s++)
        for (int t = 0; t < planes; t++) {
            int64_t apart = differing(a + s * plane_bytes, b + t * plane_bytes, plane_bytes);
            total += ((int64_t)plane_bytes * 8 - 2 * apart) * ((int64_t)1 << (2 * (planes - 1) - s - t));
        }
    return total;
}

/* For each query the k <= base_count codes most like it, best first, of equals the lower index first.
 *
 * A code is planes * plane_bytes bytes, plane 0 first. inverse_norms: 1 / length of each code of the base, or NULL for
 * ones, as codes of one plane have. index, score: [query_count, k].
 */
void hamming_search(const uint8_t *queries, size_t query_count, const uint8_t *base, const double *inverse_norms,
                    size_t base_count, size_t plane_bytes, int planes, size_t k, int64_t *index, double *score) {
    size_t bytes = plane_bytes * (size_t)planes;
    for (size_t q = 0; q < query_count; q++) {
        int64_t *best = index + q * k;
        double *high = score + q * k;
        size_t held = 0;
        for (size_t n = 0; n < base_count; n++) {
            int64_t raw = likeness(queries + q * bytes, base + n * bytes, plane_bytes, planes);
            double now = inverse_norms ? (double)raw * inverse_norms[n] : (double)raw;
            if (held == k && now <= high[k - 1]) continue;
            size_t at = held < k ? held++ : k - 1;
            for (; at > 0 && high[at - 1] < now; at--) {
                high[at] = high[at - 1];
                best[at] = best[at - 1];
            }
            high[at] = now;
            best[at] = (int64_t)n;
        }
    }
}
