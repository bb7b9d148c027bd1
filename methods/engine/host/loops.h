/* Shared by the loops: a tile of a matrix product that stays in registers, and e^x. */

#ifndef ROUTEBENCH_LOOPS_H
#define ROUTEBENCH_LOOPS_H

#include <math.h>
#include <stdint.h>

#ifdef __AVX512F__
#define LANES 16
#define WIDE 4
#else
#define LANES 8
#define WIDE 2
#endif
#define TILE 6 /* rows: TILE * WIDE sums, WIDE weights and one input fill the registers */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* sum += a @ w for TILE rows and VECS * LANES columns; `a` points to the rows, and a row of `w` is
   `stride` floats after the one before. */
#define DEFINE_PRODUCT(NAME, VECS)                                                                 \
    static inline __attribute__((always_inline)) void NAME(                                        \
        const float *const *a, int64_t inner, const float *w, int64_t stride, vec *sum) {          \
        vec own[TILE][VECS];                                                                       \
        for (int r = 0; r < TILE; r++)                                                             \
            for (int v = 0; v < VECS; v++) own[r][v] = sum[r * VECS + v];                          \
        for (int64_t k = 0; k < inner; k++) {                                                      \
            vec weight[VECS];                                                                      \
            for (int v = 0; v < VECS; v++)                                                         \
                weight[v] = *(const vec *)(w + k * stride + v * LANES);                            \
            for (int r = 0; r < TILE; r++) {                                                       \
                vec input = a[r][k] - (vec){0};                                                    \
                for (int v = 0; v < VECS; v++) own[r][v] += input * weight[v];                     \
            }                                                                                      \
        }                                                                                          \
        for (int r = 0; r < TILE; r++)                                                             \
            for (int v = 0; v < VECS; v++) sum[r * VECS + v] = own[r][v];                          \
    }
DEFINE_PRODUCT(wide_product, WIDE)
DEFINE_PRODUCT(narrow_product, 1)

/* How many vectors the next panel of columns has. */
static inline int64_t panel(int64_t column, int64_t columns) {
    return column + WIDE * LANES <= columns ? WIDE : 1;
}

static inline void product(const float *const *a, int64_t inner, const float *w, int64_t stride,
                           int64_t vecs, vec *sum) {
    if (vecs == WIDE) wide_product(a, inner, w, stride, sum);
    else narrow_product(a, inner, w, stride, sum);
}

/* A tile's sums from and to memory, rows `stride` floats apart. */
static inline void load(const float *from, int64_t stride, int64_t vecs, vec *sum) {
    for (int64_t r = 0; r < TILE; r++)
        for (int64_t v = 0; v < vecs; v++)
            sum[r * vecs + v] = *(const vec *)(from + r * stride + v * LANES);
}

static inline void store(const vec *sum, int64_t vecs, float *to, int64_t stride) {
    for (int64_t r = 0; r < TILE; r++)
        for (int64_t v = 0; v < vecs; v++)
            *(vec *)(to + r * stride + v * LANES) = sum[r * vecs + v];
}

static inline void clear(vec *sum) {
    for (int i = 0; i < TILE * WIDE; i++) sum[i] = (vec){0};
}

/* e^x to 2 units in the last place: 2^n times a polynomial of the rest (Cephes, expf). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = nearbyintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.value;
}

#endif
