/* The kernels that a generated model calls: types, structures and prototypes.
 *
 * Images lie in memory as N H W C, everything else as its shape says, last axis fastest. Codes are int8; a code q
 * stands for (q - zero point) * scale. Every kernel of codes computes an exact integer sum and rounds it once, half to
 * even, so that the same input gives the same codes on every processor.
 */
#ifndef TF_KERNELS_H
#define TF_KERNELS_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__FAST_MATH__)
#error "the roundings of this code are exact: compile it without -ffast-math"
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float arithmetic has to round to float: on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif

#define TF_TILE 16   /* output pixels (rows of a matrix) that are computed together */
#define TF_CHUNK 32  /* output channels whose packed weights are unpacked together */
#define TF_WIDTH 16  /* output channels of one tile of the float kernels */
#define TF_PAD 32    /* rows of codes are padded to a multiple of this, with zeros */

/* How a weight lies in memory, one row per output channel. */
enum tf_format {
    TF_W8,   /* int8 codes */
    TF_W4,   /* codes of 4, 2 or 1 bits, less `low`, from the lowest bits of a byte on; rows start at whole bytes */
    TF_W2,
    TF_W1,
    TF_SIGN, /* -1 is bit 1, +1 bit 0: uint64 words, 8 rows side by side; see binary.c */
    TF_F32,
    TF_F16
};

typedef struct {
    int32_t format, rows, columns; /* columns: weights of a row */
    int32_t low;                   /* TF_W4, TF_W2, TF_W1: the least code */
    const void *data;
    const float *scale;            /* float layers on codes: one per row, or per group of a row; else null */
    int32_t group;                 /* weights that share a scale; 0: the whole row */
} tf_weight;

/* What a layer does with its integer sums: y = sum * factor [+ bias], and to codes where `codes` is 1. */
typedef struct {
    const int32_t *start;  /* per channel: what the sum starts at (bias, zero points); null: 0 */
    const float *factor;   /* per channel */
    const float *bias;     /* per channel, added after the factor; null: none */
    int32_t codes, zero, low, high;
} tf_output;

/* Output channels of a binary layer computed from one another, in `order`: the sum of `parent` (-1: none), plus `add`,
 * less what the entries first[i] .. first[i + 1] count: words of the input, under a mask, against masked signs. */
typedef struct {
    const int32_t *order, *parent, *first, *add, *place;
    const uint64_t *mask, *bits;
} tf_reuse;

typedef struct {
    int32_t batch, height, width, channels;         /* of the input */
    int32_t out_height, out_width, out_channels;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
    int32_t zero;                                   /* the input's zero point; what padding holds */
    tf_weight weight;                               /* columns in the order kernel_h, kernel_w, channels / groups */
    const int16_t *tap_sums;                        /* binary layers: per channel and tap, the sum of its weights */
    tf_reuse reuse;                                 /* binary layers; nulls: every channel from its own words */
    tf_output out;
} tf_conv;

typedef struct {
    int32_t batch, height, width, channels, out_height, out_width;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int32_t count_padding, divisor; /* averages: padding counts; divisor: 0, or what sums are divided by */
} tf_pool;

typedef struct {
    int32_t zero_a, zero_b, multiplier_a, multiplier_b, shift, zero, low, high;
} tf_sum;

/* A walk over up to 6 axes: shape, and for each operand the step of every axis in elements. */
typedef struct {
    int32_t rank, shape[6], a[6], b[6];
    int32_t offset_a, offset_b;
} tf_walk;

enum tf_unary { TF_RELU, TF_CLAMP, TF_GELU, TF_GELU_TANH, TF_SIGMOID, TF_TANH, TF_SILU, TF_HARDSWISH, TF_HARDSIGMOID,
                TF_LEAKY_RELU, TF_EXP, TF_SQRT, TF_RSQRT, TF_NEG, TF_ABS, TF_ERF, TF_LOG, TF_SCALE, TF_OFFSET };
enum tf_binary { TF_ADD, TF_SUB, TF_MUL, TF_DIV };
enum tf_reduce { TF_SUM, TF_MEAN, TF_MAX };

/* round(x), halves to the even neighbour, in [low, high]; what is not a number gives low. */
static inline int32_t tf_round(float x, int32_t low, int32_t high)
{
    int32_t whole;
    float rest;
    if (!(x > (float)low))
        return low;
    if (x >= (float)high)
        return high;
    whole = (int32_t)x;        /* toward zero */
    rest = x - (float)whole;   /* exact */
    if (rest > 0.5f || (rest == 0.5f && (whole & 1)))
        whole++;
    else if (rest < -0.5f || (rest == -0.5f && (whole & 1)))
        whole--;
    return whole;
}

/* int8.c: layers on codes. `scratch` is TF_SCRATCH bytes of the model's own. */
void tf_expand_codes(const tf_weight *w, int32_t first, int32_t count, int32_t stride, int8_t *rows);
void tf_write(const tf_output *out, int32_t first, const int32_t *sums, int32_t count, void *y);
void tf_conv_i8(const tf_conv *p, const int8_t *x, void *y, int8_t *scratch);
void tf_depthwise_i8(const tf_conv *p, const int8_t *x, void *y, int8_t *scratch);
void tf_add_i8(const tf_sum *p, int32_t count, const int8_t *a, const int8_t *b, int8_t *y);
void tf_mean_i8(int32_t outer, int32_t count, int32_t inner, int32_t zero_x, const tf_output *out, const int8_t *x,
                int8_t *y);
void tf_max_pool_i8(const tf_pool *p, const int8_t *x, int8_t *y);

/* binary.c: layers whose weights are -1 and +1. */
void tf_conv_w1a1(const tf_conv *p, const int8_t *x, void *y, int8_t *scratch);
void tf_sign_i8(int32_t count, float threshold, int32_t equal, const float *x, int8_t *y);

/* floats.c: what stays float; these may call the mathematics library. */
void tf_quantize(int32_t count, float inverse, int32_t zero, int32_t low, int32_t high, const float *x, int8_t *y);
void tf_dequantize(int32_t count, float scale, int32_t zero, const int8_t *x, float *y);
void tf_conv_f32(const tf_conv *p, const float *x, float *y, int8_t *scratch);
void tf_depthwise_f32(const tf_conv *p, const float *x, float *y, int8_t *scratch);
void tf_matmul_f32(int32_t batch, int32_t step_a, int32_t step_b, int32_t rows, int32_t inner, int32_t columns,
                   const float *a, const float *b, float *y);
void tf_unary_f32(int32_t kind, int32_t count, float first, float second, const float *x, float *y);
void tf_binary_f32(int32_t kind, const tf_walk *walk, const float *a, const float *b, float *y);
void tf_reduce_f32(int32_t kind, int32_t outer, int32_t count, int32_t inner, const float *x, float *y);
void tf_softmax_f32(int32_t outer, int32_t count, int32_t inner, const float *x, float *y);
void tf_layer_norm_f32(int32_t rows, int32_t count, float epsilon, const float *weight, const float *bias,
                       const float *x, float *y);
void tf_max_pool_f32(const tf_pool *p, const float *x, float *y);
void tf_avg_pool_f32(const tf_pool *p, const float *x, float *y);
void tf_embedding_f32(const tf_weight *w, int32_t count, const int64_t *ids, float *y);
void tf_cast_i64_f32(int32_t count, const int64_t *x, float *y);

/* moves.c: what only moves values; `bytes` is the size of one. */
void tf_copy(int32_t bytes, const tf_walk *walk, const void *x, void *y);
void tf_fill_i8(int32_t count, int32_t value, int8_t *y);
void tf_fill_f32(int32_t count, float value, float *y);

#endif
