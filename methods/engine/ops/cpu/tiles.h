/* Products of bfloat16 in AMX tiles. Weights are read as they lie, [outputs, inputs]; the rows that
   they meet are packed into panels of SIDE: pairs of inputs by rows, [inputs / 2, SIDE, 2]. What
   comes out, outputs by rows in float32, packs into the panel of the next product without being
   transposed. */

#ifndef ROUTEBENCH_TILES_H
#define ROUTEBENCH_TILES_H

#include "loops.h"

#if !defined(__AMX_BF16__) || !defined(__AVX512F__) || !defined(__linux__)
#error "bfloat16 loops need a processor with AMX"
#endif

#include <immintrin.h>
#include <string.h>

#define SIDE 16 /* rows of a panel, and outputs of a tile */
#define DEEP 32 /* inputs of a tile */
#define PAIR (2 * SIDE)
#define ALIGNED __attribute__((aligned(64)))

/* A thread calls this before its products, and `tiles_end` after them. */
static inline void tiles_begin(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {1};
    for (int t = 0; t < 8; t++) all.bytes[t] = 64, all.rows[t] = SIDE;
    _tile_loadconfig(&all);
}

static inline void tiles_end(void) { _tile_release(); }

/* Sums of two blocks of SIDE outputs and two panels: [block, panel, output, row]. */
typedef float Sums[2][2][SIDE][SIDE];

/* Two blocks of weights, whose rows are `gap` numbers apart, times two panels; to what `sums` holds
   if that is to be `kept`. What lies `ahead` numbers after the weights is fetched on the way,
   unless that is 0. */
static inline void multiply(const number *a, const number *b, int64_t gap, int64_t ahead,
                            const number *panel, const number *other, int64_t inputs, int kept,
                            Sums sums) {
    if (kept) {
        _tile_loadd(0, sums[0][0], 64);
        _tile_loadd(1, sums[0][1], 64);
        _tile_loadd(2, sums[1][0], 64);
        _tile_loadd(3, sums[1][1], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < inputs; k += DEEP) {
        _tile_loadd(4, a + k, 2 * gap);
        _tile_loadd(5, b + k, 2 * gap);
        _tile_loadd(6, panel + k * SIDE, 64);
        _tile_loadd(7, other + k * SIDE, 64);
        for (int r = 0; ahead && r < SIDE; r++) {
            __builtin_prefetch(a + k + r * gap + ahead, 0, 2);
            __builtin_prefetch(b + k + r * gap + ahead, 0, 2);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
}

/* Rows and columns of 16 x 16 words change places: four times, row i and row i + 8 are shuffled. */
static inline void transpose(__m512i *line) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512i to[SIDE];
    for (int turn = 0; turn < 4; turn++) {
        for (int i = 0; i < SIDE / 2; i++) {
            to[2 * i] = _mm512_permutex2var_epi32(line[i], low, line[i + 8]);
            to[2 * i + 1] = _mm512_permutex2var_epi32(line[i], high, line[i + 8]);
        }
        memcpy(line, to, sizeof to);
    }
}

/* SIDE rows into a panel. */
static inline void pack(const number *const *row, int64_t inputs, number *panel) {
    for (int64_t k = 0; k < inputs; k += DEEP) {
        __m512i line[SIDE];
        for (int r = 0; r < SIDE; r++) line[r] = _mm512_loadu_si512(row[r] + k);
        transpose(line);
        memcpy(panel + k * SIDE, line, sizeof line);
    }
}

/* Rows index[first], ... of x [., width] into a panel, which the last of `rows` fills up; rows
   first, ... without an index. */
static inline void pack_rows(const number *x, int64_t width, const int64_t *index, int64_t first,
                             int64_t rows, int64_t inputs, number *panel) {
    const number *row[SIDE];
    for (int64_t r = 0; r < SIDE; r++) {
        int64_t i = least(first + r, rows - 1);
        row[r] = x + (index ? index[i] : i) * width;
    }
    pack(row, inputs, panel);
}

static inline __m256i halves(__m512 x) { /* 16 numbers, rounded */
    return (__m256i)_mm512_cvtneps_pbh(x);
}

static inline __m512 floats(const number *x) { /* 16 numbers */
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

/* SIDE outputs by SIDE rows, rounded, as inputs of the next product: half a DEEP of a panel. */
static inline void pack_sums(float (*sums)[SIDE], number *panel) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int f = 0; f < SIDE; f += 2) {
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums[f + 1]), _mm512_loadu_ps(sums[f]));
        _mm512_storeu_si512(panel + f * SIDE, _mm512_permutexvar_epi16(zip, (__m512i)both));
    }
}

/* The panel after `first`; that itself, whose sums are not written twice, if it is the last. */
static inline int64_t second_panel(int64_t first, int64_t rows) {
    return first + SIDE < rows ? first + SIDE : first;
}

/* PAIR numbers, plus a residual unless that is null. */
static inline void write_row(__m512 low, __m512 high, const number *residual, number *out) {
    if (residual) low += floats(residual);
    if (residual) high += floats(residual + SIDE);
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* Rows first .. first + PAIR - 1 of `out` [., width] get PAIR sums each at a column, plus what the
   residual has there, unless that is null; with an index, rows index[first], ... */
static inline void write_pair(Sums sums, int64_t first, int64_t rows, int64_t column, int64_t width,
                              const number *residual, const int64_t *index, number *out) {
    for (int64_t b = 0; b < 2 && first + b * SIDE < rows; b++) {
        __m512i left[SIDE], right[SIDE];
        memcpy(left, sums[0][b], sizeof left);
        memcpy(right, sums[1][b], sizeof right);
        transpose(left);
        transpose(right);
        for (int64_t i = 0, r = first + b * SIDE; i < SIDE && r < rows; i++, r++) {
            int64_t at = (index ? index[r] : r) * width + column;
            write_row(_mm512_castsi512_ps(left[i]), _mm512_castsi512_ps(right[i]),
                      residual ? residual + at : 0, out + at);
        }
    }
}

#endif
