/* Layers whose weights and inputs are -1 and +1: a bit each (1 is -1), 64 to a word.
 *
 * A product of K signs is K - 2 * popcount(a xor b). Weights lie 8 rows side by side, word by word, so that one word of
 * the input meets 8 output channels at once and no sum runs across a register. Each tap of a kernel starts at a whole
 * word; bits behind the last channel are 0 on both sides and count nothing. A border has no sign: it is computed as +1,
 * and what that added is taken off again (tap_sums).
 */
#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

void tf_sign_i8(int32_t count, float threshold, int32_t equal, const float *x, int8_t *y)
{
    if (equal) {
        for (int32_t i = 0; i < count; i++)
            y[i] = (int8_t)(2 * (x[i] >= threshold) - 1);
    } else {
        for (int32_t i = 0; i < count; i++)
            y[i] = (int8_t)(2 * (x[i] > threshold) - 1);
    }
}

/* Codes of one pixel to words. */
static void pack(const int8_t *x, int32_t count, uint64_t *words)
{
    for (int32_t k = 0; k < count; k += 64) {
        const int32_t rest = count - k < 64 ? count - k : 64;
        uint64_t word = 0;
#if defined(__AVX2__)
        if (rest == 64) {
            const uint32_t low = (uint32_t)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i *)(x + k)));
            const uint32_t high = (uint32_t)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i *)(x + k + 32)));
            words[k / 64] = (uint64_t)high << 32 | low;
            continue;
        }
#endif
        for (int32_t i = 0; i < rest; i++)
            word |= (uint64_t)(x[k + i] < 0) << i;
        words[k / 64] = word;
    }
}

#if defined(__AVX512F__) && defined(__AVX512VPOPCNTDQ__)
#define ROWS 4
/* How many bits of each of ROWS rows differ from those of 8 channels, as `total` less twice their number. */
static void differ(const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total, int32_t sums[][8])
{
    __m512i count[ROWS];
    for (int r = 0; r < ROWS; r++)
        count[r] = _mm512_setzero_si512();
    for (int32_t k = 0; k < words; k++) {
        const __m512i w = _mm512_loadu_si512(b + (size_t)k * 8);
        for (int r = 0; r < ROWS; r++)
            count[r] = _mm512_add_epi64(
                count[r], _mm512_popcnt_epi64(_mm512_xor_si512(w, _mm512_set1_epi64((long long)a[(size_t)r * step + k]))));
    }
    for (int r = 0; r < ROWS; r++)
        _mm256_storeu_si256((__m256i *)sums[r], _mm256_sub_epi32(_mm256_set1_epi32(total),
                                                                 _mm256_slli_epi32(_mm512_cvtepi64_epi32(count[r]), 1)));
}
#elif defined(__AVX2__)
#define ROWS 2
static inline __m256i bits_of_bytes(__m256i x)
{
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                           _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
}

/* Counted in bytes, two rows at once. A tree of adders (Harley and Seal's) was tried: it needs as long from 72 words on,
 * and half as long again for the few words that layers have. */
static void differ(const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total, int32_t sums[][8])
{
    const __m256i none = _mm256_setzero_si256(), even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    __m256i count[ROWS][2] = {{none, none}, {none, none}};
    for (int32_t start = 0; start < words; start += 31) { /* 31 * 8 fits into a byte */
        const int32_t end = words - start < 31 ? words : start + 31;
        __m256i bytes[ROWS][2] = {{none, none}, {none, none}};
        for (int32_t k = start; k < end; k++) {
            const __m256i low = _mm256_loadu_si256((const __m256i *)(b + (size_t)k * 8));
            const __m256i high = _mm256_loadu_si256((const __m256i *)(b + (size_t)k * 8 + 4));
            for (int r = 0; r < ROWS; r++) {
                const __m256i word = _mm256_set1_epi64x((long long)a[(size_t)r * step + k]);
                bytes[r][0] = _mm256_add_epi8(bytes[r][0], bits_of_bytes(_mm256_xor_si256(word, low)));
                bytes[r][1] = _mm256_add_epi8(bytes[r][1], bits_of_bytes(_mm256_xor_si256(word, high)));
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++)
                count[r][i] = _mm256_add_epi64(count[r][i], _mm256_sad_epu8(bytes[r][i], none));
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2; i++) {
            const __m128i found = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(count[r][i], even));
            _mm_storeu_si128((__m128i *)(sums[r] + i * 4), _mm_sub_epi32(_mm_set1_epi32(total), _mm_slli_epi32(found, 1)));
        }
}
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define ROWS 2
static void differ(const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total, int32_t sums[][8])
{
    uint64x2_t count[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 4; i++)
            count[r][i] = vdupq_n_u64(0);
    for (int32_t start = 0; start < words; start += 31) { /* 31 * 8 fits into a byte */
        const int32_t end = words - start < 31 ? words : start + 31;
        uint8x16_t bytes[ROWS][4];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 4; i++)
                bytes[r][i] = vdupq_n_u8(0);
        for (int32_t k = start; k < end; k++)
            for (int i = 0; i < 4; i++) {
                const uint64x2_t w = vld1q_u64(b + (size_t)k * 8 + i * 2);
                for (int r = 0; r < ROWS; r++)
                    bytes[r][i] = vaddq_u8(
                        bytes[r][i], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(w, vdupq_n_u64(a[(size_t)r * step + k])))));
            }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 4; i++)
                count[r][i] = vpadalq_u32(count[r][i], vpaddlq_u16(vpaddlq_u8(bytes[r][i])));
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 8; i++)
            sums[r][i] = total - 2 * (int32_t)count[r][i / 2][i % 2];
}
#else
#define ROWS 1
static void differ(const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total, int32_t sums[][8])
{
    int32_t count[8] = {0};
    (void)step;
    for (int32_t k = 0; k < words; k++)
        for (int i = 0; i < 8; i++)
#if defined(__GNUC__)
            count[i] += __builtin_popcountll(a[k] ^ b[(size_t)k * 8 + i]);
#else
            for (uint64_t x = a[k] ^ b[(size_t)k * 8 + i]; x; x &= x - 1)
                count[i]++;
#endif
    for (int i = 0; i < 8; i++)
        sums[0][i] = total - 2 * count[i];
}
#endif

/* The words under the kernel at output pixel `pixel`; what lies beside the image stays as it is. */
static void patch(const tf_conv *p, const uint64_t *packed, int32_t pixel, int32_t per_tap, uint64_t *row)
{
    const int32_t plane = p->out_height * p->out_width, at = pixel % plane;
    const int32_t top = at / p->out_width * p->stride_h - p->pad_h, left = at % p->out_width * p->stride_w - p->pad_w;
    const uint64_t *image = packed + (size_t)(pixel / plane) * p->height * p->width * per_tap;
    for (int32_t i = 0; i < p->kernel_h; i++) {
        const int32_t h = top + i * p->dilation_h;
        for (int32_t j = 0; j < p->kernel_w; j++, row += per_tap) {
            const int32_t w = left + j * p->dilation_w;
            if (h >= 0 && h < p->height && w >= 0 && w < p->width)
                for (int32_t k = 0; k < per_tap; k++)
                    row[k] = image[((size_t)h * p->width + w) * per_tap + k];
        }
    }
}

/* Take off what padding of +1 added to the sums of one output pixel. */
static void without_border(const tf_conv *p, int32_t pixel, int32_t *sums)
{
    const int32_t at = pixel % (p->out_height * p->out_width);
    const int32_t top = at / p->out_width * p->stride_h - p->pad_h, left = at % p->out_width * p->stride_w - p->pad_w;
    const int16_t *tap = p->tap_sums;
    for (int32_t i = 0; i < p->kernel_h; i++) {
        const int32_t h = top + i * p->dilation_h;
        for (int32_t j = 0; j < p->kernel_w; j++, tap += p->out_channels) {
            const int32_t w = left + j * p->dilation_w;
            if (h >= 0 && h < p->height && w >= 0 && w < p->width)
                continue;
            for (int32_t c = 0; c < p->out_channels; c++)
                sums[c] -= tap[c];
        }
    }
}

/* Convolution of signs; a linear layer is a kernel of 1 x 1 over an image of 1 x rows. Scratch: the packed input, a
 * tile of patches, a tile of sums. */
void tf_conv_w1a1(const tf_conv *p, const int8_t *x, void *y, int8_t *scratch)
{
    const int32_t per_tap = (p->channels + 63) / 64, taps = p->kernel_h * p->kernel_w, words = per_tap * taps;
    const int32_t inputs = p->batch * p->height * p->width, plane = p->out_height * p->out_width;
    const int32_t pixels = p->batch * plane, blocks = (p->out_channels + 7) / 8, size = p->out.codes ? 1 : 4;
    uint64_t *packed = (uint64_t *)scratch, *rows = packed + (size_t)inputs * per_tap;
    int32_t *sums = (int32_t *)(rows + (size_t)TF_TILE * words);
    for (int32_t i = 0; i < inputs; i++)
        pack(x + (size_t)i * p->channels, p->channels, packed + (size_t)i * per_tap);
    for (int32_t pixel = 0; pixel < pixels; pixel += TF_TILE) {
        const int32_t count = pixels - pixel < TF_TILE ? pixels - pixel : TF_TILE;
        const uint64_t *tile = rows;
        if (taps == 1 && p->stride_h == 1 && p->stride_w == 1 && count == TF_TILE && !p->pad_h && !p->pad_w) {
            tile = packed + (size_t)pixel * per_tap; /* the patches are the input */
        } else {
            memset(rows, 0, (size_t)TF_TILE * words * sizeof *rows);
            for (int32_t t = 0; t < count; t++)
                patch(p, packed, pixel + t, per_tap, rows + (size_t)t * words);
        }
        for (int32_t block = 0; block < blocks; block++)
            for (int32_t t = 0; t < count; t += ROWS) {
                int32_t found[ROWS][8];
                differ(tile + (size_t)t * words, words, (const uint64_t *)p->weight.data + (size_t)block * words * 8, words,
                       p->channels * taps, found);
                for (int r = 0; r < ROWS; r++)
                    memcpy(sums + (size_t)(t + r) * blocks * 8 + block * 8, found[r], sizeof found[r]);
            }
        for (int32_t t = 0; t < count; t++) {
            int32_t *line = sums + (size_t)t * blocks * 8;
            if (p->tap_sums)
                without_border(p, pixel + t, line);
            for (int32_t c = 0; p->out.start && c < p->out_channels; c++)
                line[c] += p->out.start[c];
            tf_write(&p->out, 0, line, p->out_channels, (char *)y + (size_t)(pixel + t) * p->out_channels * size);
        }
    }
}
