/* The product of gathered rows with the weight of a linear layer, as it lies. A library makes a
   kernel for each number of rows, which is another in every call. Counterpart of
   `RowOps.linears`. */

#include "tiles.h"

#define BAND 128 /* rows that a thread takes at a time */

/* out = weight @ packed rows from `begin` to `end`; `far` if no cache has the weight yet. */
static void multiply_rows(const number *weight, int64_t outputs, int64_t inputs, int far,
                          const number *packed, int64_t begin, int64_t end, number *out) {
    for (int64_t c = 0; c < outputs; c += PAIR)
        for (int64_t first = begin; first < end; first += PAIR) {
            const number *own = weight + c * inputs;
            ALIGNED Sums sums;
            multiply(own, own + SIDE * inputs, inputs, far && first == begin ? PAIR * inputs : 0,
                     packed + first * inputs, packed + second_panel(first, end) * inputs, inputs, 0,
                     sums);
            write_pair(sums, first, end, c, outputs, 0, 0, out);
        }
}

/* out [rows, outputs] = x @ weight.T, and the same of a second weight unless that is null.
   `scratch` takes packed rows; `inputs` and `outputs` are multiples of 32. A thread takes rows, not
   outputs: what it packs stays in its cache. */
void linear(const number *x, int64_t rows, const number *weight, const number *second,
            number *scratch, number *out, number *second_out, int64_t inputs, int64_t outputs) {
    int64_t threads = omp_get_max_threads(), tasks = parts_of(rows, threads * BAND) * threads;
    int64_t size = parts_of(rows, tasks * PAIR) * PAIR;
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (int64_t begin = 0; begin < rows; begin += size) {
            int64_t end = least(begin + size, rows), far = begin < threads * size;
            for (int64_t first = begin; first < end; first += SIDE)
                pack_rows(x, inputs, 0, first, rows, inputs, scratch + first * inputs);
            multiply_rows(weight, outputs, inputs, far, scratch, begin, end, out);
            if (second)
                multiply_rows(second, outputs, inputs, far, scratch, begin, end, second_out);
        }
        tiles_end();
    }
}
