/* embedding.c: rows of a table by their ids, and the sum of gradients per row (formulas: ops.h). */
#include "cpu.h"

/* Columns that one thread sums at a time: every id may be the same, so columns are split and not
 * ids. */
enum { COLUMNS = 64 };

static int64_t id_at(const Tensor *ids, int64_t n) {
    n *= ids->stride[0];
    return ids->dtype == I32 ? ((const int32_t *)ids->data)[n] : ((const int64_t *)ids->data)[n];
}

static bool all_below(const Tensor *ids, int64_t bound) {
    for (int64_t n = 0; n < ids->shape[0]; n++) {
        int64_t id = id_at(ids, n);
        if (id < 0 || id >= bound) return false;
    }
    return true;
}

const char *CPU(embedding_fwd)(Tensor *y, const Tensor *ids, const Tensor *w, void *stream) {
    (void)stream;
    int64_t N = ids->shape[0], size = item_size(w->dtype);
    if (!all_below(ids, w->shape[0]))
        return "IndexError: ids: expected 0 .. V - 1, got an id outside the table";
    PARALLEL
    for (int64_t n = 0; n < N; n++) {
        const char *from = (const char *)w->data + id_at(ids, n) * w->stride[0] * size;
        memcpy((char *)y->data + n * y->stride[0] * size, from, (size_t)(last_dim(w) * size));
    }
    return NULL;
}

static bool is_ascending(const Tensor *ids) {
    for (int64_t i = 1; i < ids->shape[0]; i++)
        if (id_at(ids, i - 1) > id_at(ids, i)) return false;
    return true;
}

static int by_id_and_place(const void *a, const void *b) {
    const int64_t *x = a, *y = b;
    int column = x[0] == y[0];
    return x[column] < y[column] ? -1 : x[column] > y[column];
}

/* `sorted` holds pairs of an id and its place; by_id and order become the columns of these. */
static void sort(Tensor *sorted, const Tensor *ids, Tensor *by_id, Tensor *order) {
    int64_t *pair = sorted->data, N = ids->shape[0];
    for (int64_t n = 0; n < N; n++) pair[2 * n] = id_at(ids, n), pair[2 * n + 1] = n;
    qsort(pair, (size_t)N, 2 * sizeof *pair, by_id_and_place);
    *by_id = (Tensor){.data = pair, .shape = {N}, .stride = {2}, .ndim = 1, .dtype = I64};
    *order = *by_id;
    order->data = pair + 1;
}

static void clear(Tensor *dw) {
    int64_t size = item_size(dw->dtype), V = dw->shape[0];
    PARALLEL
    for (int64_t v = 0; v < V; v++)
        memset((char *)dw->data + v * dw->stride[0] * size, 0, (size_t)(last_dim(dw) * size));
}

/* dw[v, h .. h + n] = the sum of the rows order[begin] .. order[end - 1] of dy. */
static void sum_rows(Tensor *dw, const Tensor *dy, const Tensor *order, int64_t begin, int64_t end,
                     int64_t v, int64_t h, int64_t n) {
    real sum[COLUMNS] = {0}, row[COLUMNS];
    for (int64_t i = begin; i < end; i++) {
        load(row, dy, id_at(order, i) * dy->stride[0] + h, n);
        SIMD
        for (int64_t c = 0; c < n; c++) sum[c] += row[c];
    }
    store(dw, v * dw->stride[0] + h, sum, n);
}

/* A thread has columns, so no row's sum is cut into pieces: partial is not used. */
const char *CPU(embedding_bwd)(Tensor *dw, Tensor *partial, Tensor *sorted, const Tensor *dy,
                               const Tensor *ids, const Tensor *order, void *stream) {
    (void)stream, (void)partial;
    int64_t N = ids->shape[0], H = last_dim(dw);
    Tensor by_id, places;
    if (!all_below(ids, dw->shape[0]))
        return "IndexError: ids: expected 0 .. V - 1, got an id outside the table";
    if (!order && N) sort(sorted, ids, &by_id, &places), ids = &by_id, order = &places;
    if (!is_ascending(ids)) return "ValueError: ids: expected ascending order";
    if (N && !all_below(order, N))
        return "IndexError: order: expected 0 .. N - 1, got an index outside";
    clear(dw);
    PARALLEL
    for (int64_t h = 0; h < H; h += COLUMNS) {
        int64_t n = least(H - h, COLUMNS);
        for (int64_t begin = 0, end; begin < N; begin = end) {
            int64_t v = id_at(ids, begin);
            for (end = begin + 1; end < N && id_at(ids, end) == v;) end++;
            sum_rows(dw, dy, order, begin, end, v, h, n);
        }
    }
    return NULL;
}
