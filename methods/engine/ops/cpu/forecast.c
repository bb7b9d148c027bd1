/* The low-rank forecast of bypassed rows, added to the residual stream where they lie: nothing is
   gathered, and no intermediate leaves the cache. Counterpart of `RowOps.forecast`. */

#include "loops.h"

#define TILES 8    /* that share what is read of the maps */
#define DEPTH 1024 /* inputs of the first map that stay in the cache meanwhile */
/* MAX_RANK comes from build.py */

/* hidden [rows, rank] = down(x[index]) for whole tiles. */
static void narrow(const float *x, const int64_t *index, Rows rows, int64_t width, int64_t rank,
                   const float *down, const float *bias, float *hidden) {
    for (int64_t j = 0, vecs; j < rank; j += vecs * LANES) {
        vecs = panel(j, rank);
        for (int64_t k = 0; k < width; k += DEPTH)
            for (int64_t first = 0; first < rows.count; first += TILE) {
                const float *in[TILE];
                float *own = hidden + first * rank + j;
                for (int64_t r = 0; r < TILE; r++) /* a short tile repeats its last row */
                    in[r] = x + index[rows.first + least(first + r, rows.count - 1)] * width + k;
                const float *before = bias ? bias + j : 0; /* the same for every row */
                product(in, least(DEPTH, width - k), 0, down + k * rank + j, rank, vecs,
                        k ? own : before, k ? rank : 0, own, rank);
            }
    }
}

/* into[index] = residual[index] + up(hidden). */
static void widen(const float *hidden, const int64_t *index, Rows rows, int64_t width,
                  int64_t rank, const float *up, const float *bias, const float *residual,
                  float *into) {
    float sums[TILE * WIDE * LANES];
    for (int64_t j = 0, vecs; j < width; j += vecs * LANES) {
        vecs = panel(j, width);
        for (int64_t first = 0; first < rows.count; first += TILE) {
            const float *in[TILE];
            for (int64_t r = 0; r < TILE; r++) in[r] = hidden + (first + r) * rank;
            product(in, rank, 0, up + j, width, vecs, bias ? bias + j : 0, 0, sums, WIDE * LANES);
            for (int64_t r = 0; r < least(rows.count - first, TILE); r++)
                for (int64_t v = 0; v < vecs; v++) {
                    int64_t at = index[rows.first + first + r] * width + j + v * LANES;
                    const float *sum = sums + (r * WIDE + v) * LANES;
                    *(vec *)(into + at) = *(const vec *)(residual + at) + *(const vec *)sum;
                }
        }
    }
}

/* into[index] = residual[index] + up(act(down(x[index]))) in buffers of `held` rows; `down` is
   [width, rank], `up` [rank, width], both a multiple of 16 and rank at most MAX_RANK; biases may be
   null. */
int forecast(const float *x, const float *residual, float *into, int64_t held,
             const int64_t *index, int64_t count, const float *down, const float *down_bias,
             const float *up, const float *bias, int64_t width, int64_t rank, int64_t with_silu) {
    if (outside(index, count, held)) return 1;
    int64_t tasks = tasks_of(count, TILES);
#pragma omp parallel for schedule(dynamic) if (count > TILE)
    for (int64_t task = 0; task < tasks; task++) {
        float hidden[TILES * TILE * MAX_RANK];
        Rows rows = rows_of(task, tasks, count);
        narrow(x, index, rows, width, rank, down, down_bias, hidden);
        for (int64_t i = 0; with_silu && i < tiles_of(rows.count) * TILE * rank; i++)
            hidden[i] = silu(hidden[i]);
        widen(hidden, index, rows, width, rank, up, bias, residual, into);
    }
    return 0;
}
