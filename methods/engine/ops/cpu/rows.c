/* What lies between the matrix products of a routed forward, one pass over memory each.

   Every function is the counterpart of a method of `methods.engine.ops.row_ops.RowOps`, which says
   what it computes; matrices are row-major, without gaps. `index` holds rows in rising order; a
   function that reads row numbers returns 1, and does nothing, if one is outside of its buffer. */

#include "loops.h"

/* out = x / sqrt(mean(x^2) + eps) * weight, a row at a time; and, unless `score` is null,
   scores = out @ score + offset. */
void rms_norm(const number *x, const number *weight, float eps, number *out, int64_t rows,
              int64_t width, const float *score, const float *offset, float *scores) {
#pragma omp parallel for schedule(dynamic, some_rows(width)) if (rows * width > FEW)
    for (int64_t i = 0; i < rows; i++) {
        const number *in = x + i * width;
        number *to = out + i * width;
        float sum = 0.0f;
        for (int64_t j = 0; j < width; j++) sum += to_float(in[j]) * to_float(in[j]);
        float scale = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t j = 0; j < width; j++) /* rounded twice, as the modules do */
            to[j] = to_number(to_float(to_number(to_float(in[j]) * scale)) * to_float(weight[j]));
        if (!score) continue;
        float found = 0.0f;
        for (int64_t j = 0; j < width; j++) found += to_float(to[j]) * score[j];
        scores[i] = found + *offset;
    }
}

/* gate = silu(gate) * up. */
void silu_mul(number *restrict gate, const number *restrict up, int64_t count) {
#pragma omp parallel for simd schedule(dynamic, FEW / 4) if (count > FEW)
    for (int64_t i = 0; i < count; i++)
        gate[i] = to_number(silu(to_float(gate[i])) * to_float(up[i]));
}

static inline number turned(number a, number cosine, number b, float sine) {
    return to_number(to_float(a) * to_float(cosine) + to_float(b) * sine);
}

/* Rotary embedding of x [rows, heads, size]; row i has the angles of place[i], or of i % period.
   `out` has gaps of its own between sequences of `tokens` rows, rows and heads. */
int rotate(const number *restrict x, const number *restrict cosine, const number *restrict sine,
           const int64_t *place, int64_t period, number *restrict out, int64_t sequence_gap,
           int64_t row_gap, int64_t head_gap, int64_t rows, int64_t tokens, int64_t heads,
           int64_t size) {
    int64_t half = size / 2;
    if (place && outside(place, rows, period)) return 1;
#pragma omp parallel for schedule(dynamic, some_rows(heads * size)) if (rows * heads * size > FEW)
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = (place ? place[i] : i % period) * size;
        const number *c = cosine + at, *s = sine + at;
        for (int64_t h = 0; h < heads; h++) {
            const number *a = x + (i * heads + h) * size, *b = a + half;
            int64_t from = i / tokens * sequence_gap + i % tokens * row_gap + h * head_gap;
            number *restrict to = out + from, *restrict end = to + half;
            for (int64_t j = 0; j < half; j++)
                to[j] = turned(a[j], c[j], b[j], -to_float(s[j]));
            for (int64_t j = 0; j < half; j++)
                end[j] = turned(b[j], c[half + j], a[j], to_float(s[half + j]));
        }
    }
    return 0;
}

/* into[index] = residual[index] + delta, a row of `delta` for each of `count` indices. */
int add_rows(const number *residual, number *into, int64_t rows, const int64_t *index,
             const number *delta, int64_t count, int64_t width) {
    if (outside(index, count, rows)) return 1;
#pragma omp parallel for schedule(dynamic, some_rows(width)) if (count * width > FEW)
    for (int64_t i = 0; i < count; i++) {
        const number *from = residual + index[i] * width, *more = delta + i * width;
        number *to = into + index[i] * width;
        for (int64_t j = 0; j < width; j++)
            to[j] = to_number(to_float(from[j]) + to_float(more[j]));
    }
    return 0;
}

/* Places where `execute` and `valid` hold, and in the second half of `places` those where only
   `valid` does. `counts` gets the executed tokens of each sequence, then all bypassed ones. */
void partition(const uint8_t *execute, const uint8_t *valid, int64_t *places, int64_t *counts,
               int64_t batch, int64_t tokens) {
    int64_t a = 0, b = 0, *executed = places, *bypassed = places + batch * tokens;
    for (int64_t s = 0; s < batch; s++) {
        int64_t before = a;
        for (int64_t i = s * tokens; i < (s + 1) * tokens; i++) {
            executed[a] = bypassed[b] = i;
            a += valid[i] & execute[i];
            b += valid[i] & !execute[i];
        }
        counts[s] = a - before;
    }
    counts[batch] = b;
}
