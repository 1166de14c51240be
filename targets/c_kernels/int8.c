/* Layers on int8 codes: exact integer sums, one rounding. */
#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

static int32_t padded(int32_t count) { return (count + TF_PAD - 1) / TF_PAD * TF_PAD; }

/* Rows first .. first + count of packed codes, as int8, `stride` bytes apart; what is behind a row becomes zero. */
void tf_expand_codes(const tf_weight *w, int32_t first, int32_t count, int32_t stride, int8_t *rows)
{
    const int32_t bits = w->format == TF_W4 ? 4 : w->format == TF_W2 ? 2 : 1;
    const int32_t line = (w->columns * bits + 7) / 8, words = (w->columns + 63) / 64;
    for (int32_t r = 0; r < count; r++) {
        int8_t *row = rows + (size_t)r * stride;
        const int32_t at = first + r;
        if (w->format == TF_W8) {
            memcpy(row, (const int8_t *)w->data + (size_t)at * w->columns, (size_t)w->columns);
        } else if (w->format == TF_SIGN) {
            const uint64_t *block = (const uint64_t *)w->data + (size_t)(at / 8) * words * 8 + at % 8;
            for (int32_t k = 0; k < w->columns; k++)
                row[k] = (int8_t)(1 - 2 * (int32_t)(block[k / 64 * 8] >> (k % 64) & 1));
        } else {
            const uint8_t *line_of = (const uint8_t *)w->data + (size_t)at * line;
            for (int32_t k = 0; k < w->columns; k++)
                row[k] = (int8_t)((line_of[k * bits / 8] >> (k * bits % 8) & ((1 << bits) - 1)) + w->low);
        }
        memset(row + w->columns, 0, (size_t)(stride - w->columns));
    }
}

/* Sums of `count` neighbouring channels from `first` on become codes or floats at y. */
void tf_write(const tf_output *out, int32_t first, const int32_t *sums, int32_t count, void *y)
{
    const float *factor = out->factor + first;
    int32_t c = 0;
    if (!out->codes) {
        float *restrict values = (float *)y;
        const float *bias = out->bias ? out->bias + first : NULL;
        if (!bias)
            for (; c < count; c++)
                values[c] = (float)sums[c] * factor[c];
        for (; c < count; c++)
            values[c] = (float)sums[c] * factor[c] + bias[c];
        return;
    }
#if defined(__AVX2__)
    {
        const __m256 low = _mm256_set1_ps((float)(out->low - out->zero));
        const __m256 high = _mm256_set1_ps((float)(out->high - out->zero));
        const __m256i zero = _mm256_set1_epi32(out->zero);
        for (; c + 8 <= count; c += 8) {
            __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(sums + c))),
                                     _mm256_loadu_ps(factor + c));
            __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high)), zero);
            __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
            _mm_storel_epi64((__m128i *)((int8_t *)y + c), _mm_packs_epi16(half, half));
        }
    }
#elif defined(__aarch64__) && defined(__ARM_NEON)
    {
        const float32x4_t low = vdupq_n_f32((float)(out->low - out->zero));
        const float32x4_t high = vdupq_n_f32((float)(out->high - out->zero));
        const int32x4_t zero = vdupq_n_s32(out->zero);
        for (; c + 8 <= count; c += 8) {
            float32x4_t u = vmulq_f32(vcvtq_f32_s32(vld1q_s32(sums + c)), vld1q_f32(factor + c));
            float32x4_t v = vmulq_f32(vcvtq_f32_s32(vld1q_s32(sums + c + 4)), vld1q_f32(factor + c + 4));
            int32x4_t p = vaddq_s32(vcvtnq_s32_f32(vminnmq_f32(vmaxnmq_f32(u, low), high)), zero);
            int32x4_t q = vaddq_s32(vcvtnq_s32_f32(vminnmq_f32(vmaxnmq_f32(v, low), high)), zero);
            vst1_s8((int8_t *)y + c, vmovn_s16(vcombine_s16(vmovn_s32(p), vmovn_s32(q))));
        }
    }
#endif
    for (; c < count; c++)
        ((int8_t *)y)[c] =
            (int8_t)(tf_round((float)sums[c] * factor[c], out->low - out->zero, out->high - out->zero) + out->zero);
}

/* Two rows of codes times four rows of weights, all of `length` codes, a multiple of TF_PAD. */
static void dots(const int8_t *x, int32_t step_x, const int8_t *w, int32_t step_w, int32_t length, int32_t sums[2][4])
{
#if defined(__AVX2__)
    __m256i a[2][4];
    for (int i = 0; i < 4; i++)
        a[0][i] = a[1][i] = _mm256_setzero_si256();
    for (int32_t k = 0; k < length; k += 16) {
        const __m256i x0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + k)));
        const __m256i x1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + step_x + k)));
        for (int i = 0; i < 4; i++) {
            const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + (size_t)i * step_w + k)));
            a[0][i] = _mm256_add_epi32(a[0][i], _mm256_madd_epi16(x0, v));
            a[1][i] = _mm256_add_epi32(a[1][i], _mm256_madd_epi16(x1, v));
        }
    }
    for (int r = 0; r < 2; r++) {
        const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a[r][0], a[r][1]),
                                                _mm256_hadd_epi32(a[r][2], a[r][3]));
        _mm_storeu_si128((__m128i *)sums[r],
                         _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
    }
#elif defined(__aarch64__) && defined(__ARM_NEON)
    int32x4_t a[2][4];
    for (int i = 0; i < 4; i++)
        a[0][i] = a[1][i] = vdupq_n_s32(0);
    for (int32_t k = 0; k < length; k += 16) {
        const int8x16_t x0 = vld1q_s8(x + k), x1 = vld1q_s8(x + step_x + k);
        for (int i = 0; i < 4; i++) {
            const int8x16_t v = vld1q_s8(w + (size_t)i * step_w + k);
#if defined(__ARM_FEATURE_DOTPROD)
            a[0][i] = vdotq_s32(a[0][i], x0, v);
            a[1][i] = vdotq_s32(a[1][i], x1, v);
#else
            a[0][i] = vpadalq_s16(a[0][i], vmull_s8(vget_low_s8(x0), vget_low_s8(v)));
            a[0][i] = vpadalq_s16(a[0][i], vmull_high_s8(x0, v));
            a[1][i] = vpadalq_s16(a[1][i], vmull_s8(vget_low_s8(x1), vget_low_s8(v)));
            a[1][i] = vpadalq_s16(a[1][i], vmull_high_s8(x1, v));
#endif
        }
    }
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < 4; i++)
            sums[r][i] = vaddvq_s32(a[r][i]);
#else
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < 4; i++) {
            const int8_t *left = x + (size_t)r * step_x, *right = w + (size_t)i * step_w;
            int32_t sum = 0;
            for (int32_t k = 0; k < length; k++)
                sum += (int32_t)left[k] * right[k];
            sums[r][i] = sum;
        }
#endif
}

/* The inputs under the kernel at output pixel `pixel`, channels of one group, padding as the zero point. */
static void patch(const tf_conv *p, const int8_t *x, int32_t pixel, int32_t group, int32_t stride, int8_t *row)
{
    const int32_t per_group = p->channels / p->groups, plane = p->out_height * p->out_width;
    const int32_t top = pixel % plane / p->out_width * p->stride_h - p->pad_h;
    const int32_t left = pixel % p->out_width * p->stride_w - p->pad_w;
    const int8_t *image = x + (size_t)(pixel / plane) * p->height * p->width * p->channels + group * per_group;
    int8_t *to = row;
    for (int32_t i = 0; i < p->kernel_h; i++) {
        const int32_t h = top + i * p->dilation_h;
        for (int32_t j = 0; j < p->kernel_w; j++, to += per_group) {
            const int32_t w = left + j * p->dilation_w;
            if (h < 0 || h >= p->height || w < 0 || w >= p->width)
                memset(to, p->zero, (size_t)per_group);
            else
                memcpy(to, image + ((size_t)h * p->width + w) * p->channels, (size_t)per_group);
        }
    }
    memset(to, 0, (size_t)(row + stride - to));
}

/* Convolution of codes, grouped or not; a linear layer is a kernel of 1 x 1 over an image of 1 x rows. Scratch: a tile
 * of patches, a chunk of weights (where they are packed or too few to fill a tile), a tile of sums. */
void tf_conv_i8(const tf_conv *p, const int8_t *x, void *y, int8_t *scratch)
{
    const int32_t depth = p->weight.columns, stride = padded(depth), per_group = p->out_channels / p->groups;
    const int32_t pixels = p->batch * p->out_height * p->out_width, size = p->out.codes ? 1 : (int32_t)sizeof(float);
    int8_t *rows = scratch, *unpacked = rows + (size_t)TF_TILE * stride;
    int32_t *sums = (int32_t *)(unpacked + (size_t)TF_CHUNK * stride);
    for (int32_t g = 0; g < p->groups; g++)
        for (int32_t chunk = 0; chunk < per_group; chunk += TF_CHUNK) {
            const int32_t channels = per_group - chunk < TF_CHUNK ? per_group - chunk : TF_CHUNK;
            const int32_t first = g * per_group + chunk, blocks = (channels + 3) / 4 * 4;
            tf_expand_codes(&p->weight, first, channels, stride, unpacked);
            memset(unpacked + (size_t)channels * stride, 0, (size_t)(blocks - channels) * stride);
            for (int32_t pixel = 0; pixel < pixels; pixel += TF_TILE) {
                const int32_t count = pixels - pixel < TF_TILE ? pixels - pixel : TF_TILE;
                for (int32_t t = 0; t < count; t++)
                    patch(p, x, pixel + t, g, stride, rows + (size_t)t * stride);
                if (count % 2)
                    memset(rows + (size_t)count * stride, 0, (size_t)stride);
                for (int32_t c = 0; c < channels; c += 4)
                    for (int32_t t = 0; t < count; t += 2) {
                        int32_t found[2][4];
                        dots(rows + (size_t)t * stride, stride, unpacked + (size_t)c * stride, stride, stride, found);
                        memcpy(sums + (size_t)t * TF_CHUNK + c, found[0], sizeof found[0]);
                        memcpy(sums + (size_t)(t + 1) * TF_CHUNK + c, found[1], sizeof found[1]);
                    }
                for (int32_t t = 0; t < count; t++) {
                    int32_t *line = sums + (size_t)t * TF_CHUNK;
                    if (p->out.start)
                        for (int32_t c = 0; c < channels; c++)
                            line[c] += p->out.start[first + c];
                    tf_write(&p->out, first, line, channels,
                             (char *)y + ((size_t)(pixel + t) * p->out_channels + first) * size);
                }
            }
        }
}

/* One input channel per output channel. Padding counts as real zero, so it is left out. */
void tf_depthwise_i8(const tf_conv *p, const int8_t *x, void *y, int8_t *scratch)
{
    const int32_t channels = p->out_channels, taps = p->weight.columns, size = p->out.codes ? 1 : (int32_t)sizeof(float);
    int32_t *sums = (int32_t *)scratch;
    int16_t *weights = (int16_t *)(sums + channels);
    int8_t *row = (int8_t *)(weights + (size_t)taps * channels);
    for (int32_t c = 0; c < channels; c++) {
        tf_expand_codes(&p->weight, c, 1, taps, row);
        for (int32_t k = 0; k < taps; k++)
            weights[(size_t)k * channels + c] = row[k];
    }
    for (int32_t n = 0; n < p->batch; n++)
        for (int32_t oh = 0; oh < p->out_height; oh++)
            for (int32_t ow = 0; ow < p->out_width; ow++) {
                for (int32_t c = 0; c < channels; c++)
                    sums[c] = p->out.start ? p->out.start[c] : 0;
                for (int32_t k = 0; k < taps; k++) {
                    const int32_t h = oh * p->stride_h - p->pad_h + k / p->kernel_w * p->dilation_h;
                    const int32_t w = ow * p->stride_w - p->pad_w + k % p->kernel_w * p->dilation_w;
                    const int8_t *from = x + (((size_t)n * p->height + h) * p->width + w) * channels;
                    const int16_t *weight = weights + (size_t)k * channels;
                    if (h < 0 || h >= p->height || w < 0 || w >= p->width)
                        continue;
                    for (int32_t c = 0; c < channels; c++)
                        sums[c] += (int32_t)(int16_t)(from[c] - p->zero) * weight[c];
                }
                tf_write(&p->out, 0, sums, channels,
                         (char *)y + (((size_t)n * p->out_height + oh) * p->out_width + ow) * channels * size);
            }
}

/* Codes of different scales: multipliers of 21 bits and one rounding shift, halves up. */
void tf_add_i8(const tf_sum *p, int32_t count, const int8_t *a, const int8_t *b, int8_t *y)
{
    const int64_t half = (int64_t)1 << (p->shift - 1);
    if (p->shift <= 30) { /* the sum stays below 2^31: 2 * 2^21 * 255 + 2^29 */
        const int32_t start = (int32_t)half - p->multiplier_a * p->zero_a - p->multiplier_b * p->zero_b;
        for (int32_t i = 0; i < count; i++) {
            int32_t sum = ((start + p->multiplier_a * a[i] + p->multiplier_b * b[i]) >> p->shift) + p->zero;
            sum = sum < p->low ? p->low : sum;
            y[i] = (int8_t)(sum > p->high ? p->high : sum);
        }
        return;
    }
    for (int32_t i = 0; i < count; i++) {
        int64_t sum = half + (int64_t)p->multiplier_a * (a[i] - p->zero_a) + (int64_t)p->multiplier_b * (b[i] - p->zero_b);
        sum = (sum >> p->shift) + p->zero;
        sum = sum < p->low ? p->low : sum;
        y[i] = (int8_t)(sum > p->high ? p->high : sum);
    }
}

/* The mean over the middle one of three axes: out->factor[0] holds scale / (output scale * count). */
void tf_mean_i8(int32_t outer, int32_t count, int32_t inner, int32_t zero_x, const tf_output *out, const int8_t *x,
                int8_t *y)
{
    for (int32_t o = 0; o < outer; o++)
        for (int32_t i = 0; i < inner; i++) {
            const int8_t *from = x + (size_t)o * count * inner + i;
            int32_t sum = -zero_x * count;
            for (int32_t k = 0; k < count; k++)
                sum += from[(size_t)k * inner];
            y[(size_t)o * inner + i] =
                (int8_t)(tf_round((float)sum * out->factor[0], out->low - out->zero, out->high - out->zero) + out->zero);
        }
}

/* The largest code under the window; padding counts for nothing. */
void tf_max_pool_i8(const tf_pool *p, const int8_t *x, int8_t *y)
{
    for (int32_t n = 0; n < p->batch; n++)
        for (int32_t oh = 0; oh < p->out_height; oh++)
            for (int32_t ow = 0; ow < p->out_width; ow++) {
                int8_t *to = y + (((size_t)n * p->out_height + oh) * p->out_width + ow) * p->channels;
                memset(to, -128, (size_t)p->channels);
                for (int32_t k = 0; k < p->kernel_h * p->kernel_w; k++) {
                    const int32_t h = oh * p->stride_h - p->pad_h + k / p->kernel_w * p->dilation_h;
                    const int32_t w = ow * p->stride_w - p->pad_w + k % p->kernel_w * p->dilation_w;
                    const int8_t *from = x + (((size_t)n * p->height + h) * p->width + w) * p->channels;
                    if (h < 0 || h >= p->height || w < 0 || w >= p->width)
                        continue;
                    for (int32_t c = 0; c < p->channels; c++)
                        to[c] = from[c] > to[c] ? from[c] : to[c];
                }
            }
}
