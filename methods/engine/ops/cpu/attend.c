/* Causal attention of gathered queries, each up to its own last key: scores live in a block that
   stays in the cache, softmax is taken as blocks come (Dao et al., arXiv 2205.14135, algorithm 1).
   No mask is made and no key is read that no query of a tile sees. Counterpart of
   `RowOps.attend`. */

#include "loops.h"

#define BLOCK 512      /* keys whose scores are held at a time, a multiple of PANEL */
#define LONG (1 << 22) /* products of one query's scores from which on it wakes other threads */
/* MAX_HEAD and PANEL come from build.py: sizes of a head, keys that lie together once transposed */

typedef struct {
    const float *q[TILE];
    int64_t seen[TILE]; /* keys that the row sees */
    float max[TILE], sum[TILE];
    float scores[TILE * BLOCK], out[TILE * MAX_HEAD];
} Tile;

/* One panel of keys by columns, [size, PANEL]; zeros where there are no keys. */
static void transpose(const float *key, int64_t row, int64_t keys, int64_t size, float *key_T) {
    for (int64_t c = 0; c < size; c++)
        for (int64_t s = 0; s < PANEL; s++) key_T[c * PANEL + s] = s < keys ? key[s * row + c] : 0;
}

/* Scores of the block's keys become weights relative to the row's new maximum. */
static void soften(Tile *t, int r, int64_t begin, int64_t columns, int64_t size, float scale) {
    float *s = t->scores + r * BLOCK, *out = t->out + r * MAX_HEAD;
    int64_t seen = least(t->seen[r] - begin, columns);
    if (seen < 0) seen = 0;
    float top = t->max[r], sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < seen; j++) top = s[j] * scale > top ? s[j] * scale : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; j++) {
        s[j] = exponential(s[j] * scale - top);
        sum += s[j];
    }
    for (int64_t j = seen; j < columns; j++) s[j] = 0.0f;
    float kept = begin ? exponential(t->max[r] - top) : 0.0f;
    t->sum[r] = t->sum[r] * kept + sum;
    t->max[r] = top;
    for (int64_t c = 0; c < size; c++) out[c] *= kept;
}

/* One tile over the keys that any of its rows sees. */
static void attend_tile(Tile *t, const float *key_T, const float *value, int64_t row, int64_t keys,
                        int64_t size, float scale) {
    const float *weights[TILE];
    int64_t vecs;
    for (int r = 0; r < TILE; r++) weights[r] = t->scores + r * BLOCK;
    for (int64_t begin = 0; begin < keys; begin += BLOCK) {
        int64_t columns = least(keys - begin, BLOCK);
        for (int64_t j = 0; j < columns; j += WIDE * LANES) {
            const float *columns_at = key_T + (begin + j) / PANEL * size * PANEL + j % PANEL;
            vecs = least(parts_of(columns - j, LANES), WIDE);
            product(t->q, size, 0, columns_at, PANEL, vecs, 0, 0, t->scores + j, BLOCK);
        }
        for (int r = 0; r < TILE; r++) soften(t, r, begin, columns, size, scale);
        for (int64_t j = 0; j < size; j += vecs * LANES) {
            vecs = panel(j, size);
            product(weights, columns, 0, value + begin * row + j, row, vecs, t->out + j, MAX_HEAD,
                    t->out + j, MAX_HEAD);
        }
    }
}

/* out [count, heads, size] of queries alike. Keys and values of key-value head g begin at
   g * key_head; their rows are key_row apart. Query i sees keys 0 .. last[i] of the `held` ones.
   `key_T` is scratch, [kv_heads, panels, size, PANEL] for the keys that are seen. `size` is a
   multiple of 16 and at most MAX_HEAD. */
int attend(const float *q, const float *key, int64_t key_head, int64_t key_row, const float *value,
           int64_t value_head, int64_t value_row, const int64_t *last, float scale, float *key_T,
           float *out, int64_t held, int64_t count, int64_t heads, int64_t kv_heads, int64_t size) {
    if (outside(last, count, held)) return 1;
    int64_t keys = 0, group = heads / kv_heads, rows = count * group;
    for (int64_t i = 0; i < count; i++) keys = last[i] < keys ? keys : last[i] + 1;
    int64_t tiles = tiles_of(rows), panels = parts_of(keys, PANEL);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < kv_heads * panels; n++) {
            int64_t from = n % panels * PANEL;
            transpose(key + n / panels * key_head + from * key_row, key_row, keys - from, size,
                 key_T + n * size * PANEL);
        }
        /* the last tiles of a head see the most keys: they are taken first */
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < kv_heads * tiles; n++) {
            int64_t g = n / tiles, first = (tiles - 1 - n % tiles) * TILE, most = 0;
            int64_t real = least(rows - first, TILE);
            Tile t;
            for (int r = 0; r < TILE; r++) { /* a short tile repeats its first row */
                int64_t m = first + (r < real ? r : 0);
                t.q[r] = q + (m / group * heads + g * group + m % group) * size;
                t.seen[r] = last[m / group] + 1;
                t.max[r] = -1e30f;
                t.sum[r] = 0.0f;
                most = t.seen[r] > most ? t.seen[r] : most;
                for (int64_t c = 0; c < size; c++) t.out[r * MAX_HEAD + c] = 0.0f;
            }
            attend_tile(&t, key_T + g * panels * size * PANEL, value + g * value_head, value_row,
                        most, size, scale);
            for (int64_t r = 0; r < real; r++) {
                int64_t m = first + r;
                float *to = out + (m / group * heads + g * group + m % group) * size;
                for (int64_t c = 0; c < size; c++) to[c] = t.out[r * MAX_HEAD + c] / t.sum[r];
            }
        }
    }
    return 0;
}

/* out [heads, size] of one query that sees all keys; they lie as above, `scores` is scratch,
   [heads, keys]. Counterpart of `RowOps.attend_one`. */
void attend_one(const float *q, const float *key, int64_t key_head, int64_t key_row,
                const float *value, int64_t value_head, int64_t value_row, float scale,
                float *scores, float *out, int64_t keys, int64_t heads, int64_t kv_heads,
                int64_t size) {
#pragma omp parallel for schedule(dynamic) if (keys * heads * size > LONG)
    for (int64_t h = 0; h < heads; h++) {
        int64_t g = h / (heads / kv_heads);
        const float *own = q + h * size;
        float *s = scores + h * keys, *to = out + h * size, top = -INFINITY, sum = 0.0f;
        for (int64_t i = 0; i < keys; i++) {
            const float *k = key + g * key_head + i * key_row;
            float dot = 0.0f;
            for (int64_t c = 0; c < size; c++) dot += own[c] * k[c];
            s[i] = dot * scale;
            top = s[i] > top ? s[i] : top;
        }
        for (int64_t i = 0; i < keys; i++) {
            s[i] = exponential(s[i] - top);
            sum += s[i];
        }
        for (int64_t c = 0; c < size; c++) to[c] = 0.0f;
        for (int64_t i = 0; i < keys; i++) {
            const float *v = value + g * value_head + i * value_row;
            float weight = s[i] / sum;
            for (int64_t c = 0; c < size; c++) to[c] += weight * v[c];
        }
    }
}
