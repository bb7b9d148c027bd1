/* `attend.c` for bfloat16: scores lie as keys by queries, so that softmax is taken down the columns
   and its weights are packed as they come. */

#include "tiles.h"

#define BLOCK 256 /* keys whose scores are held at a time, a multiple of PANEL */
/* MAX_HEAD and PANEL, a multiple of PAIR, come from build.py */

typedef struct {
    float scores[BLOCK / PAIR][2][2][SIDE][SIDE]; /* of PAIR keys: block, panel, key, row */
    float out[MAX_HEAD / PAIR][2][2][SIDE][SIDE]; /* of PAIR numbers of a head */
    number query[2][MAX_HEAD * SIDE], weights[2][BLOCK * SIDE];
    int32_t seen[2][SIDE]; /* keys that the row sees */
    float max[2][SIDE], sum[2][SIDE], kept[2][SIDE];
} Tile;

/* `exponential` of SIDE numbers. */
static inline __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = REST(x, n);
    return _mm512_scalef_ps(OF_REST(r), n);
}

/* Scores of one panel become weights relative to the new maximum of each row; `hides` is true if
   some of its rows do not see some of the block's keys. */
static void soften(Tile *t, int b, int32_t begin, int64_t columns, float scale, int hides) {
    __m512 before = _mm512_load_ps(t->max[b]), top = before, sum = _mm512_setzero_ps();
    __m512i seen = _mm512_load_si512(t->seen[b]);
    for (int32_t j = 0; j < columns; j++) {
        float *s = t->scores[j / PAIR][j / SIDE % 2][b][j % SIDE];
        __m512 score = _mm512_load_ps(s) * scale;
        if (hides) {
            __mmask16 sees = _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(begin + j));
            score = _mm512_mask_blend_ps(sees, _mm512_set1_ps(-INFINITY), score);
        }
        _mm512_store_ps(s, score);
        top = _mm512_max_ps(top, score);
    }
    for (int32_t j = 0; j < columns; j++) {
        float *s = t->scores[j / PAIR][j / SIDE % 2][b][j % SIDE];
        __m512 score = _mm512_load_ps(s);
        __mmask16 sees = _mm512_cmpneq_ps_mask(score, _mm512_set1_ps(-INFINITY));
        score = _mm512_maskz_mov_ps(sees, exponentials(score - top));
        _mm512_store_ps(s, score);
        sum += score;
        if (j % SIDE == SIDE - 1)
            pack_sums(t->scores[j / PAIR][j / SIDE % 2][b], t->weights[b] + (j - j % SIDE) * SIDE);
    }
    __m512 kept = exponentials(before - top);
    _mm512_store_ps(t->kept[b], kept);
    _mm512_store_ps(t->sum[b], _mm512_load_ps(t->sum[b]) * kept + sum);
    _mm512_store_ps(t->max[b], top);
}

/* One tile over the keys that any of its rows sees; `all` of them are seen by every row. */
static void attend_tile(Tile *t, const number *key, const number *value_T, int64_t room,
                        int64_t keys, int64_t all, int64_t size, float scale) {
    for (int64_t begin = 0; begin < keys; begin += BLOCK) {
        int64_t columns = least(parts_of(keys - begin, PAIR) * PAIR, BLOCK);
        for (int64_t j = 0; j < columns; j += PAIR) {
            const number *own = key + (begin + j) * size;
            multiply(own, own + SIDE * size, size, 0, t->query[0], t->query[1], size, 0,
                     t->scores[j / PAIR]);
        }
        for (int b = 0; b < 2; b++) soften(t, b, begin, columns, scale, begin + columns > all);
        for (int64_t c = 0; c < size; c += PAIR) {
            for (int i = 0; i < 2 * 2 * SIDE; i++) {
                float *out = t->out[c / PAIR][0][0][i], *kept = t->kept[i / SIDE % 2];
                for (int r = 0; r < SIDE; r++) out[r] = begin ? out[r] * kept[r] : 0.0f;
            }
            const number *own = value_T + c * room + begin;
            multiply(own, own + SIDE * room, room, 0, t->weights[0], t->weights[1], columns, 1,
                     t->out[c / PAIR]);
        }
    }
}

/* A panel of keys of a head without gaps, and its values by columns; zeros where are no keys. */
static void copy(const number *key, int64_t key_row, const number *value, int64_t value_row,
                 int64_t keys, int64_t size, int64_t room, number *key_S, number *value_T) {
    static const number none[MAX_HEAD];
    for (int64_t first = 0; first < PANEL; first += SIDE) {
        const number *row[SIDE];
        ALIGNED number pairs[MAX_HEAD * SIDE];
        for (int64_t r = 0, s = first; r < SIDE; r++, s++) {
            memcpy(key_S + s * size, s < keys ? key + s * key_row : none, size * sizeof(number));
            row[r] = s < keys ? value + s * value_row : none;
        }
        pack(row, size, pairs);
        for (int64_t c = 0; c < size; c++) {
            __m512i both = _mm512_load_si512(pairs + c / 2 * PAIR);
            __m256i own = _mm512_cvtepi32_epi16(c % 2 ? _mm512_srli_epi32(both, 16) : both);
            _mm256_storeu_si256((__m256i *)(value_T + c * room + first), own);
        }
    }
}

/* The arguments of `attend.c`; `scratch` takes keys and values, [2, kv_heads, panels * PANEL,
   size]. `size` is a multiple of 32. */
int attend(const number *q, const number *key, int64_t key_head, int64_t key_row,
           const number *value, int64_t value_head, int64_t value_row, const int64_t *last,
           float scale, number *scratch, number *out, int64_t held, int64_t count, int64_t heads,
           int64_t kv_heads, int64_t size) {
    if (outside(last, count, held)) return 1;
    int64_t keys = 0, group = heads / kv_heads, rows = count * group;
    for (int64_t i = 0; i < count; i++) keys = last[i] < keys ? keys : last[i] + 1;
    int64_t tiles = parts_of(rows, PAIR), panels = parts_of(keys, PANEL), room = panels * PANEL;
    number *value_T = scratch + kv_heads * room * size;
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < kv_heads * panels; n++) {
            int64_t g = n / panels, from = n % panels * PANEL;
            copy(key + g * key_head + from * key_row, key_row,
                 value + g * value_head + from * value_row, value_row, keys - from, size, room,
                 scratch + n * PANEL * size, value_T + g * room * size + from);
        }
        /* the last tiles of a head see the most keys: they are taken first */
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < kv_heads * tiles; n++) {
            int64_t g = n / tiles, first = (tiles - 1 - n % tiles) * PAIR, most = 0, all = held;
            const number *row[PAIR];
            ALIGNED Tile t;
            for (int64_t i = 0; i < PAIR; i++) { /* a short tile repeats its last row */
                int64_t m = least(first + i, rows - 1), seen = last[m / group] + 1;
                t.seen[i / SIDE][i % SIDE] = seen;
                t.max[i / SIDE][i % SIDE] = -1e30f;
                t.sum[i / SIDE][i % SIDE] = 0.0f;
                most = seen > most ? seen : most;
                all = least(seen, all);
                row[i] = q + (m / group * heads + g * group + m % group) * size;
            }
            pack(row, size, t.query[0]);
            pack(row + SIDE, size, t.query[1]);
            attend_tile(&t, scratch + g * room * size, value_T + g * room * size, room, most, all,
                        size, scale);
            for (int b = 0; b < 2; b++)
                for (int64_t c = 0; c < size; c += SIDE) {
                    float (*sums)[SIDE] = t.out[c / PAIR][c / SIDE % 2][b];
                    for (int i = 0; i < SIDE * SIDE; i++) sums[0][i] /= t.sum[b][i % SIDE];
                    __m512i line[SIDE];
                    memcpy(line, sums, sizeof line);
                    transpose(line);
                    for (int64_t i = b * SIDE; i < least((b + 1) * SIDE, rows - first); i++)
                        _mm256_storeu_si256((__m256i *)(out + (row[i] - q) + c),
                                            halves(_mm512_castsi512_ps(line[i % SIDE])));
                }
        }
        tiles_end();
    }
    return 0;
}
