/* Products of a few gathered rows with weights as they lie, [outputs, inputs]. A library packs the
   weights first, which pays once many rows share them. Here the rows are packed, into panels of
   columns, and each weight is read from where it is, ahead of time. Counterpart of `RowOps.mlp`. */

#include "loops.h"

#define BAND 96    /* outputs that a thread takes at a time */
#define DEPTH 1600 /* inputs that it takes at a time: longer panels leave the cache */

/* Packed rows are panels of up to WIDE vectors of rows by columns, [inputs, vecs * LANES], one
   behind the other. Panels of like size waste no place but in the last vector. */
static int64_t panels_of(int64_t rows) { return (rows + WIDE * LANES - 1) / (WIDE * LANES); }

static Rows panel_at(int64_t rows, int64_t n) {
    int64_t vecs = (rows + LANES - 1) / LANES, panels = panels_of(rows);
    int64_t begin = n * vecs / panels, end = (n + 1) * vecs / panels;
    return (Rows){begin * LANES, (end - begin) * LANES};
}

/* Rows index[0], index[1], ... of x [., width] packed; 0, 1, ... if index is null. */
void pack_rows(const float *x, const int64_t *index, int64_t rows, int64_t width, float *packed) {
    int64_t parts = (width + BAND - 1) / BAND;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < panels_of(rows) * parts; task++) {
        Rows p = panel_at(rows, task / parts);
        int64_t from = task % parts * BAND, to = least(from + BAND, width);
        float *out = packed + p.first * width;
        for (int64_t i = 0; i < p.count; i++) { /* what fills the last vector is never read */
            int64_t row = least(p.first + i, rows - 1);
            const float *in = x + (index ? index[row] : row) * width;
            for (int64_t c = from; c < to; c++) out[c * p.count + i] = in[c];
        }
    }
}

/* sums [outputs, size] of some outputs, whose weights begin at `weight`, and one panel. */
static void multiply(const float *weight, int64_t outputs, int64_t inputs, const float *panel,
                     int64_t size, float *sums) {
    int64_t vecs = size / LANES, parts = (inputs + DEPTH - 1) / DEPTH;
    int64_t depth = (inputs + parts - 1) / parts;
    for (int64_t k = 0; k < inputs; k += depth)
        for (int64_t first = 0; first < outputs; first += TILE) {
            const float *row[TILE];
            for (int64_t r = 0; r < TILE; r++) /* a short tile repeats its last row */
                row[r] = weight + least(first + r, outputs - 1) * inputs + k;
            float *own = sums + first * size;
            product(row, least(depth, inputs - k), TILE * inputs, panel + k * size, size, vecs,
                    k ? own : 0, size, own, size);
        }
}

/* hidden = silu(gate x) * (up x) for packed rows, packed again. */
void swiglu(const float *packed, int64_t rows, int64_t width, const float *gate, const float *up,
            int64_t outputs, float *hidden) {
    int64_t tasks = tasks_of(outputs, BAND / TILE);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
        float g[BAND * WIDE * LANES], u[BAND * WIDE * LANES];
        Rows own = rows_of(task, tasks, outputs);
        for (int64_t n = 0; n < panels_of(rows); n++) {
            Rows p = panel_at(rows, n);
            const float *in = packed + p.first * width;
            multiply(gate + own.first * width, own.count, width, in, p.count, g);
            multiply(up + own.first * width, own.count, width, in, p.count, u);
            float *to = hidden + p.first * outputs + own.first * p.count;
            for (int64_t i = 0; i < own.count * p.count; i++)
                to[i] = g[i] / (1.0f + exponential(-g[i])) * u[i];
        }
    }
}

/* out [rows, outputs] = packed rows times the weight. */
void project(const float *packed, int64_t rows, int64_t inputs, const float *weight,
             int64_t outputs, float *out) {
    int64_t tasks = tasks_of(outputs, BAND / TILE);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
        float sums[BAND * WIDE * LANES];
        Rows own = rows_of(task, tasks, outputs);
        for (int64_t n = 0; n < panels_of(rows); n++) {
            Rows p = panel_at(rows, n);
            multiply(weight + own.first * inputs, own.count, inputs, packed + p.first * inputs, p.count, sums);
            for (int64_t i = 0; i < least(p.count, rows - p.first); i++)
                for (int64_t c = 0; c < own.count; c++)
                    out[(p.first + i) * outputs + own.first + c] = sums[c * p.count + i];
        }
    }
}
