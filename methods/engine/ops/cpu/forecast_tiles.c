/* `forecast.c` for bfloat16. Here the maps are what is packed, once, and rows are read as they lie,
   so that sums come out as the stream lies. */

#include "tiles.h"

#define DEPTH 1024 /* inputs that are gathered at a time */
/* MAX_RANK comes from build.py */

/* hidden [PAIR, rank] = act(down(x[index])), of some inputs after others. */
static void narrow(const number *x, const int64_t *index, int64_t count, const number *down,
                   const float *bias, int64_t width, int64_t rank, int with_silu, number *hidden) {
    ALIGNED number rows[PAIR * DEPTH];
    ALIGNED Sums sums[MAX_RANK / PAIR];
    for (int64_t k = 0; k < width; k += DEPTH) {
        int64_t depth = least(DEPTH, width - k);
        for (int64_t i = 0; i < PAIR; i++) /* a short tile repeats its last row */
            memcpy(rows + i * depth, x + index[least(i, count - 1)] * width + k,
                   depth * sizeof(number));
        for (int64_t r = 0; r < rank; r += PAIR) {
            const number *panel = down + r * width + k * SIDE;
            multiply(rows, rows + SIDE * depth, depth, 0, panel, panel + SIDE * width, depth, k > 0,
                     sums[r / PAIR]);
        }
    }
    for (int64_t r = 0; r < rank; r += SIDE)
        for (int64_t i = 0; i < PAIR; i++) {
            float *sum = sums[r / PAIR][i / SIDE][r / SIDE % 2][i % SIDE];
            for (int j = 0; bias && j < SIDE; j++) sum[j] += bias[r + j];
            for (int j = 0; with_silu && j < SIDE; j++) sum[j] = silu(sum[j]);
            for (int j = 0; j < SIDE; j++) hidden[i * rank + r + j] = to_number(sum[j]);
        }
}

/* into[index] = residual[index] + up(act(down(x[index]))) in buffers of `held` rows. `width` and
   `rank` are multiples of 32, rank at most MAX_RANK; maps lie in panels of SIDE outputs, as `pack`
   makes them; biases may be null. */
int forecast(const number *x, const number *residual, number *into, int64_t held,
             const int64_t *index, int64_t count, const number *down, const float *down_bias,
             const number *up, const float *bias, int64_t width, int64_t rank, int64_t with_silu) {
    if (outside(index, count, held)) return 1;
#pragma omp parallel if (count > SIDE)
    {
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < count; first += PAIR) {
            ALIGNED number hidden[PAIR * MAX_RANK];
            int64_t own = least(PAIR, count - first);
            narrow(x, index + first, own, down, down_bias, width, rank, with_silu, hidden);
            for (int64_t c = 0; c < width; c += PAIR) {
                ALIGNED Sums sums;
                multiply(hidden, hidden + SIDE * rank, rank, 0, up + c * rank,
                         up + (c + SIDE) * rank, rank, 0, sums);
                for (int64_t i = 0; i < own; i++) {
                    int64_t at = index[first + i] * width + c;
                    __m512 low = _mm512_load_ps(sums[i / SIDE][0][i % SIDE]);
                    __m512 high = _mm512_load_ps(sums[i / SIDE][1][i % SIDE]);
                    if (bias) low += _mm512_loadu_ps(bias + c);
                    if (bias) high += _mm512_loadu_ps(bias + c + SIDE);
                    write_row(low, high, residual + at, into + at);
                }
            }
        }
        tiles_end();
    }
    return 0;
}
