/* overlap.c: whether two views of memory share a byte, or one reaches a byte twice. */
#include "tensor.h"

#include <string.h>

typedef struct {
    int64_t stride, count; /* in bytes */
} Span;

/* The bytes of `t` as *base + sum_i k_i * stride_i, 0 <= k_i < count_i: strides positive and
 * rising, dense dimensions merged, so that spans[0] is a block of bytes. Returns how many. */
static int to_spans(const Tensor *t, Span *spans, uintptr_t *base) {
    int n = 1;
    int64_t size = item_size(t->dtype);
    *base = (uintptr_t)t->data;
    spans[0] = (Span){1, size};
    for (int d = 0; d < t->ndim; d++) {
        Span new = {t->stride[d] * size, t->shape[d]};
        if (new.count == 1 || new.stride == 0) continue;
        if (new.stride < 0) {
            *base += (uintptr_t)((new.count - 1) * new.stride);
            new.stride = -new.stride;
        }
        int at = n++;
        for (; at > 1 && spans[at - 1].stride > new.stride; at--) spans[at] = spans[at - 1];
        spans[at] = new;
    }
    int merged = 1;
    for (int i = 1; i < n; i++) {
        Span *last = &spans[merged - 1];
        if (spans[i].stride == last->stride * last->count) {
            last->count *= spans[i].count;
        } else {
            spans[merged++] = spans[i];
        }
    }
    return merged;
}

/* stride * k with low <= k <= high */
typedef struct {
    int64_t stride, low, high;
} Term;

static int add_terms(Term *terms, int n, const Span *spans, int count, bool minus) {
    for (int i = 0; i < count; i++) {
        int at = 0;
        while (at < n && terms[at].stride > spans[i].stride) at++;
        if (at == n || terms[at].stride != spans[i].stride) {
            memmove(&terms[at + 1], &terms[at], (size_t)(n++ - at) * sizeof *terms);
            terms[at] = (Term){.stride = spans[i].stride};
        }
        *(minus ? &terms[at].low : &terms[at].high) += (minus ? -1 : 1) * (spans[i].count - 1);
    }
    return n;
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

/* Whether sum_i stride_i * k_i = target for some k, strides falling to 1. Exact: a stride that is
 * as long as all below it together leaves two values of k to try, and arrays are made of such.
 * Where they are not and the search grows long, the answer is yes. */
static bool has_solution(const Term *term, int n, int64_t target, int *steps) {
    if (n == 0) return target == 0;
    int64_t low = 0, high = 0;
    for (int i = 1; i < n; i++) {
        low += term[i].stride * term[i].low;
        high += term[i].stride * term[i].high;
    }
    int64_t first = -floor_div(high - target, term->stride);
    int64_t last = floor_div(target - low, term->stride);
    if (first < term->low) first = term->low;
    if (last > term->high) last = term->high;
    for (int64_t k = first; k <= last; k++) {
        if (--*steps < 0 || has_solution(term + 1, n - 1, target - term->stride * k, steps))
            return true;
    }
    return false;
}

/* Whether two arguments share a byte. Slices of one packed buffer, whose ranges interleave, do
 * not. */
bool overlap(const Tensor *a, const Tensor *b) {
    if (a->device != b->device || a->high <= b->low || b->high <= a->low) return false;
    uintptr_t a_base, b_base;
    Span spans[MAX_DIMS + 1];
    Term terms[2 * (MAX_DIMS + 1)];
    int n = add_terms(terms, 0, spans, to_spans(a, spans, &a_base), false);
    n = add_terms(terms, n, spans, to_spans(b, spans, &b_base), true);
    int steps = 1 << 16;
    return has_solution(terms, n, (int64_t)(b_base - a_base), &steps);
}

bool same_view(const Tensor *a, const Tensor *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return false;
    for (int d = 0; d < a->ndim; d++) {
        if (a->shape[d] != b->shape[d] || (a->shape[d] > 1 && a->stride[d] != b->stride[d]))
            return false;
    }
    return true;
}

bool is_dense(const Tensor *t) {
    int64_t dense = 1;
    for (int d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] != 1 && t->stride[d] != dense) return false;
        dense *= t->shape[d];
    }
    return true;
}

/* Whether each dimension steps over all that lies below it, as in every slice of an array in C
 * order. */
static bool is_nested(const Tensor *t) {
    int64_t reach = 0;
    for (int d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] <= 1) continue;
        if (t->stride[d] <= reach) return false;
        reach += (t->shape[d] - 1) * t->stride[d];
    }
    return true;
}

/* Whether an element may be reached in two ways: a stride of 0, or one shorter than what lies
 * below it. */
bool repeats_itself(const Tensor *t) {
    /* NumPy gives an empty array strides of 0 */
    if (t->low == t->high || is_nested(t)) return false;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] > 1 && t->stride[d] == 0) return true;
    }
    Span spans[MAX_DIMS + 1];
    uintptr_t base;
    int64_t reach = 0;
    int n = to_spans(t, spans, &base);
    for (int i = 0; i < n; i++) {
        if (i && spans[i].stride <= reach) return true;
        reach += (spans[i].count - 1) * spans[i].stride;
    }
    return false;
}
