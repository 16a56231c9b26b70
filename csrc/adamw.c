/* adamw.c: AdamW, the global norm of gradients, and scaling by a coefficient (formulas: ops.h).
 *
 * Each op runs over the concatenation of its tensors in chunks of CHUNK elements, so that many
 * small tensors are as well spread over the threads as one large one. */

/* Fused multiply-adds only where torch's CPU kernel has them: results equal to its last bit. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "cpu.h"
#include "random.h"

enum { CHUNK = 1 << 14 }; /* divides 2^32: the high half of the flat index is one per chunk */

/* Where every tensor begins in the concatenation: `at[n]`, and the end in `at[list->n]`. */
static int64_t *flat_starts(const TensorList *list) {
    int64_t *at = malloc((size_t)(list->n + 1) * sizeof *at);
    if (!at) return NULL;
    at[0] = 0;
    for (int64_t n = 0; n < list->n; n++) {
        at[n + 1] = at[n] + elements(&list->items[n]);
    }
    return at;
}

/* A run of at most STRIP elements of one tensor, within one chunk. */
typedef struct {
    int64_t tensor, from, n; /* from: in the tensor */
    int64_t flat;            /* of the first element, in the concatenation */
} Run;

/* The run that begins at `flat`; `run->tensor` is a lower bound, or -1 to search. */
static bool next_run(Run *run, int64_t flat, int64_t end, const int64_t *at, int64_t tensors) {
    if (flat >= end) return false;
    if (run->tensor < 0) {
        int64_t low = 0, high = tensors;
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            *(at[middle] <= flat ? &low : &high) = middle;
        }
        run->tensor = low;
    }
    while (at[run->tensor + 1] <= flat) run->tensor++; /* past empty tensors, too */
    int64_t stop = at[run->tensor + 1] < end ? at[run->tensor + 1] : end;
    run->from = flat - at[run->tensor];
    run->n = least(stop - flat, STRIP);
    run->flat = flat;
    return true;
}

static int64_t chunk_end(int64_t chunk, int64_t total) {
    return total - chunk * CHUNK < CHUNK ? total : (chunk + 1) * CHUNK;
}

/* The run's elements as reals: the tensor's own memory where it holds reals, else a copy. */
static inline real *run_values(real *buffer, const Tensor *t, const Run *run) {
    return (real *)load_or_view(buffer, t, run->from, run->n);
}

/* ---- Global norm ----------------------------------------------------------------------------- */

/* Many sums at once: one would wait for each addition. */
enum { LANES = 32 };

static double sum_of_squares(const real *v, int64_t n) {
    double lane[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        SIMD
        for (int k = 0; k < LANES; k++) lane[k] += (double)v[i + k] * v[i + k];
    }
    for (; i < n; i++) sum += (double)v[i] * v[i];
    for (int k = 0; k < LANES; k++) sum += lane[k];
    return sum;
}

static double chunk_sum(const TensorList *list, const int64_t *at, int64_t chunk) {
    double sum = 0;
    Run run = {.tensor = -1};
    int64_t end = chunk_end(chunk, at[list->n]);
    for (int64_t i = chunk * CHUNK; next_run(&run, i, end, at, list->n); i += run.n) {
        real buffer[STRIP];
        sum += sum_of_squares(run_values(buffer, &list->items[run.tensor], &run), run.n);
    }
    return sum;
}

const char *CPU(global_norm)(Tensor *norm, Tensor *coef, Tensor *partial, const TensorList *tensors,
                             double max_norm, void *stream) {
    (void)stream;
    int64_t *at = flat_starts(tensors);
    if (!at) return "MemoryError: no memory for the table of tensors";
    int64_t total = at[tensors->n], chunks = (total + CHUNK - 1) / CHUNK, P = elements(partial);
    /* Partial norms, not sums of squares: those of 1e-30 and 1e30 leave float's range. */
    real *norms = partial->data;
    PARALLEL
    for (int64_t p = 0; p < P; p++) {
        double sum = 0;
        for (int64_t chunk = p; chunk < chunks; chunk += P) sum += chunk_sum(tensors, at, chunk);
        norms[p] = (real)sqrt(sum);
    }
    free(at);
    double sum = 0;
    for (int64_t p = 0; p < P; p++) sum += (double)norms[p] * norms[p];
    double whole = sqrt(sum), factor = max_norm / (whole + 1e-6);
    *(real *)norm->data = (real)whole;
    if (coef) *(real *)coef->data = (real)(factor > 1 ? 1 : factor); /* NaN stays NaN */
    return NULL;
}

/* ---- Scale ----------------------------------------------------------------------------------- */

const char *CPU(scale)(const TensorList *tensors, const Tensor *coef, void *stream) {
    (void)stream;
    real factor = *(const real *)coef->data;
    if (factor == 1) return NULL;
    int64_t *at = flat_starts(tensors);
    if (!at) return "MemoryError: no memory for the table of tensors";
    int64_t total = at[tensors->n], chunks = (total + CHUNK - 1) / CHUNK;
    PARALLEL
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        Run run = {.tensor = -1};
        int64_t end = chunk_end(chunk, total);
        for (int64_t i = chunk * CHUNK; next_run(&run, i, end, at, tensors->n); i += run.n) {
            const Tensor *t = &tensors->items[run.tensor];
            real buffer[STRIP], *v = run_values(buffer, t, &run);
            SIMD
            for (int64_t k = 0; k < run.n; k++) v[k] *= factor;
            if (v == buffer) store(t, run.from, v, run.n);
        }
    }
    free(at);
    return NULL;
}

/* ---- AdamW ----------------------------------------------------------------------------------- */

/* What one parameter's elements have in common, computed in double and rounded once. */
typedef struct {
    real coef, grad_scale;                /* coef: negative to maximize */
    real decay, beta2, g_share, g2_share; /* 1 - lr wd, beta2, 1 - beta1, 1 - beta2 */
    real correction, step_size, eps;      /* sqrt(1 - beta2^t), lr / (1 - beta1^t) */
} Factors;

static Factors factors(double lr, double step, const Tensor *coef, const Tensor *grad_scale,
                       const AdamWOptions *o) {
    return (Factors){
        .coef = (coef ? *(const real *)coef->data : 1) * (o->maximize ? -1 : 1),
        .grad_scale = grad_scale ? (real) * (const float *)grad_scale->data : 1,
        .decay = (real)(1 - lr * o->weight_decay),
        .beta2 = (real)o->beta2,
        .g_share = (real)(1 - o->beta1),
        .g2_share = (real)(1 - o->beta2),
        .correction = (real)sqrt(1 - pow(o->beta2, step)),
        .step_size = (real)(lr / (1 - pow(o->beta1, step))),
        .eps = (real)o->eps,
    };
}

static inline real multiply_add(real a, real b, real c) {
#ifdef __FMA__
    return REAL(fma)(a, b, c);
#else
    return a * b + c;
#endif
}

/* Element i of memory that holds bf16 or reals. */
static inline real get(const void *x, int64_t i, bool bf16) {
    return bf16 ? (real)bf16_to_float(((const uint16_t *)x)[i]) : ((const real *)x)[i];
}

static inline void put(void *x, int64_t i, real value, bool bf16, bool random, uint32_t noise) {
    if (!bf16) {
        ((real *)x)[i] = value;
    } else if (random) {
        ((uint16_t *)x)[i] = float_to_bf16_stochastic((float)value, noise);
    } else {
        ((uint16_t *)x)[i] = float_to_bf16((float)value);
    }
}

/* One loop for each constant `bf16` and `random`; `first`: the flat index of element 0. */
__attribute__((always_inline)) static inline void update(void *p, const void *g, void *m, void *v,
                                                         int64_t count, const Factors *factors,
                                                         const RandomKey *key, uint32_t first,
                                                         bool bf16, bool random) {
    const Factors f = *factors;
    const RandomKey k = random ? *key : (RandomKey){0};
    /* m + share (g - m) from its nearer end, as torch's lerp: exact for beta1 = 0. */
    const bool from_m = f.g_share < (real)0.5;
    const real share = from_m ? f.g_share : f.g_share - 1;
    const int32_t n = (int32_t)count;
    SIMD
    for (int32_t i = 0; i < n; i++) {
        real grad = get(g, i, bf16) * f.coef, avg = get(m, i, bf16), square = get(v, i, bf16);
        avg = multiply_add(share, grad - avg, from_m ? avg : grad);
        square = multiply_add(f.g2_share * grad, grad, f.beta2 * square);
        real denominator = REAL(sqrt)(square) / f.correction + f.eps;
        real value = get(p, i, bf16) * f.decay - f.step_size * avg / denominator;
        uint32_t inner = random ? random_inner(k, first + (uint32_t)i) : 0;
        uint32_t word = random ? random_word(k, inner, 0) : 0;
        put(p, i, value, bf16, random, word & 0xffff);
        put(v, i, square, bf16, random, word >> 16);
        put(m, i, avg, bf16, random, random ? random_word(k, inner, 1) >> 16 : 0);
    }
}

/* Which of a run's three results is rounded. */
enum { PARAM, EXP_AVG, EXP_AVG_SQ };

/* A result of reals into a tensor of another dtype; random bits as in update(). */
static void store_result(const Tensor *t, const real *in, const Run *run, const RandomKey *key,
                         int which) {
    if (!key || t->dtype != BF16) {
        if (in != (const real *)t->data + run->from) store(t, run->from, in, run->n);
        return;
    }
    const RandomKey k = *key;
    uint16_t *out = (uint16_t *)t->data + run->from;
    uint32_t first = (uint32_t)run->flat, shift = which == PARAM ? 0 : 16;
    SIMD
    for (int32_t i = 0; i < (int32_t)run->n; i++) {
        uint32_t inner = random_inner(k, first + (uint32_t)i);
        uint32_t noise = random_word(k, inner, which == EXP_AVG) >> shift & 0xffff;
        out[i] = float_to_bf16_stochastic((float)in[i], noise);
    }
}

static void step_any(const Tensor *p, const Tensor *g, const Tensor *m, const Tensor *v,
                     const Run *run, const Factors *f, const RandomKey *key) {
    real buffer[4][STRIP], scaled[STRIP];
    real *values = run_values(buffer[0], p, run), *grads = run_values(buffer[1], g, run);
    real *avgs = run_values(buffer[2], m, run), *squares = run_values(buffer[3], v, run);
    if (f->grad_scale != 1) { /* NaN too */
        real grad_scale = f->grad_scale;
        SIMD
        for (int64_t i = 0; i < run->n; i++) scaled[i] = grads[i] / grad_scale;
        grads = scaled;
    }
    update(values, grads, avgs, squares, run->n, f, NULL, 0, false, false);
    store_result(p, values, run, key, PARAM);
    store_result(m, avgs, run, key, EXP_AVG);
    store_result(v, squares, run, key, EXP_AVG_SQ);
}

/* bf16 throughout, converted in registers. */
static void step_bf16(const Tensor *p, const Tensor *g, const Tensor *m, const Tensor *v,
                      const Run *run, const Factors *f, const RandomKey *key) {
    uint16_t *values = (uint16_t *)p->data + run->from, *avgs = (uint16_t *)m->data + run->from;
    uint16_t *grads = (uint16_t *)g->data + run->from, *squares = (uint16_t *)v->data + run->from;
    uint32_t first = (uint32_t)run->flat;
    if (key) {
        update(values, grads, avgs, squares, run->n, f, key, first, true, true);
    } else {
        update(values, grads, avgs, squares, run->n, f, NULL, first, true, false);
    }
}

static void step_run(const Tensor *p, const Tensor *g, const Tensor *m, const Tensor *v,
                     const Run *run, const Factors *f, const RandomKey *key) {
    bool all_bf16 = p->dtype == BF16 && m->dtype == BF16 && f->grad_scale == 1;
    (all_bf16 ? step_bf16 : step_any)(p, g, m, v, run, f, key);
}

const char *CPU(adamw_step)(const TensorList *p, const TensorList *g, const TensorList *m,
                            const TensorList *v, const TensorList *steps, const Tensor *coef,
                            const Tensor *grad_scale, const Tensor *found_inf, const Tensor *lr,
                            const AdamWOptions *o, void *stream) {
    (void)stream;
    if (found_inf && *(const float *)found_inf->data != 0) return NULL;
    for (int64_t n = 0; n < steps->n; n++) {
        if (!(*(const float *)steps->items[n].data >= 1))
            return "ValueError: steps: expected numbers >= 1, this step counted";
    }
    int64_t *at = flat_starts(p);
    if (!at) return "MemoryError: no memory for the table of tensors";
    int64_t total = at[p->n], chunks = (total + CHUNK - 1) / CHUNK;
    double rate = lr ? *(const float *)lr->data : o->lr;
    PARALLEL
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        Run run = {.tensor = -1};
        Factors f = {0};
        RandomKey key = {0};
        int64_t end = chunk_end(chunk, total), known = -1;
        for (int64_t i = chunk * CHUNK; next_run(&run, i, end, at, p->n); i += run.n) {
            int64_t n = run.tensor;
            if (n != known) {
                float step = *(const float *)steps->items[n].data;
                f = factors(rate, step, coef, grad_scale, o);
                key = random_key((uint64_t)o->seed, (uint64_t)step, (uint64_t)run.flat >> 32);
                known = n;
            }
            step_run(&p->items[n], &g->items[n], &m->items[n], &v->items[n], &run, &f,
                     o->stochastic_rounding ? &key : NULL);
        }
    }
    free(at);
    return NULL;
}
