/* `forecast.c` for bfloat16; maps lie as they are, [rank, width] and [width, rank]. */

#include "tiles.h"

#define DEPTH 1024 /* inputs that are packed at a time */
/* MAX_RANK comes from build.py */

/* into[index] = residual[index] + up(act(down(x[index]))) in buffers of `held` rows; `width` and
   `rank` are multiples of 32, rank at most MAX_RANK; biases may be null. */
int forecast(const number *x, const number *residual, number *into, int64_t held,
             const int64_t *index, int64_t count, const number *down, const float *down_bias,
             const number *up, const float *bias, int64_t width, int64_t rank, int64_t with_silu) {
    if (outside(index, count, held)) return 1;
#pragma omp parallel if (count > SIDE)
    {
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < count; first += PAIR) {
            ALIGNED number panel[2][DEPTH * SIDE], hidden[2][MAX_RANK * SIDE];
            ALIGNED Sums sums[MAX_RANK / PAIR];
            int two = first + SIDE < count;
            for (int64_t k = 0; k < width; k += DEPTH) {
                int64_t depth = least(DEPTH, width - k);
                for (int b = 0; b < 1 + two; b++)
                    pack_rows(x + k, width, index, first + b * SIDE, count, depth, panel[b]);
                for (int64_t r = 0; r < rank; r += PAIR) {
                    const number *own = down + r * width + k;
                    multiply(own, own + SIDE * width, width, 0, panel[0], panel[two], depth, k > 0,
                             sums[r / PAIR]);
                }
            }
            for (int64_t r = 0; r < rank; r += SIDE)
                for (int b = 0; b < 1 + two; b++) {
                    float (*own)[SIDE] = sums[r / PAIR][r / SIDE % 2][b];
                    for (int i = 0; i < SIDE; i++)
                        for (int j = 0; j < SIDE; j++) {
                            float sum = own[i][j] + (down_bias ? down_bias[r + i] : 0.0f);
                            own[i][j] = with_silu ? silu(sum) : sum;
                        }
                    pack_sums(own, hidden[b] + r * SIDE);
                }
            for (int64_t c = 0; c < width; c += PAIR) {
                const number *own = up + c * rank;
                multiply(own, own + SIDE * rank, rank, 0, hidden[0], hidden[two], rank, 0, *sums);
                write_pair(*sums, first, count, c, width, bias, residual, index, into);
            }
        }
        tiles_end();
    }
    return 0;
}
