/* linear_cross_entropy.c: x w^T + bias and its cross-entropy, chunk by chunk (formulas: ops.h). */
#include "cross_entropy.h"
#include "matmul.h"

typedef struct {
    Tensor *dx, *dw, *db, *dw_accum, *db_accum, *workspace;
} Gradients;

/* Rows n0 .. n0 + n of a matrix. */
static Tensor rows_of(const Tensor *t, int64_t n0, int64_t n) {
    Tensor part = *t;
    part.data = (char *)t->data + n0 * t->stride[0] * item_size(t->dtype);
    part.shape[0] = n;
    return part;
}

/* db_accum = or += the column sums of one chunk, each taken in double. */
static void add_columns(Tensor *db_accum, const Tensor *dlogits, bool first) {
    int64_t V = dlogits->shape[1];
    real *accum = db_accum->data;
    PARALLEL
    for (int64_t v = 0; v < V; v += STRIP) {
        int64_t width = least(V - v, STRIP);
        double sum[STRIP] = {0};
        real d[STRIP];
        for (int64_t n = 0; n < dlogits->shape[0]; n++) {
            load(d, dlogits, row_start(dlogits, n) + v, width);
            SIMD
            for (int64_t i = 0; i < width; i++) sum[i] += (double)d[i];
        }
        for (int64_t i = 0; i < width; i++)
            accum[v + i] = (real)(first ? sum[i] : (double)accum[v + i] + sum[i]);
    }
}

/* Columns v0 .. v0 + n of a matrix, transposed. */
static Tensor columns_of(const Tensor *t, int64_t v0, int64_t n) {
    Tensor part = *t;
    part.data = (char *)t->data + v0 * item_size(t->dtype);
    part.shape[1] = n;
    return transpose(&part);
}

/* dw = dlogits^T x where dlogits lies in dw's memory (ops.h). */
static const char *dw_in_two_parts(const Gradients *g, const Tensor *dlogits, const Tensor *x) {
    int64_t V = dlogits->shape[1], under = dw_rows_on_logits(dlogits, g->dw);
    int64_t item = item_size(dlogits->dtype);
    Tensor beyond = rows_of(g->dw, under, V - under), over = rows_of(g->dw, 0, under), spare;
    Tensor columns = columns_of(dlogits, under, V - under);
    const char *error = CPU(matmul)(&beyond, &columns, x, NULL, /*beta=*/0);
    if (error) return error;
    int64_t start = spare_logits(&spare, dlogits, under, item, g->workspace->shape[0]);
    spare.data = (char *)g->workspace->data + start;
    for (int64_t n = 0; n < spare.shape[0]; n++)
        memcpy((char *)spare.data + row_start(&spare, n) * item,
               (char *)dlogits->data + row_start(dlogits, n) * item, (size_t)(under * item));
    columns = transpose(&spare);
    return CPU(matmul)(&over, &columns, x, NULL, /*beta=*/0);
}

/* One chunk's share of the gradients, from its dlogits. */
static const char *chunk_gradients(const Gradients *g, const Tensor *dlogits, const Tensor *x,
                                   const Tensor *w, int64_t n0) {
    Tensor columns = transpose(dlogits);
    const char *error = NULL;
    if (g->dx) {
        Tensor dx = rows_of(g->dx, n0, x->shape[0]);
        error = CPU(matmul)(&dx, dlogits, w, NULL, /*beta=*/0);
    }
    if (g->db) add_columns(g->db_accum, dlogits, n0 == 0);
    if (!g->dw || error) return error;
    if (logits_in_dw(dlogits, g->dw, g->dw_accum)) return dw_in_two_parts(g, dlogits, x);
    return CPU(matmul)(g->dw_accum ? g->dw_accum : g->dw, &columns, x, NULL, n0 > 0);
}

static void round_rows(Tensor *to, const Tensor *from) {
    int64_t width = last_dim(to), N = rows(to);
    PARALLEL
    for (int64_t n = 0; n < N; n++) {
        for (int64_t v = 0; v < width; v += STRIP) {
            int64_t count = least(width - v, STRIP);
            real strip[STRIP];
            load(strip, from, row_start(from, n) + v, count);
            store(to, row_start(to, n) + v, strip, count);
        }
    }
}

static void round_sums(const Gradients *g) {
    if (g->dw_accum && g->dw) round_rows(g->dw, g->dw_accum);
    if (g->db) round_rows(g->db, g->db_accum);
}

const char *CPU(linear_cross_entropy_fwd)(
    Tensor *loss, Tensor *losses, Tensor *lse, Tensor *accuracy, Tensor *predicted, Tensor *dx,
    Tensor *dw, Tensor *db, Tensor *dw_accum, Tensor *db_accum, Tensor *logits_chunk, Tensor *stats,
    Tensor *workspace, const Tensor *x, const Tensor *w, const Tensor *target, const Tensor *bias,
    const Tensor *class_weight, const Tensor *num_items, const LossOptions *options, void *stream) {
    (void)stats, (void)stream;
    Gradients gradients = {dx, dw, db, dw_accum, db_accum, workspace};
    int64_t N = x->shape[0], C = logits_chunk->shape[0], correct = 0, n0 = 0;
    Scoring s;
    const char *error = CPU(scoring)(&s, target, class_weight, num_items, options, N, w->shape[0]);
    if (error) return error;
    Tensor columns = transpose(w);
    do { /* once even for no rows, which makes dw and db zero */
        int64_t n = least(N - n0, C);
        Tensor part = rows_of(x, n0, n), logits = rows_of(logits_chunk, 0, n);
        error = CPU(matmul)(&logits, &part, &columns, bias, /*beta=*/0);
        if (error) return error;
        bool needed = dx || dw || db;
        correct += CPU(score_rows)(&s, &logits, needed ? &logits : NULL, n0, n, losses, lse,
                                   /*lse_low=*/NULL, predicted, accuracy || predicted);
        if (needed) error = chunk_gradients(&gradients, &logits, &part, w, n0);
        if (error) return error;
        n0 += n;
    } while (n0 < N);
    round_sums(&gradients);
    CPU(reduce_losses)(&s, loss, accuracy, losses, lse, correct);
    return NULL;
}

const char *CPU(linear_cross_entropy_bwd)(
    Tensor *dx, Tensor *dw, Tensor *db, Tensor *dw_accum, Tensor *db_accum, Tensor *logits_chunk,
    Tensor *stats, Tensor *workspace, const Tensor *dloss, const Tensor *dlse, const Tensor *x,
    const Tensor *w, const Tensor *target, const Tensor *bias, const Tensor *class_weight,
    const Tensor *num_items, const Tensor *lse, const LossOptions *options, void *stream) {
    (void)stats, (void)lse, (void)stream;
    Gradients gradients = {dx, dw, db, dw_accum, db_accum, workspace};
    int64_t N = x->shape[0], C = logits_chunk->shape[0], n0 = 0;
    Scoring s;
    const char *error = CPU(scoring)(&s, target, class_weight, num_items, options, N, w->shape[0]);
    if (error) return error;
    Tensor columns = transpose(w);
    do {
        int64_t n = least(N - n0, C);
        Tensor part = rows_of(x, n0, n), logits = rows_of(logits_chunk, 0, n);
        error = CPU(matmul)(&logits, &part, &columns, bias, /*beta=*/0);
        if (error) return error;
        CPU(gradient_rows)(&s, &logits, &logits, n0, n, dloss, dlse);
        error = chunk_gradients(&gradients, &logits, &part, w, n0);
        if (error) return error;
        n0 += n;
    } while (n0 < N);
    round_sums(&gradients);
    return NULL;
}
