/* What only moves values about. */
#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define BLOCK 32
#define TURN 8 /* squares of so many values are turned in registers */

#if defined(__AVX2__)
/* 8 x 8 values of 4 bytes, rows to columns. */
static void turn_4(const int32_t *x, ptrdiff_t row_x, int32_t *y, ptrdiff_t row_y)
{
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++)
        a[i] = _mm256_loadu_si256((const __m256i *)(x + i * row_x));
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i *)(y + i * row_y), _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
        _mm256_storeu_si256((__m256i *)(y + (i + 4) * row_y), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
}

/* 8 x 8 bytes, rows to columns. */
static void turn_1(const int8_t *x, ptrdiff_t row_x, int8_t *y, ptrdiff_t row_y)
{
    __m128i a[8], b[4], c[4];
    for (int i = 0; i < 8; i++)
        a[i] = _mm_loadl_epi64((const __m128i *)(x + i * row_x));
    for (int i = 0; i < 4; i++)
        b[i] = _mm_unpacklo_epi8(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; i++) {
        c[i] = _mm_unpacklo_epi16(b[2 * i], b[2 * i + 1]);
        c[i + 2] = _mm_unpackhi_epi16(b[2 * i], b[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        const __m128i low = _mm_unpacklo_epi32(c[2 * i], c[2 * i + 1]), high = _mm_unpackhi_epi32(c[2 * i], c[2 * i + 1]);
        _mm_storel_epi64((__m128i *)(y + (4 * i) * row_y), low);
        _mm_storel_epi64((__m128i *)(y + (4 * i + 1) * row_y), _mm_unpackhi_epi64(low, low));
        _mm_storel_epi64((__m128i *)(y + (4 * i + 2) * row_y), high);
        _mm_storel_epi64((__m128i *)(y + (4 * i + 3) * row_y), _mm_unpackhi_epi64(high, high));
    }
}
#elif defined(__aarch64__) && defined(__ARM_NEON)
/* 8 x 8 values of 4 bytes, rows to columns, as four squares of 4 x 4. */
static void turn_4(const int32_t *x, ptrdiff_t row_x, int32_t *y, ptrdiff_t row_y)
{
    for (int r = 0; r < 8; r += 4)
        for (int c = 0; c < 8; c += 4) {
            int64x2_t a[4];
            for (int i = 0; i < 4; i += 2) {
                const int32x4_t p = vld1q_s32(x + (r + i) * row_x + c), q = vld1q_s32(x + (r + i + 1) * row_x + c);
                a[i] = vreinterpretq_s64_s32(vtrn1q_s32(p, q));
                a[i + 1] = vreinterpretq_s64_s32(vtrn2q_s32(p, q));
            }
            for (int i = 0; i < 2; i++) {
                vst1q_s32(y + (c + i) * row_y + r, vreinterpretq_s32_s64(vtrn1q_s64(a[i], a[i + 2])));
                vst1q_s32(y + (c + i + 2) * row_y + r, vreinterpretq_s32_s64(vtrn2q_s64(a[i], a[i + 2])));
            }
        }
}

/* 8 x 8 bytes, rows to columns. */
static void turn_1(const int8_t *x, ptrdiff_t row_x, int8_t *y, ptrdiff_t row_y)
{
    int8x8_t a[8];
    int16x4_t b[8];
    for (int i = 0; i < 8; i++)
        a[i] = vld1_s8(x + i * row_x);
    for (int i = 0; i < 8; i += 2) {
        b[i] = vreinterpret_s16_s8(vtrn1_s8(a[i], a[i + 1]));
        b[i + 1] = vreinterpret_s16_s8(vtrn2_s8(a[i], a[i + 1]));
    }
    for (int i = 0; i < 2; i++) { /* columns i, i + 2, i + 4, i + 6 */
        const int32x2_t p = vreinterpret_s32_s16(vtrn1_s16(b[i], b[i + 2]));
        const int32x2_t q = vreinterpret_s32_s16(vtrn1_s16(b[i + 4], b[i + 6]));
        const int32x2_t u = vreinterpret_s32_s16(vtrn2_s16(b[i], b[i + 2]));
        const int32x2_t v = vreinterpret_s32_s16(vtrn2_s16(b[i + 4], b[i + 6]));
        vst1_s8(y + i * row_y, vreinterpret_s8_s32(vtrn1_s32(p, q)));
        vst1_s8(y + (i + 2) * row_y, vreinterpret_s8_s32(vtrn1_s32(u, v)));
        vst1_s8(y + (i + 4) * row_y, vreinterpret_s8_s32(vtrn2_s32(p, q)));
        vst1_s8(y + (i + 6) * row_y, vreinterpret_s8_s32(vtrn2_s32(u, v)));
    }
}
#else
#define TURN_ONE(name, type)                                                                                           \
    static void name(const type *x, ptrdiff_t row_x, type *y, ptrdiff_t row_y)                                         \
    {                                                                                                                  \
        for (int r = 0; r < TURN; r++)                                                                                 \
            for (int c = 0; c < TURN; c++)                                                                             \
                y[c * row_y + r] = x[r * row_x + c];                                                                   \
    }
TURN_ONE(turn_4, int32_t)
TURN_ONE(turn_1, int8_t)
#endif

/* y[c][r] = x[r][c] for whole squares, in blocks that stay in the first cache; then what is left at two sides. */
#define TURNED(type, turn)                                                                                             \
    static void turned_##turn(int32_t rows, int32_t columns, const type *x, ptrdiff_t row_x, type *y, ptrdiff_t row_y) \
    {                                                                                                                  \
        const int32_t high = rows / TURN * TURN, wide = columns / TURN * TURN;                                         \
        for (int32_t r0 = 0; r0 < high; r0 += BLOCK)                                                                   \
            for (int32_t c = 0; c < wide; c += TURN)                                                                   \
                for (int32_t r = r0; r < high && r < r0 + BLOCK; r += TURN)                                            \
                    turn(x + r * row_x + c, row_x, y + c * row_y + r, row_y);                                          \
        for (int32_t r = 0; r < rows; r++)                                                                             \
            for (int32_t c = r < high ? wide : 0; c < columns; c++)                                                    \
                y[c * row_y + r] = x[r * row_x + c];                                                                   \
    }
TURNED(int32_t, turn_4)
TURNED(int8_t, turn_1)

/* rows x columns values of one type, at any steps, in blocks that stay in the first cache. */
#define PLANE(type)                                                                                                    \
    for (int32_t r0 = 0; r0 < rows; r0 += BLOCK)                                                                       \
        for (int32_t c0 = 0; c0 < columns; c0 += BLOCK)                                                                \
            for (int32_t r = r0; r < rows && r < r0 + BLOCK; r++) {                                                    \
                const type *from = (const type *)x + (ptrdiff_t)r * row_x;                                             \
                type *to = (type *)y + (ptrdiff_t)r * row_y;                                                           \
                for (int32_t c = c0; c < columns && c < c0 + BLOCK; c++)                                               \
                    to[(ptrdiff_t)c * step_y] = from[(ptrdiff_t)c * step_x];                                           \
            }

static void plane(int32_t bytes, int32_t rows, int32_t columns, int32_t row_x, int32_t step_x, int32_t row_y,
                  int32_t step_y, const void *x, void *y)
{
    if (step_x == 1 && step_y == 1) {
        for (int32_t r = 0; r < rows; r++)
            memcpy((char *)y + (ptrdiff_t)r * row_y * bytes, (const char *)x + (ptrdiff_t)r * row_x * bytes,
                   (size_t)columns * bytes);
    } else if (step_x == 1 && row_y == 1 && bytes == 4) {
        turned_turn_4(rows, columns, (const int32_t *)x, row_x, (int32_t *)y, step_y);
    } else if (step_x == 1 && row_y == 1 && bytes == 1) {
        turned_turn_1(rows, columns, (const int8_t *)x, row_x, (int8_t *)y, step_y);
    } else if (row_x == 1 && step_y == 1 && bytes == 4) {
        turned_turn_4(columns, rows, (const int32_t *)x, step_x, (int32_t *)y, row_y);
    } else if (row_x == 1 && step_y == 1 && bytes == 1) {
        turned_turn_1(columns, rows, (const int8_t *)x, step_x, (int8_t *)y, row_y);
    } else if (bytes == 1) {
        PLANE(int8_t)
    } else if (bytes == 4) {
        PLANE(int32_t)
    } else {
        PLANE(int64_t)
    }
}

/* Copy along a walk: axis by axis, from x at the steps a to y at the steps b; the last two axes as a plane. */
void tf_copy(int32_t bytes, const tf_walk *walk, const void *x, void *y)
{
    int32_t at[6] = {0}, last = walk->rank - 1, outer = last > 0 ? last - 1 : 0;
    const int32_t rows = last > 0 ? walk->shape[outer] : 1;
    const char *from = (const char *)x + (ptrdiff_t)walk->offset_a * bytes;
    char *to = (char *)y + (ptrdiff_t)walk->offset_b * bytes;
    for (;;) {
        int32_t axis = outer - 1;
        plane(bytes, rows, walk->shape[last], walk->a[outer], walk->a[last], walk->b[outer], walk->b[last], from, to);
        for (; axis >= 0; axis--) { /* the next plane, carrying over like an odometer */
            from += (ptrdiff_t)walk->a[axis] * bytes;
            to += (ptrdiff_t)walk->b[axis] * bytes;
            if (++at[axis] < walk->shape[axis])
                break;
            from -= (ptrdiff_t)walk->a[axis] * walk->shape[axis] * bytes;
            to -= (ptrdiff_t)walk->b[axis] * walk->shape[axis] * bytes;
            at[axis] = 0;
        }
        if (axis < 0)
            return;
    }
}

void tf_fill_i8(int32_t count, int32_t value, int8_t *y) { memset(y, value, (size_t)count); }

void tf_fill_f32(int32_t count, float value, float *y)
{
    for (int32_t i = 0; i < count; i++)
        y[i] = value;
}
