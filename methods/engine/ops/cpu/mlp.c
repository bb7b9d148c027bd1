/* The MLP of a few gathered rows, with weights as they lie, [outputs, inputs]. A library packs the
   weights first, which pays once many rows share them. Here the rows are packed, into panels of
   columns, and each weight is read from where it is, ahead of time. Counterpart of `RowOps.mlp` and
   `RowOps.add_mlp`. */

#include "loops.h"

#define BAND 96    /* outputs that a thread takes at a time */
#define DEPTH 1600 /* inputs that it takes at a time: longer panels leave the cache */

/* Packed rows are panels of up to WIDE vectors of rows by columns, [inputs, vecs * LANES], one
   behind the other. Panels of like size waste no place but in the last vector. */
static int64_t panels_of(int64_t rows) { return parts_of(rows, WIDE * LANES); }

static Rows panel_at(int64_t rows, int64_t n) {
    int64_t vecs = parts_of(rows, LANES), panels = panels_of(rows);
    int64_t begin = n * vecs / panels, end = (n + 1) * vecs / panels;
    return (Rows){begin * LANES, (end - begin) * LANES};
}

/* Rows index[0], index[1], ... of x [., width] packed; 0, 1, ... if index is null. */
static void pack(const float *x, const int64_t *index, int64_t rows, int64_t width, float *packed) {
    int64_t parts = parts_of(width, BAND);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < panels_of(rows) * parts; task++) {
        Rows p = panel_at(rows, task / parts);
        int64_t from = task % parts * BAND, to = least(from + BAND, width);
        float *out = packed + p.first * width;
        for (int64_t i = 0; i < p.count; i++) { /* the last vector is filled up with the last row */
            int64_t row = least(p.first + i, rows - 1);
            const float *in = x + (index ? index[row] : row) * width;
            for (int64_t c = from; c < to; c++) out[c * p.count + i] = in[c];
        }
    }
}

/* sums [outputs, size] of some outputs, whose weights begin at `weight`, and one panel. */
static void multiply(const float *weight, int64_t outputs, int64_t inputs, const float *panel,
                     int64_t size, float *sums) {
    int64_t depth = parts_of(inputs, parts_of(inputs, DEPTH)); /* parts of like size */
    for (int64_t k = 0; k < inputs; k += depth)
        for (int64_t first = 0; first < outputs; first += TILE) {
            const float *row[TILE];
            float *own = sums + first * size;
            for (int64_t r = 0; r < TILE; r++) /* a short tile repeats its last row */
                row[r] = weight + least(first + r, outputs - 1) * inputs + k;
            product(row, least(depth, inputs - k), TILE * inputs, panel + k * size, size,
                    size / LANES, k ? own : 0, size, own, size);
        }
}

/* hidden = silu(gate x) * (up x) for packed rows, packed again. */
static void widen(const float *packed, int64_t rows, int64_t width, const float *gate,
                  const float *up, int64_t neurons, float *hidden) {
    int64_t tasks = tasks_of(neurons, BAND / TILE);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        float g[BAND * WIDE * LANES], u[BAND * WIDE * LANES];
        Rows own = rows_of(task, tasks, neurons);
        for (int64_t n = 0; n < panels_of(rows); n++) {
            Rows p = panel_at(rows, n);
            const float *in = packed + p.first * width;
            multiply(gate + own.first * width, own.count, width, in, p.count, g);
            multiply(up + own.first * width, own.count, width, in, p.count, u);
            float *to = hidden + p.first * neurons + own.first * p.count;
            for (int64_t i = 0; i < own.count * p.count; i++)
                to[i] = silu(g[i]) * u[i];
        }
    }
}

/* out[i] = down hidden[i]; with a residual, out[index[i]] = residual[index[i]] + that. */
static void narrow(const float *hidden, int64_t rows, int64_t neurons, const float *down,
                   int64_t width, const float *residual, const int64_t *index, float *out) {
    int64_t tasks = tasks_of(width, BAND / TILE);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        float sums[BAND * WIDE * LANES];
        Rows own = rows_of(task, tasks, width);
        for (int64_t n = 0; n < panels_of(rows); n++) {
            Rows p = panel_at(rows, n);
            multiply(down + own.first * neurons, own.count, neurons, hidden + p.first * neurons,
                     p.count, sums);
            for (int64_t i = 0; i < least(p.count, rows - p.first); i++) {
                int64_t row = residual ? index[p.first + i] : p.first + i;
                int64_t at = row * width + own.first;
                for (int64_t c = 0; c < own.count; c++)
                    out[at + c] = sums[c * p.count + i] + (residual ? residual[at + c] : 0.0f);
            }
        }
    }
}

/* The MLP of rows of x [held, width]; `scratch` takes packed inputs and packed hidden rows. */
int mlp(const float *x, int64_t held, int64_t rows, const int64_t *index, const float *gate,
        const float *up, const float *down, const float *residual, float *scratch, float *out,
        int64_t width, int64_t neurons) {
    if (index && outside(index, rows, held)) return 1;
    float *hidden = scratch + parts_of(rows, LANES) * LANES * width;
#pragma omp parallel
    {
        pack(x, index, rows, width, scratch);
        widen(scratch, rows, width, gate, up, neurons, hidden);
        narrow(hidden, rows, neurons, down, width, residual, index, out);
    }
    return 0;
}
