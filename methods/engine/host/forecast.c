/* The low-rank forecast of bypassed rows, added to the residual stream where they lie: nothing is
   gathered, and no intermediate leaves the cache. Counterpart of `RowOps.forecast`. */

#include <stdint.h>

void silu(float *h, int64_t count);

#ifdef __AVX512F__
#define LANES 16
#define WIDE 4
#else
#define LANES 8
#define WIDE 2
#endif
#define ROWS 6 /* ROWS * WIDE accumulators, WIDE weights and one input fill the registers */
#define MAX_RANK 512

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* acc += a @ w for ROWS rows and VECS * LANES columns; w has `stride` columns. */
#define DEFINE_PRODUCT(NAME, VECS)                                                              \
    static inline __attribute__((always_inline)) void NAME(                                     \
        const float *const *a, int64_t inner, const float *w, int64_t stride, vec *acc) {       \
        vec sum[ROWS][VECS];                                                                    \
        for (int r = 0; r < ROWS; r++)                                                          \
            for (int v = 0; v < VECS; v++) sum[r][v] = acc[v];                                  \
        for (int64_t k = 0; k < inner; k++) {                                                   \
            vec weight[VECS];                                                                   \
            for (int v = 0; v < VECS; v++) weight[v] = *(const vec *)(w + k * stride + v * LANES); \
            for (int r = 0; r < ROWS; r++) {                                                    \
                vec input = a[r][k] - (vec){0};                                                 \
                for (int v = 0; v < VECS; v++) sum[r][v] += input * weight[v];                  \
            }                                                                                   \
        }                                                                                       \
        for (int r = 0; r < ROWS; r++)                                                          \
            for (int v = 0; v < VECS; v++) acc[r * VECS + v] = sum[r][v];                       \
    }
DEFINE_PRODUCT(wide_product, WIDE)
DEFINE_PRODUCT(narrow_product, 1)

/* Panels of a product with `columns` columns: `acc` starts as the bias, or as zeros. */
#define FOR_PANELS(COLUMNS, BIAS, A, INNER, W, STORE)                                           \
    for (int64_t j = 0, vecs; j < (COLUMNS); j += vecs * LANES) {                               \
        vec acc[ROWS * WIDE];                                                                   \
        vecs = j + WIDE * LANES <= (COLUMNS) ? WIDE : 1;                                        \
        for (int v = 0; v < vecs; v++)                                                          \
            acc[v] = (BIAS) ? *(const vec *)((BIAS) + j + v * LANES) : (vec){0};                \
        if (vecs == WIDE) wide_product(A, INNER, (W) + j, COLUMNS, acc);                        \
        else narrow_product(A, INNER, (W) + j, COLUMNS, acc);                                   \
        for (int64_t r = 0; r < rows; r++)                                                      \
            for (int v = 0; v < vecs; v++) {                                                    \
                int64_t column = j + v * LANES;                                                 \
                vec sum = acc[r * vecs + v];                                                    \
                STORE;                                                                          \
            }                                                                                   \
    }

/* into[index] += up(act(down(x[index]))); `down` is [width, rank], `up` [rank, width], both a
   multiple of 16 and rank at most MAX_RANK; biases may be null. */
void forecast(const float *x, float *into, const int64_t *index, int64_t count, int64_t width,
              int64_t rank, const float *down, const float *down_bias, const float *up,
              const float *bias, int64_t with_silu) {
#pragma omp parallel for schedule(static) if (count > ROWS)
    for (int64_t start = 0; start < count; start += ROWS) {
        const float *in[ROWS], *middle[ROWS];
        float hidden[ROWS * MAX_RANK];
        int64_t rows = count - start < ROWS ? count - start : ROWS;
        for (int64_t r = 0; r < ROWS; r++) { /* a short tile repeats its first row */
            in[r] = x + index[start + (r < rows ? r : 0)] * width;
            middle[r] = hidden + (r < rows ? r : 0) * rank;
        }
        FOR_PANELS(rank, down_bias, in, width, down, *(vec *)(hidden + r * rank + column) = sum)
        if (with_silu) silu(hidden, rows * rank);
        FOR_PANELS(width, bias, middle, rank, up,
                   *(vec *)(into + index[start + r] * width + column) += sum)
    }
}
