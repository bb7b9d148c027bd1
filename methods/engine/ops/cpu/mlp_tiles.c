/* `mlp.c` for bfloat16. */

#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

#define BAND 4 /* blocks of neurons that a thread takes at a time */
/* CHUNK, of build.py: rows whose hidden numbers stay in the cache */

/* hidden = silu(gate x) * (up x) for packed rows, packed again. */
static void widen(const number *packed, int64_t rows, int64_t width, const number *gate,
                  const number *up, int64_t neurons, number *hidden) {
#pragma omp for schedule(dynamic, BAND)
    for (int64_t f = 0; f < neurons; f += SIDE)
        for (int64_t first = 0; first < rows; first += PAIR) {
            int64_t second = second_panel(first, rows);
            ALIGNED Sums sums;
            multiply(gate + f * width, up + f * width, width, first ? 0 : SIDE * width,
                     packed + first * width, packed + second * width, width, 0, sums);
            float *g = sums[0][0][0], *u = sums[1][0][0];
            for (int i = 0; i < 2 * SIDE * SIDE; i++) g[i] = silu(g[i]) * u[i];
            pack_sums(sums[0][0], hidden + first * neurons + f * SIDE);
            pack_sums(sums[0][1], hidden + second * neurons + f * SIDE);
        }
}

/* out[i] = down hidden[i]; with a residual, out[index[i]] = residual[index[i]] + that. */
static void narrow(const number *hidden, int64_t rows, int64_t neurons, const number *down,
                   int64_t width, const number *residual, const int64_t *index, number *out) {
#pragma omp for schedule(dynamic, 3) /* neighbours in memory */
    for (int64_t c = 0; c < width; c += PAIR)
        for (int64_t first = 0; first < rows; first += PAIR) {
            const number *own = down + c * neurons;
            ALIGNED Sums sums;
            multiply(own, own + SIDE * neurons, neurons, first ? 0 : PAIR * neurons,
                     hidden + first * neurons, hidden + second_panel(first, rows) * neurons,
                     neurons, 0, sums);
            write_pair(sums, first, rows, c, width, residual, index, out);
        }
}

/* `width` is a multiple of 32, `neurons` too. */
int mlp(const number *x, int64_t held, int64_t rows, const int64_t *index, const number *gate,
        const number *up, const number *down, const number *residual, number *scratch, number *out,
        int64_t width, int64_t neurons) {
    if (index && outside(index, rows, held)) return 1;
    number *hidden = scratch + parts_of(least(rows, CHUNK), SIDE) * SIDE * width;
#pragma omp parallel
    {
        tiles_begin();
        for (int64_t begin = 0; begin < rows; begin += CHUNK) {
            int64_t count = least(CHUNK, rows - begin);
            const int64_t *own = index ? index + begin : 0;
            const number *from = index ? x : x + begin * width;
#pragma omp for schedule(dynamic)
            for (int64_t first = 0; first < count; first += SIDE)
                pack_rows(from, width, own, first, count, width, scratch + first * width);
            widen(scratch, count, width, gate, up, neurons, hidden);
            narrow(hidden, count, neurons, down, width, residual, residual ? own : 0,
                   residual ? out : out + begin * width);
        }
        tiles_end();
    }
    return 0;
}

/* Ask the system for the registers, once a process; 0 if it lets them be used. */
int permit(void) {
    enum { REQUEST = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, REQUEST, TILES) != 0;
}
