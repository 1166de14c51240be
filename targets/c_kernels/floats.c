/* What stays float, in plain loops that a compiler can vectorize without changing the order of additions. */
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

void tf_quantize(int32_t count, float inverse, int32_t zero, int32_t low, int32_t high, const float *x, int8_t *y)
{
    for (int32_t i = 0; i < count; i++) {
        const float scaled = x[i] * inverse;
        y[i] = (int8_t)(tf_round(scaled, low - zero, high - zero) + zero);
    }
}

void tf_dequantize(int32_t count, float scale, int32_t zero, const int8_t *x, float *y)
{
    for (int32_t i = 0; i < count; i++)
        y[i] = (float)(x[i] - zero) * scale;
}

static float half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 31, rest = half & 1023u;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | rest << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One weight as a float, by whatever format it has. */
static float weight_at(const tf_weight *w, int32_t row, int32_t k)
{
    const size_t at = (size_t)row * w->columns + k;
    int32_t code;
    if (w->format == TF_F32)
        return ((const float *)w->data)[at];
    if (w->format == TF_F16)
        return half_to_float(((const uint16_t *)w->data)[at]);
    if (w->format == TF_W8) {
        code = ((const int8_t *)w->data)[at];
    } else if (w->format == TF_SIGN) {
        const uint64_t *words = (const uint64_t *)w->data + (size_t)(row / 8) * ((w->columns + 63) / 64) * 8 + row % 8;
        code = 1 - 2 * (int32_t)(words[k / 64 * 8] >> (k % 64) & 1);
    } else {
        const int32_t bits = w->format == TF_W4 ? 4 : w->format == TF_W2 ? 2 : 1;
        const uint8_t *line = (const uint8_t *)w->data + (size_t)row * ((w->columns * bits + 7) / 8);
        code = (line[k * bits / 8] >> (k * bits % 8) & ((1 << bits) - 1)) + w->low;
    }
    return (float)code * w->scale[w->group ? row * (w->columns / w->group) + k / w->group : row];
}

static void patch(const tf_conv *p, const float *x, int32_t pixel, int32_t group, float *row)
{
    const int32_t per_group = p->channels / p->groups, plane = p->out_height * p->out_width;
    const int32_t top = pixel % plane / p->out_width * p->stride_h - p->pad_h;
    const int32_t left = pixel % p->out_width * p->stride_w - p->pad_w;
    const float *image = x + (size_t)(pixel / plane) * p->height * p->width * p->channels + group * per_group;
    for (int32_t i = 0; i < p->kernel_h; i++)
        for (int32_t j = 0; j < p->kernel_w; j++, row += per_group) {
            const int32_t h = top + i * p->dilation_h, w = left + j * p->dilation_w;
            if (h < 0 || h >= p->height || w < 0 || w >= p->width)
                memset(row, 0, (size_t)per_group * sizeof *row);
            else
                memcpy(row, image + ((size_t)h * p->width + w) * p->channels, (size_t)per_group * sizeof *row);
        }
}

/* Four rows times TF_WIDTH channels: each sum is made in the order of k. */
static void product(const float *rows, const float *w, int32_t depth, float sums[4][TF_WIDTH])
{
#if defined(__AVX2__) && defined(__FMA__)
    __m256 low[4], high[4];
    for (int r = 0; r < 4; r++)
        low[r] = high[r] = _mm256_setzero_ps();
    for (int32_t k = 0; k < depth; k++) {
        const __m256 u = _mm256_loadu_ps(w + (size_t)k * TF_WIDTH), v = _mm256_loadu_ps(w + (size_t)k * TF_WIDTH + 8);
        for (int r = 0; r < 4; r++) {
            const __m256 value = _mm256_set1_ps(rows[(size_t)r * depth + k]);
            low[r] = _mm256_fmadd_ps(value, u, low[r]);
            high[r] = _mm256_fmadd_ps(value, v, high[r]);
        }
    }
    for (int r = 0; r < 4; r++) {
        _mm256_storeu_ps(sums[r], low[r]);
        _mm256_storeu_ps(sums[r] + 8, high[r]);
    }
#else
    float acc[4][TF_WIDTH];
    memset(acc, 0, sizeof acc);
    for (int32_t k = 0; k < depth; k++) {
        const float *weight = w + (size_t)k * TF_WIDTH;
        for (int r = 0; r < 4; r++) {
            const float value = rows[(size_t)r * depth + k];
            for (int c = 0; c < TF_WIDTH; c++)
                acc[r][c] += value * weight[c];
        }
    }
    memcpy(sums, acc, sizeof acc);
#endif
}

/* Convolution, grouped or not; a linear layer is a kernel of 1 x 1 over an image of 1 x rows. Scratch: a chunk of
 * weights as floats, a tile of patches. */
void tf_conv_f32(const tf_conv *p, const float *x, float *y, int8_t *scratch)
{
    const int32_t depth = p->weight.columns, per_group = p->out_channels / p->groups;
    const int32_t pixels = p->batch * p->out_height * p->out_width;
    float *weights = (float *)scratch, *rows = weights + (size_t)TF_CHUNK * depth;
    for (int32_t g = 0; g < p->groups; g++)
        for (int32_t chunk = 0; chunk < per_group; chunk += TF_CHUNK) {
            const int32_t channels = per_group - chunk < TF_CHUNK ? per_group - chunk : TF_CHUNK;
            const int32_t first = g * per_group + chunk;
            for (int32_t c = 0; c < (channels + TF_WIDTH - 1) / TF_WIDTH * TF_WIDTH; c++)
                for (int32_t k = 0; k < depth; k++)
                    weights[((size_t)(c / TF_WIDTH) * depth + k) * TF_WIDTH + c % TF_WIDTH] =
                        c < channels ? weight_at(&p->weight, first + c, k) : 0.0f;
            for (int32_t pixel = 0; pixel < pixels; pixel += TF_TILE) {
                const int32_t count = pixels - pixel < TF_TILE ? pixels - pixel : TF_TILE;
                for (int32_t t = 0; t < count; t++)
                    patch(p, x, pixel + t, g, rows + (size_t)t * depth);
                for (int32_t t = 0; t < count; t += 4)
                    for (int32_t c = 0; c < channels; c += TF_WIDTH) {
                        float sums[4][TF_WIDTH];
                        product(rows + (size_t)t * depth, weights + (size_t)c * depth, depth, sums);
                        for (int32_t r = 0; r < 4 && t + r < count; r++)
                            for (int32_t i = 0; i < TF_WIDTH && c + i < channels; i++)
                                y[(size_t)(pixel + t + r) * p->out_channels + first + c + i] =
                                    p->out.bias ? sums[r][i] + p->out.bias[first + c + i] : sums[r][i];
                    }
            }
        }
}

void tf_depthwise_f32(const tf_conv *p, const float *x, float *y, int8_t *scratch)
{
    const int32_t channels = p->out_channels, taps = p->weight.columns;
    float *weights = (float *)scratch;
    for (int32_t c = 0; c < channels; c++)
        for (int32_t k = 0; k < taps; k++)
            weights[(size_t)k * channels + c] = weight_at(&p->weight, c, k);
    for (int32_t n = 0; n < p->batch; n++)
        for (int32_t oh = 0; oh < p->out_height; oh++)
            for (int32_t ow = 0; ow < p->out_width; ow++, y += channels) {
                for (int32_t c = 0; c < channels; c++)
                    y[c] = p->out.bias ? p->out.bias[c] : 0.0f;
                for (int32_t k = 0; k < taps; k++) {
                    const int32_t h = oh * p->stride_h - p->pad_h + k / p->kernel_w * p->dilation_h;
                    const int32_t w = ow * p->stride_w - p->pad_w + k % p->kernel_w * p->dilation_w;
                    const float *from = x + (((size_t)n * p->height + h) * p->width + w) * channels;
                    if (h < 0 || h >= p->height || w < 0 || w >= p->width)
                        continue;
                    for (int32_t c = 0; c < channels; c++)
                        y[c] += from[c] * weights[(size_t)k * channels + c];
                }
            }
}

/* batch times [rows, inner] x [inner, columns]; step_a and step_b: floats from one matrix to the next, 0 for the same.
 */
void tf_matmul_f32(int32_t batch, int32_t step_a, int32_t step_b, int32_t rows, int32_t inner, int32_t columns,
                   const float *a, const float *b, float *y)
{
    for (int32_t n = 0; n < batch; n++, a += step_a, b += step_b)
        for (int32_t r = 0; r < rows; r++, y += columns) {
            memset(y, 0, (size_t)columns * sizeof *y);
            for (int32_t k = 0; k < inner; k++) {
                const float value = a[(size_t)r * inner + k];
                const float *line = b + (size_t)k * columns;
                for (int32_t c = 0; c < columns; c++)
                    y[c] += value * line[c];
            }
        }
}

static float unary(int32_t kind, float x, float first, float second)
{
    switch (kind) {
    case TF_RELU: return x < 0.0f ? 0.0f : x;
    case TF_CLAMP: x = x < first ? first : x; return x > second ? second : x;
    case TF_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case TF_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case TF_SIGMOID: return 1.0f / (1.0f + expf(-x));
    case TF_TANH: return tanhf(x);
    case TF_SILU: return x / (1.0f + expf(-x));
    case TF_HARDSWISH: { float y = x + 3.0f; y = y < 0.0f ? 0.0f : y > 6.0f ? 6.0f : y; return x * y / 6.0f; }
    case TF_HARDSIGMOID: { float y = x + 3.0f; y = y < 0.0f ? 0.0f : y > 6.0f ? 6.0f : y; return y / 6.0f; }
    case TF_LEAKY_RELU: return x < 0.0f ? x * first : x;
    case TF_EXP: return expf(x);
    case TF_SQRT: return sqrtf(x);
    case TF_RSQRT: return 1.0f / sqrtf(x);
    case TF_NEG: return -x;
    case TF_ABS: return x < 0.0f ? -x : x;
    case TF_ERF: return erff(x);
    case TF_LOG: return logf(x);
    case TF_SCALE: return x * first;
    default: return x + first;
    }
}

void tf_unary_f32(int32_t kind, int32_t count, float first, float second, const float *x, float *y)
{
    for (int32_t i = 0; i < count; i++)
        y[i] = unary(kind, x[i], first, second);
}

static float binary(int32_t kind, float a, float b)
{
    return kind == TF_ADD ? a + b : kind == TF_SUB ? a - b : kind == TF_MUL ? a * b : a / b;
}

/* Element by element, y contiguous; a step of 0 repeats an operand. */
void tf_binary_f32(int32_t kind, const tf_walk *walk, const float *a, const float *b, float *y)
{
    int32_t at[6] = {0}, last = walk->rank - 1;
    for (;;) {
        int32_t axis = last - 1;
        for (int32_t i = 0; i < walk->shape[last]; i++)
            *y++ = binary(kind, a[(ptrdiff_t)i * walk->a[last]], b[(ptrdiff_t)i * walk->b[last]]);
        for (; axis >= 0; axis--) {
            a += walk->a[axis];
            b += walk->b[axis];
            if (++at[axis] < walk->shape[axis])
                break;
            a -= (ptrdiff_t)walk->a[axis] * walk->shape[axis];
            b -= (ptrdiff_t)walk->b[axis] * walk->shape[axis];
            at[axis] = 0;
        }
        if (axis < 0)
            return;
    }
}

void tf_reduce_f32(int32_t kind, int32_t outer, int32_t count, int32_t inner, const float *x, float *y)
{
    for (int32_t o = 0; o < outer; o++)
        for (int32_t i = 0; i < inner; i++) {
            const float *from = x + (size_t)o * count * inner + i;
            float found = kind == TF_MAX ? from[0] : 0.0f;
            for (int32_t k = 0; k < count; k++) {
                const float value = from[(size_t)k * inner];
                if (kind != TF_MAX)
                    found += value;
                else if (value > found)
                    found = value;
            }
            y[(size_t)o * inner + i] = kind == TF_MEAN ? found / (float)count : found;
        }
}

void tf_softmax_f32(int32_t outer, int32_t count, int32_t inner, const float *x, float *y)
{
    for (int32_t o = 0; o < outer; o++)
        for (int32_t i = 0; i < inner; i++) {
            const size_t first = (size_t)o * count * inner + i;
            float most = x[first], sum = 0.0f;
            for (int32_t k = 1; k < count; k++)
                most = x[first + (size_t)k * inner] > most ? x[first + (size_t)k * inner] : most;
            for (int32_t k = 0; k < count; k++)
                sum += y[first + (size_t)k * inner] = expf(x[first + (size_t)k * inner] - most);
            for (int32_t k = 0; k < count; k++)
                y[first + (size_t)k * inner] /= sum;
        }
}

void tf_layer_norm_f32(int32_t rows, int32_t count, float epsilon, const float *weight, const float *bias,
                       const float *x, float *y)
{
    for (int32_t r = 0; r < rows; r++, x += count, y += count) {
        float mean = 0.0f, square = 0.0f, factor;
        for (int32_t k = 0; k < count; k++)
            mean += x[k];
        mean /= (float)count;
        for (int32_t k = 0; k < count; k++)
            square += (x[k] - mean) * (x[k] - mean);
        factor = 1.0f / sqrtf(square / (float)count + epsilon);
        for (int32_t k = 0; k < count; k++) {
            float value = (x[k] - mean) * factor;
            value = weight ? value * weight[k] : value;
            y[k] = bias ? value + bias[k] : value;
        }
    }
}

static void pool(const tf_pool *p, const float *x, float *y, int average)
{
    for (int32_t n = 0; n < p->batch; n++)
        for (int32_t oh = 0; oh < p->out_height; oh++)
            for (int32_t ow = 0; ow < p->out_width; ow++, y += p->channels) {
                const int32_t top = oh * p->stride_h - p->pad_h, left = ow * p->stride_w - p->pad_w;
                int32_t inside = 0, bottom = top + p->kernel_h, right = left + p->kernel_w;
                for (int32_t c = 0; c < p->channels; c++)
                    y[c] = average ? 0.0f : -INFINITY;
                for (int32_t k = 0; k < p->kernel_h * p->kernel_w; k++) {
                    const int32_t h = top + k / p->kernel_w * p->dilation_h, w = left + k % p->kernel_w * p->dilation_w;
                    const float *from = x + (((size_t)n * p->height + h) * p->width + w) * p->channels;
                    if (h < 0 || h >= p->height || w < 0 || w >= p->width)
                        continue;
                    inside++;
                    for (int32_t c = 0; c < p->channels; c++)
                        y[c] = average ? y[c] + from[c] : from[c] > y[c] ? from[c] : y[c];
                }
                if (average) { /* a window that ceil_mode lets hang over counts up to the padding only */
                    bottom = bottom < p->height + p->pad_h ? bottom : p->height + p->pad_h;
                    right = right < p->width + p->pad_w ? right : p->width + p->pad_w;
                    const int32_t whole = (bottom - top) * (right - left);
                    const float divisor = (float)(p->divisor ? p->divisor : p->count_padding ? whole : inside);
                    for (int32_t c = 0; c < p->channels; c++)
                        y[c] /= divisor;
                }
            }
}

void tf_max_pool_f32(const tf_pool *p, const float *x, float *y) { pool(p, x, y, 0); }

void tf_avg_pool_f32(const tf_pool *p, const float *x, float *y) { pool(p, x, y, 1); }

void tf_embedding_f32(const tf_weight *w, int32_t count, const int64_t *ids, float *y)
{
    for (int32_t i = 0; i < count; i++)
        for (int32_t k = 0; k < w->columns; k++)
            *y++ = weight_at(w, ids[i] < 0 || ids[i] >= w->rows ? 0 : (int32_t)ids[i], k);
}

void tf_cast_i64_f32(int32_t count, const int64_t *x, float *y)
{
    for (int32_t i = 0; i < count; i++)
        y[i] = (float)x[i];
}
