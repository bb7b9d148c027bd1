/* Shared by the loops: the numbers that they read and write, a tile of a matrix product that stays
   in registers, and e^x. */

#ifndef ROUTEBENCH_LOOPS_H
#define ROUTEBENCH_LOOPS_H

#include <math.h>
#include <omp.h>
#include <stdint.h>

/* What tensors hold; sums are float32 in either library. */
#ifdef BFLOAT16
typedef uint16_t number;
typedef union { float value; uint32_t bits; } Word;
static inline float to_float(number x) { return (Word){.bits = (uint32_t)x << 16}.value; }
/* To the nearest, ties to even; NaN stays NaN, since arithmetic makes none with low bits alone. */
static inline number to_number(float x) {
    uint32_t bits = (Word){x}.bits;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
typedef float number;
static inline float to_float(number x) { return x; }
static inline number to_number(float x) { return x; }
#endif

#ifdef __AVX512F__
#define LANES 16
#define WIDE 4
#else
#define LANES 8
#define WIDE 2
#endif
#define TILE 6  /* rows: TILE * WIDE sums, WIDE weights and one input fill the registers */
#define LINE 16 /* floats of a cache line */
#define FEW (1 << 15) /* floats: a pass over fewer takes less time than to wake another thread */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* True if one of `count` row numbers lies outside of 0 .. rows - 1. */
static inline int outside(const int64_t *index, int64_t count, int64_t rows) {
    int found = 0;
    for (int64_t i = 0; i < count; i++) found |= (uint64_t)index[i] >= (uint64_t)rows;
    return found;
}

/* Rows that a thread takes at a time. It comes back for more: of equal shares, the one whose core
   another program has taken would be waited for. */
static inline int64_t some_rows(int64_t width) { return 1 + FEW / 4 / width; }

/* How many parts of at most `size` make up `count`. */
static inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* `count` rows split into tasks of at most `most` tiles, as many for each thread. */
typedef struct { int64_t first, count; } Rows;

static inline int64_t tiles_of(int64_t count) { return parts_of(count, TILE); }

static inline int64_t tasks_of(int64_t count, int64_t most) {
    int64_t threads = omp_get_max_threads();
    return parts_of(tiles_of(count), threads * most) * threads;
}

static inline Rows rows_of(int64_t task, int64_t tasks, int64_t count) {
    int64_t first = task * tiles_of(count) / tasks * TILE;
    return (Rows){first, least((task + 1) * tiles_of(count) / tasks * TILE, count) - first};
}

/* Unrolled, so that all sums have a register. */
#define EACH(r, v, VECS)                                                                           \
    _Pragma("GCC unroll 8") for (int r = 0; r < TILE; r++)                                         \
        _Pragma("GCC unroll 8") for (int v = 0; v < VECS; v++)
/* to = from + a @ w for TILE rows and VECS * LANES columns. `a` points to the rows; rows of `w` are
   `stride` floats apart, those of `from` and `to` their gaps; no `from` is zeros. What lies `ahead`
   floats after each row of `a` is fetched on the way, unless that is 0. */
#define DEFINE_PRODUCT(NAME, VECS)                                                                 \
    static __attribute__((noinline, unused)) void NAME(                                            \
        const float *const *a, int64_t inner, int64_t ahead, const float *w, int64_t stride,       \
        const float *from, int64_t from_gap, float *to, int64_t gap) {                             \
        vec sum[TILE][VECS];                                                                       \
        EACH(r, v, VECS) sum[r][v] = (vec){0};                                                     \
        if (from)                                                                                  \
            EACH(r, v, VECS) sum[r][v] = *(const vec *)(from + r * from_gap + v * LANES);          \
        for (int64_t line = 0; line < inner; line += LINE) {                                       \
            for (int r = 0; ahead && r < TILE; r++) __builtin_prefetch(a[r] + line + ahead);       \
            for (int64_t k = line; k < least(line + LINE, inner); k++) {                           \
                vec weight[VECS];                                                                  \
                for (int v = 0; v < VECS; v++)                                                     \
                    weight[v] = *(const vec *)(w + k * stride + v * LANES);                        \
                EACH(r, v, VECS) sum[r][v] += (a[r][k] - (vec){0}) * weight[v];                    \
            }                                                                                      \
        }                                                                                          \
        EACH(r, v, VECS) *(vec *)(to + r * gap + v * LANES) = sum[r][v];                           \
    }
DEFINE_PRODUCT(product_1, 1)
DEFINE_PRODUCT(product_2, 2)
#if WIDE > 2
DEFINE_PRODUCT(product_3, 3)
DEFINE_PRODUCT(product_4, 4)
#endif

/* The same for 1 to WIDE vectors of columns. */
static inline void product(const float *const *a, int64_t inner, int64_t ahead, const float *w,
                           int64_t stride, int64_t vecs, const float *from, int64_t from_gap,
                           float *to, int64_t gap) {
#if WIDE > 2
    if (vecs == 4) return product_4(a, inner, ahead, w, stride, from, from_gap, to, gap);
    if (vecs == 3) return product_3(a, inner, ahead, w, stride, from, from_gap, to, gap);
#endif
    if (vecs == 2) return product_2(a, inner, ahead, w, stride, from, from_gap, to, gap);
    product_1(a, inner, ahead, w, stride, from, from_gap, to, gap);
}

/* How many vectors the next panel of columns has; `columns` is a multiple of LANES. */
static inline int64_t panel(int64_t column, int64_t columns) {
    return least((columns - column) / LANES, WIDE);
}

/* e^x to 2 units in the last place: 2^n times a polynomial of the rest (Cephes, expf); of one
   float, or of a vector. */
#define REST(x, n) ((x) - (n) * 0.693359375f + (n) * 2.12194440e-4f)
#define POLYNOMIAL(r)                                                                              \
    (((((1.9875691500e-4f * (r) + 1.3981999507e-3f) * (r) + 8.3334519073e-3f) * (r) +              \
       4.1665795894e-2f) * (r) + 1.6666665459e-1f) * (r) + 5.0000001201e-1f)
#define OF_REST(r) (POLYNOMIAL(r) * (r) * (r) + (r) + 1.0f)

static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = nearbyintf(x * 1.44269504f), r = REST(x, n);
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return OF_REST(r) * power.value;
}

static inline float silu(float x) { return x / (1.0f + exponential(-x)); }

#endif
