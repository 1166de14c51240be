/* What only moves values about. */
#include <string.h>

#include "kernels.h"

/* Copy along a walk: axis by axis, from x at the steps a to y at the steps b. */
void tf_copy(int32_t bytes, const tf_walk *walk, const void *x, void *y)
{
    int32_t at[6] = {0}, last = walk->rank - 1;
    const char *from = (const char *)x + (ptrdiff_t)walk->offset_a * bytes;
    char *to = (char *)y + (ptrdiff_t)walk->offset_b * bytes;
    const int32_t run = walk->shape[last];
    const int whole = walk->a[last] == 1 && walk->b[last] == 1;
    for (;;) {
        if (whole) {
            memcpy(to, from, (size_t)run * bytes);
        } else if (bytes == 1) {
            for (int32_t i = 0; i < run; i++)
                to[(ptrdiff_t)i * walk->b[last]] = from[(ptrdiff_t)i * walk->a[last]];
        } else {
            for (int32_t i = 0; i < run; i++)
                memcpy(to + (ptrdiff_t)i * walk->b[last] * bytes, from + (ptrdiff_t)i * walk->a[last] * bytes,
                       (size_t)bytes);
        }
        int32_t axis = last - 1;
        for (; axis >= 0; axis--) { /* the next row, carrying over like an odometer */
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
