/* attention_bwd.c: the gradients of attention, from its saved lse (formulas: ops.h, tiles:
 * attention.h). Every sum runs in an order that the shapes alone decide. */
#include "attention.h"

/* S^T -> P^T, dP^T -> dS^T. */
static void dscores(const Problem *p, const Tile *t, const Work *w) {
    i64 n = t->c1 - t->c0;
    real inverse = p->softcap == 0 ? 0 : 1 / p->softcap;
    const real *lse = w->max + t->c0, *dot = w->sum + t->c0, *dlse = w->dlse + t->c0;
    for (i64 j = 0; j < t->nk; j++) {
        real *s = w->s + j * BLOCK_Q + t->c0, *ds = w->ds + j * BLOCK_Q + t->c0;
        SIMD
        for (i64 i = 0; i < n; i++) {
            real probability = exp_small(s[i] - lse[i]), tanh_s = s[i] * inverse;
            /* dlse last: with few keys, ds and dot all but cancel */
            ds[i] = probability * (ds[i] - dot[i] + dlse[i]) * (1 - tanh_s * tanh_s);
            s[i] = probability;
        }
    }
    fill_masked(p, t, w->s, 0);
    fill_masked(p, t, w->ds, 0);
}

static void bwd_tile(const Problem *p, const Tile *t, const Work *w) {
    i64 at = t->j0 * p->width;
    scores(p, t, w);
    product(w->ds + t->c0, BLOCK_Q, w->v + at, p->width, 1, w->dout_t + t->c0, BLOCK_Q, t->nk,
            t->c1 - t->c0, p->D, false);
    dscores(p, t, w);
    add_over_queries(p, t, w->dv + at, w->s, w->dout);
    add_over_queries(p, t, w->dk + at, w->ds, w->q);
    add_over_keys(p, t, w->o_t, w->ds, w->k + at);
}

/* dq of the block of queries i0 .. of one head, and its share of dk and dv. */
static void bwd_block(const Problem *p, const Sequence *s, i64 h, i64 i0, const Work *w) {
    i64 nq = least(BLOCK_Q, s->sq - i0), from, to, row = s->q0 + i0;
    i64 at = (s->b * p->Hq + h) * p->q.shape[1] + row;
    real factor[BLOCK_Q];
    Tile t;
    load_rows(p, w->dout, &p->dout, s->b, row, h, nq, 1);
    load_rows(p, w->q, &p->out, s->b, row, h, nq, 1);
    for (i64 i = 0; i < BLOCK_Q; i++) {
        real lse = i < nq ? p->lse[at + i] : 0, dot = 0;
        w->max[i] = lse == -INFINITY ? 0 : lse;
        for (i64 d = 0; i < nq && d < p->D; d++)
            dot += w->dout[i * p->width + d] * w->q[i * p->width + d];
        w->sum[i] = dot, w->dlse[i] = p->dlse && i < nq ? p->dlse[at + i] : 0;
        factor[i] = p->scale;
    }
    load_rows(p, w->q, &p->q, s->b, row, h, nq, p->scale);
    transpose_rows(p, w->q_t, w->q, nq);
    transpose_rows(p, w->dout_t, w->dout, nq);
    memset(w->o_t, 0, (size_t)(p->D * BLOCK_Q) * sizeof(real));
    key_range(p, s, i0, nq, &from, &to);
    for (i64 j = from; j < to; j += BLOCK_K) {
        if (make_tile(p, s, i0, nq, j, to, &t)) bwd_tile(p, &t, w);
    }
    store_transposed(p, &p->dq, s->b, row, h, nq, w->o_t, factor, w->q);
}

/* All of one key head of one sequence: dk and dv sum over its query heads, then its queries. */
static void bwd_head(const Problem *p, const Sequence *s, i64 kv_head, const Work *w) {
    i64 group = p->Hq / p->Hk;
    load_keys(p, s, kv_head, 0, s->sk, w);
    memset(w->dk, 0, (size_t)(s->sk * p->width) * sizeof(real));
    memset(w->dv, 0, (size_t)(s->sk * p->width) * sizeof(real));
    for (i64 h = kv_head * group; h < (kv_head + 1) * group; h++) {
        for (i64 i = 0; i < s->sq; i += BLOCK_Q) bwd_block(p, s, h, i, w);
    }
    for (i64 j = 0; j < s->sk; j++) {
        store_row(p, &p->dk, s->b, s->k0 + j, kv_head, w->dk + j * p->width);
        store_row(p, &p->dv, s->b, s->k0 + j, kv_head, w->dv + j * p->width);
    }
}

static const char *run_bwd(const Problem *p) {
    Work *work = make_work(p, true);
    if (!work) return "MemoryError: no memory for the tiles of attention";
#pragma omp parallel for schedule(dynamic) num_threads(p->threads)
    for (i64 item = 0; item < p->count * p->Hk; item++)
        bwd_head(p, &p->sequences[item / p->Hk], item % p->Hk, &work[omp_get_thread_num()]);
    free(work);
    return NULL;
}

const char *CPU(attention_bwd)(Tensor *dq, Tensor *dk, Tensor *dv, Tensor *workspace,
                               const Tensor *dout, const Tensor *dlse, const Tensor *q,
                               const Tensor *k, const Tensor *v, const Tensor *out,
                               const Tensor *lse, const Tensor *cu_q, const Tensor *cu_k,
                               int64_t max_q, int64_t max_k, double scale, int64_t left,
                               int64_t right, double softcap, int64_t deterministic, void *stream) {
    (void)workspace, (void)stream, (void)deterministic; /* the order of sums is always fixed */
    Problem p;
    set_problem(&p, q, k, v, out, lse, scale, left, right, softcap);
    p.dout = as_dense(dout), p.dq = as_dense(dq), p.dk = as_dense(dk), p.dv = as_dense(dv);
    p.dlse = dlse ? dlse->data : NULL;
    const char *error = find_sequences(&p, cu_q, cu_k, max_q, max_k);
    if (!error) error = run_bwd(&p);
    free(p.sequences);
    return error;
}
