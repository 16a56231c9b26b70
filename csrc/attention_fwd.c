/* attention_fwd.c: attention with an online softmax (formulas: ops.h, tiles: attention.h). */
#include "attention.h"

/* Scores -> probabilities relative to the running maxima; sums and o_t follow the new maxima. */
static void online_softmax(const Problem *p, const Tile *t, const Work *w) {
    real top[BLOCK_Q], base[BLOCK_Q], sum[BLOCK_Q], fade[BLOCK_Q];
    i64 n = t->c1 - t->c0;
    real *max = w->max + t->c0, *total = w->sum + t->c0, *tile = w->s + t->c0;
    memcpy(top, max, (size_t)n * sizeof(real));
    for (i64 j = 0; j < t->nk; j++) {
        const real *s = tile + j * BLOCK_Q;
        SIMD
        for (i64 i = 0; i < n; i++) top[i] = s[i] > top[i] ? s[i] : top[i];
    }
    int moved = 0;
#pragma omp simd reduction(| : moved)
    for (i64 i = 0; i < n; i++) {
        base[i] = top[i] == -INFINITY ? 0 : top[i]; /* -inf - -inf would be NaN */
        fade[i] = exp_small(max[i] - base[i]);
        moved |= top[i] != max[i];
        sum[i] = 0;
    }
    for (i64 j = 0; j < t->nk; j++) {
        real *s = tile + j * BLOCK_Q;
        SIMD
        for (i64 i = 0; i < n; i++) {
            s[i] = exp_small(s[i] - base[i]);
            sum[i] += s[i];
        }
    }
    SIMD
    for (i64 i = 0; i < n; i++) total[i] = total[i] * fade[i] + sum[i];
    if (!moved) return;
    memcpy(max, top, (size_t)n * sizeof(real));
    for (i64 d = 0; d < p->D; d++) {
        real *o = w->o_t + d * BLOCK_Q + t->c0;
        SIMD
        for (i64 i = 0; i < n; i++) o[i] *= fade[i];
    }
}

/* The block of queries i0 .. of one head. */
static void fwd_block(const Problem *p, const Sequence *s, i64 h, i64 i0, const Work *w) {
    i64 nq = least(BLOCK_Q, s->sq - i0), from, to;
    Tile t;
    load_rows(p, w->q, &p->q, s->b, s->q0 + i0, h, nq, p->scale);
    transpose_rows(p, w->q_t, w->q, nq);
    memset(w->o_t, 0, (size_t)(p->D * BLOCK_Q) * sizeof(real));
    for (i64 i = 0; i < BLOCK_Q; i++) w->max[i] = -INFINITY, w->sum[i] = 0;
    key_range(p, s, i0, nq, &from, &to);
    for (i64 j = from; j < to; j += BLOCK_K) {
        if (!make_tile(p, s, i0, nq, j, to, &t)) continue;
        scores(p, &t, w);
        fill_masked(p, &t, w->s, -INFINITY);
        online_softmax(p, &t, w);
        add_over_keys(p, &t, w->o_t, w->s, w->v + j * p->width);
    }
    real factor[BLOCK_Q], *lse = p->lse + (s->b * p->Hq + h) * p->q.shape[1] + s->q0 + i0;
    for (i64 i = 0; i < nq; i++) {
        factor[i] = w->sum[i] == 0 ? 0 : 1 / w->sum[i];
        lse[i] = w->sum[i] == 0 ? -INFINITY : w->max[i] + REAL(log)(w->sum[i]);
    }
    store_transposed(p, &p->out, s->b, s->q0 + i0, h, nq, w->o_t, factor, w->q);
}

/* The queries of one head from i0 on, CHUNK of them. */
static void fwd_chunk(const Problem *p, const Sequence *s, i64 h, i64 i0, const Work *w) {
    i64 end = least(s->sq, i0 + CHUNK), from, to;
    key_range(p, s, i0, end - i0, &from, &to);
    load_keys(p, s, h / (p->Hq / p->Hk), from, to, w);
    for (; i0 < end; i0 += BLOCK_Q) fwd_block(p, s, h, i0, w);
}

static const char *run_fwd(const Problem *p) {
    i64 chunks = 0;
    for (i64 s = 0; s < p->count; s++) chunks += (p->sequences[s].sq + CHUNK - 1) / CHUNK;
    Work *work = make_work(p, false);
    i64(*chunk)[2] = calloc((size_t)chunks + 1, sizeof *chunk); /* sequence, first query */
    if (!work || !chunk) {
        free(work), free(chunk);
        return "MemoryError: no memory for the tiles of attention";
    }
    for (i64 s = 0, n = 0; s < p->count; s++) {
        for (i64 i = 0; i < p->sequences[s].sq; i += CHUNK) chunk[n][0] = s, chunk[n++][1] = i;
    }
#pragma omp parallel for schedule(dynamic) num_threads(p->threads)
    for (i64 item = 0; item < chunks * p->Hq; item++) {
        const i64 *at = chunk[item / p->Hq];
        fwd_chunk(p, &p->sequences[at[0]], item % p->Hq, at[1], &work[omp_get_thread_num()]);
    }
    free(work), free(chunk);
    return NULL;
}

const char *CPU(attention_fwd)(Tensor *out, Tensor *lse, Tensor *workspace, const Tensor *q,
                               const Tensor *k, const Tensor *v, const Tensor *cu_q,
                               const Tensor *cu_k, int64_t max_q, int64_t max_k, double scale,
                               int64_t left, int64_t right, double softcap, void *stream) {
    (void)workspace, (void)stream;
    Problem p;
    set_problem(&p, q, k, v, out, lse, scale, left, right, softcap);
    const char *error = find_sequences(&p, cu_q, cu_k, max_q, max_k);
    if (!error) error = run_fwd(&p);
    free(p.sequences);
    return error;
}
