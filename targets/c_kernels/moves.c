/* What only moves values about. */
#include <string.h>

#include "kernels.h"

#define BLOCK 32

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
