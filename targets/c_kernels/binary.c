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

static int32_t bits_of(uint64_t x)
{
#if defined(__GNUC__)
    return __builtin_popcountll(x);
#else
    int32_t found = 0;
    for (; x; x &= x - 1)
        found++;
    return found;
#endif
}

/* `rows` is a constant wherever `differ` is called, and loops over it have to vanish: sums live in registers. */
#if defined(__GNUC__)
#define TF_ALWAYS static inline __attribute__((always_inline))
#else
#define TF_ALWAYS static inline
#endif

#if defined(__AVX512F__) && defined(__AVX512VPOPCNTDQ__)
#define ROWS 4
/* How many bits of each of ROWS rows differ from those of 8 channels, as `total` less twice their number. */
TF_ALWAYS void differ(int rows, const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total,
                      int32_t sums[][8])
{
    __m512i count[ROWS];
    for (int r = 0; r < rows; r++)
        count[r] = _mm512_setzero_si512();
    for (int32_t k = 0; k < words; k++) {
        const __m512i w = _mm512_loadu_si512(b + (size_t)k * 8);
        for (int r = 0; r < rows; r++)
            count[r] = _mm512_add_epi64(
                count[r], _mm512_popcnt_epi64(_mm512_xor_si512(w, _mm512_set1_epi64((long long)a[(size_t)r * step + k]))));
    }
    for (int r = 0; r < rows; r++)
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
TF_ALWAYS void differ(int rows, const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total,
                      int32_t sums[][8])
{
    const __m256i none = _mm256_setzero_si256(), even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    __m256i count[ROWS][2] = {{none, none}, {none, none}};
    for (int32_t start = 0; start < words; start += 31) { /* 31 * 8 fits into a byte */
        const int32_t end = words - start < 31 ? words : start + 31;
        __m256i bytes[ROWS][2] = {{none, none}, {none, none}};
        for (int32_t k = start; k < end; k++) {
            const __m256i low = _mm256_loadu_si256((const __m256i *)(b + (size_t)k * 8));
            const __m256i high = _mm256_loadu_si256((const __m256i *)(b + (size_t)k * 8 + 4));
            for (int r = 0; r < rows; r++) {
                const __m256i word = _mm256_set1_epi64x((long long)a[(size_t)r * step + k]);
                bytes[r][0] = _mm256_add_epi8(bytes[r][0], bits_of_bytes(_mm256_xor_si256(word, low)));
                bytes[r][1] = _mm256_add_epi8(bytes[r][1], bits_of_bytes(_mm256_xor_si256(word, high)));
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 2; i++)
                count[r][i] = _mm256_add_epi64(count[r][i], _mm256_sad_epu8(bytes[r][i], none));
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) {
            const __m128i found = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(count[r][i], even));
            _mm_storeu_si128((__m128i *)(sums[r] + i * 4), _mm_sub_epi32(_mm_set1_epi32(total), _mm_slli_epi32(found, 1)));
        }
}
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define ROWS 4
/* Four rows share each load of weights: 16 sums, 4 words of input and a weight fit into 32 registers. */
TF_ALWAYS void differ(int rows, const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total,
                      int32_t sums[][8])
{
    uint32x4_t count[ROWS][2];
    for (int r = 0; r < rows; r++)
        count[r][0] = count[r][1] = vdupq_n_u32(0);
    for (int32_t start = 0; start < words; start += 31) { /* 31 * 8 fits into a byte */
        const int32_t end = words - start < 31 ? words : start + 31;
        uint8x16_t bytes[ROWS][4];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++)
                bytes[r][i] = vdupq_n_u8(0);
        for (int32_t k = start; k < end; k++) {
            uint64x2_t word[ROWS];
            for (int r = 0; r < rows; r++)
                word[r] = vld1q_dup_u64(a + (size_t)r * step + k);
            for (int i = 0; i < 4; i++) {
                const uint64x2_t w = vld1q_u64(b + (size_t)k * 8 + i * 2);
                for (int r = 0; r < rows; r++)
                    bytes[r][i] = vaddq_u8(bytes[r][i], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(w, word[r]))));
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 2; i++) { /* 8 bytes of a channel become one number, channels stay in order */
                const uint16x8_t low = vpaddlq_u8(bytes[r][2 * i]), high = vpaddlq_u8(bytes[r][2 * i + 1]);
                const uint16x8_t pairs = vpaddq_u16(low, high);
                count[r][i] = vpadalq_u16(count[r][i], pairs);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++)
            vst1q_s32(sums[r] + 4 * i,
                      vsubq_s32(vdupq_n_s32(total), vshlq_n_s32(vreinterpretq_s32_u32(count[r][i]), 1)));
}
#else
#define ROWS 1
TF_ALWAYS void differ(int rows, const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total,
                      int32_t sums[][8])
{
    int32_t count[8] = {0};
    (void)step, (void)rows;
    for (int32_t k = 0; k < words; k++)
        for (int i = 0; i < 8; i++)
            count[i] += bits_of(a[k] ^ b[(size_t)k * 8 + i]);
    for (int i = 0; i < 8; i++)
        sums[0][i] = total - 2 * count[i];
}
#endif

/* One block of 8 channels for `count` rows, ROWS at a time, the last ones alone. */
static void block_of_sums(const uint64_t *a, int32_t step, const uint64_t *b, int32_t words, int32_t total, int32_t count,
                          int32_t *sums, int32_t line)
{
    int32_t found[ROWS][8], t = 0;
    for (; t + ROWS <= count; t += ROWS) {
        differ(ROWS, a + (size_t)t * step, step, b, words, total, found);
        for (int r = 0; r < ROWS; r++)
            memcpy(sums + (size_t)(t + r) * line, found[r], sizeof found[r]);
    }
    for (; t < count; t++) {
        differ(1, a + (size_t)t * step, step, b, words, total, found);
        memcpy(sums + (size_t)t * line, found[0], sizeof found[0]);
    }
}

/* The sums of `count` rows, channel after channel from the one that it differs least from. */
static void tree_of_sums(const tf_conv *p, const uint64_t *rows, int32_t words, int32_t count, int32_t *sums, int32_t line)
{
    const tf_reuse *tree = &p->reuse;
    for (int32_t i = 0; i < p->out_channels; i++) {
        const int32_t channel = tree->order[i], parent = tree->parent[i];
        int32_t found[TF_TILE] = {0};
        for (int32_t e = tree->first[i]; e < tree->first[i + 1]; e++) {
            const uint64_t *at = rows + tree->place[e], mask = tree->mask[e], bits = tree->bits[e];
            for (int32_t t = 0; t < count; t++)
                found[t] += bits_of((at[(size_t)t * words] & mask) ^ bits);
        }
        for (int32_t t = 0; t < count; t++) {
            int32_t *sum = sums + (size_t)t * line;
            sum[channel] = tree->add[i] + (parent < 0 ? -2 * found[t] : sum[parent] - 4 * found[t]);
        }
    }
}

/* Where the kernel lies at an output pixel, and whether all of it is inside the image. */
typedef struct {
    int32_t image, top, left, inside;
} place;

static place place_of(const tf_conv *p, int32_t pixel)
{
    const int32_t plane = p->out_height * p->out_width, at = pixel % plane;
    place found = {pixel / plane, at / p->out_width * p->stride_h - p->pad_h, at % p->out_width * p->stride_w - p->pad_w, 0};
    found.inside = found.top >= 0 && found.top + (p->kernel_h - 1) * p->dilation_h < p->height && found.left >= 0 &&
                   found.left + (p->kernel_w - 1) * p->dilation_w < p->width;
    return found;
}

/* The words under the kernel at `at`; +1, which is no bit, beside the image. */
static void patch(const tf_conv *p, const uint64_t *packed, place at, int32_t per_tap, uint64_t *row)
{
    const int32_t width = p->kernel_w * per_tap;
    const uint64_t *image = packed + (size_t)at.image * p->height * p->width * per_tap;
    if (!at.inside)
        memset(row, 0, (size_t)p->kernel_h * width * sizeof *row);
    for (int32_t i = 0; i < p->kernel_h; i++, row += width) {
        const int32_t h = at.top + i * p->dilation_h;
        const uint64_t *line = image + (ptrdiff_t)h * p->width * per_tap;
        if (at.inside && p->dilation_w == 1) {
            for (int32_t k = 0; k < width; k++)
                row[k] = line[(size_t)at.left * per_tap + k];
            continue;
        }
        for (int32_t j = 0; j < p->kernel_w && h >= 0 && h < p->height; j++) {
            const int32_t w = at.left + j * p->dilation_w;
            if (w >= 0 && w < p->width)
                memcpy(row + (size_t)j * per_tap, line + (size_t)w * per_tap, (size_t)per_tap * sizeof *row);
        }
    }
}

/* Take off what padding of +1 added to the sums of one output pixel. */
static void without_border(const tf_conv *p, place at, int32_t *sums)
{
    const int16_t *tap = p->tap_sums;
    for (int32_t i = 0; i < p->kernel_h; i++) {
        const int32_t h = at.top + i * p->dilation_h;
        for (int32_t j = 0; j < p->kernel_w; j++, tap += p->out_channels) {
            const int32_t w = at.left + j * p->dilation_w;
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
        if (taps == 1 && p->stride_h == 1 && p->stride_w == 1 && !p->pad_h && !p->pad_w) {
            tile = packed + (size_t)pixel * per_tap; /* the patches are the input */
        } else {
            for (int32_t t = 0; t < count; t++)
                patch(p, packed, place_of(p, pixel + t), per_tap, rows + (size_t)t * words);
        }
        if (p->reuse.order)
            tree_of_sums(p, tile, words, count, sums, blocks * 8);
        for (int32_t block = 0; block < blocks && !p->reuse.order; block++)
            block_of_sums(tile, words, (const uint64_t *)p->weight.data + (size_t)block * words * 8, words,
                          p->channels * taps, count, sums + block * 8, blocks * 8);
        for (int32_t t = 0; t < count; t++) {
            int32_t *line = sums + (size_t)t * blocks * 8;
            if (p->tap_sums) {
                const place at = place_of(p, pixel + t);
                if (!at.inside)
                    without_border(p, at, line);
            }
            for (int32_t c = 0; p->out.start && c < p->out_channels; c++)
                line[c] += p->out.start[c];
            tf_write(&p->out, 0, line, p->out_channels, (char *)y + (size_t)(pixel + t) * p->out_channels * size);
        }
    }
}
