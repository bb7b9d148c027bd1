/* The product of gathered rows with the weight of a linear layer, as it lies. A library makes a
   kernel for each number of rows, which is another in every call. Counterpart of `RowOps.linear`. */

#include "tiles.h"

/* out [rows, outputs] = x @ weight.T. `scratch` takes CHUNK rows packed; `inputs` and `outputs` are
   multiples of 32. */
void linear(const number *x, int64_t rows, const number *weight, number *scratch, number *out,
            int64_t inputs, int64_t outputs) {
#pragma omp parallel
    {
        tiles_begin();
        for (int64_t begin = 0; begin < rows; begin += CHUNK) {
            int64_t count = least(CHUNK, rows - begin);
#pragma omp for schedule(dynamic)
            for (int64_t first = 0; first < count; first += SIDE)
                pack_rows(x + begin * inputs, inputs, 0, first, count, inputs,
                          scratch + first * inputs);
            multiply_all(weight, outputs, inputs, scratch, count, 0, 0, out + begin * outputs);
        }
        tiles_end();
    }
}
