/* The low-rank forecast of bypassed rows, added to the residual stream where they lie: nothing is
   gathered, and no intermediate leaves the cache. Counterpart of `RowOps.forecast`. */

#include "loops.h"

/* MAX_RANK comes from build.py */

static void silu(float *h, int64_t count) {
    for (int64_t i = 0; i < count; i++) h[i] = h[i] / (1.0f + exponential(-h[i]));
}

/* Every row of a tile's sums starts as the bias, or as zeros. */
static inline void start(const float *bias, int64_t vecs, vec *sum) {
    if (bias) load(bias, 0, vecs, sum);
    else clear(sum);
}

/* into[index] = residual[index] + up(act(down(x[index]))); `down` is [width, rank], `up`
   [rank, width], both a multiple of 16 and rank at most MAX_RANK; biases may be null. */
void forecast(const float *x, const float *residual, float *into, const int64_t *index,
              int64_t count, int64_t width, int64_t rank, const float *down,
              const float *down_bias, const float *up, const float *bias, int64_t with_silu) {
#pragma omp parallel for schedule(static) if (count > TILE)
    for (int64_t first = 0; first < count; first += TILE) {
        const float *in[TILE], *middle[TILE];
        float hidden[TILE * MAX_RANK];
        vec sum[TILE * WIDE];
        int64_t rows = least(count - first, TILE), vecs;
        for (int64_t r = 0; r < TILE; r++) { /* a short tile repeats its first row */
            in[r] = x + index[first + (r < rows ? r : 0)] * width;
            middle[r] = hidden + r * rank;
        }
        for (int64_t j = 0; j < rank; j += vecs * LANES) {
            vecs = panel(j, rank);
            start(down_bias ? down_bias + j : 0, vecs, sum);
            product(in, width, 0, down + j, rank, vecs, sum);
            store(sum, vecs, hidden + j, rank);
        }
        if (with_silu) silu(hidden, TILE * rank);
        for (int64_t j = 0; j < width; j += vecs * LANES) {
            vecs = panel(j, width);
            start(bias ? bias + j : 0, vecs, sum);
            product(middle, rank, 0, up + j, width, vecs, sum);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t v = 0; v < vecs; v++) {
                    int64_t at = index[first + r] * width + j + v * LANES;
                    *(vec *)(into + at) = *(const vec *)(residual + at) + sum[r * vecs + v];
                }
        }
    }
}
