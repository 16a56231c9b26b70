/* cross_entropy.c: cross-entropy of given logits (formulas: ops.h). */
#include "cross_entropy.h"

/* Row n's label, or -1 where the row is ignored. */
static int64_t label(const Scoring *s, int64_t n) {
    const LossOptions *o = s->options;
    int64_t at = n % o->seq;
    if (o->shift > o->seq - 1 - at || o->shift < -at) return -1;
    n += o->shift;
    int64_t y = s->target->dtype == I32 ? ((const int32_t *)s->target->data)[n]
                                        : ((const int64_t *)s->target->data)[n];
    if (y == o->ignore_index) return -1;
    return y < 0 || y >= s->V ? INT64_MIN : y;
}

static double class_weight(const Scoring *s, int64_t y) {
    return s->class_weight ? (double)((const real *)s->class_weight->data)[y] : 1;
}

const char *CPU(scoring)(Scoring *s, const Tensor *target, const Tensor *weights,
                         const Tensor *num_items, const LossOptions *options, int64_t N,
                         int64_t V) {
    *s = (Scoring){.target = target, .class_weight = weights, .options = options, .V = V};
    for (int64_t n = 0; n < N; n++) {
        int64_t y = label(s, n);
        if (y == INT64_MIN)
            return "IndexError: Target out of bounds: a label is neither ignore_index nor one of "
                   "the classes";
        if (y < 0) continue;
        s->count++;
        s->weight_sum += class_weight(s, y);
    }
    for (int64_t v = 0; v < V; v++) s->class_sum += class_weight(s, v);
    s->scale = s->z_scale = 1;
    if (options->reduction == REDUCE_NONE) return NULL;
    if (num_items) {
        s->scale = s->z_scale = 1 / (double)*(const real *)num_items->data;
    } else if (options->reduction == REDUCE_MEAN) { /* over no row: a loss of 0 / 0 */
        s->scale = 1 / s->weight_sum;
        s->z_scale = 1 / (double)s->count;
    }
    return NULL;
}

/* One strip of a row, after softcap. */
static inline void load_logits(real *z, const Tensor *logits, int64_t at, int64_t n, real cap) {
    load(z, logits, at, n);
    if (cap == 0) return;
    SIMD
    for (int64_t i = 0; i < n; i++) z[i] = cap * vtanh(z[i] / cap);
}

static inline real strip_max(const real *z, int64_t n) {
    real max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; i++) max = z[i] > max ? z[i] : max;
    return max;
}

/* In double: beside the 1 of a confident row, floats would lose the small terms. */
static inline double strip_exp_sum(const real *z, int64_t n, real shift) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)vexp(z[i] - shift);
    return sum;
}

/* lse = max + log_sum, used by parts: beside large logits their sum would lose log_sum. For label
 * smoothing weighted = sum_v cw_v (z_v - origin). */
typedef struct {
    double max, log_sum, label_logit, origin, weighted;
    int64_t largest; /* the largest logit's index, the first of equals */
} Row;

static inline double row_lse(const Row *row) { return row->max + row->log_sum; }

/* One pass over a row's logits, the sum of exponentials rescaled whenever the maximum grows. */
static Row scan(const Scoring *s, const Tensor *logits, int64_t at, int64_t y, bool largest) {
    Row row = {0};
    double sum = 0;
    real max = -INFINITY, z[STRIP], cap = (real)s->options->softcap;
    for (int64_t v = 0; v < s->V; v += STRIP) {
        int64_t n = least(s->V - v, STRIP);
        load_logits(z, logits, at + v, n, cap);
        real top = strip_max(z, n);
        if (top > max) {
            int64_t i = 0;
            while (largest && z[i] != top) i++;
            row.largest = v + i;
            sum *= exp((double)max - (double)top);
            max = top;
        }
        sum += strip_exp_sum(z, n, max == -INFINITY ? 0 : max);
        if (y >= v && y < v + n) row.label_logit = z[y - v];
        if (s->options->label_smoothing == 0) continue;
        if (v == 0 && isfinite(z[0])) row.origin = z[0];
        for (int64_t i = 0; i < n; i++)
            row.weighted += class_weight(s, v + i) * ((double)z[i] - row.origin);
    }
    row.max = max, row.log_sum = log(sum);
    return row;
}

static double row_loss(const Scoring *s, const Row *row, int64_t y) {
    double e = s->options->label_smoothing;
    double loss = (1 - e) * class_weight(s, y) * (row->max - row->label_logit + row->log_sum);
    double above = row->max - row->origin + row->log_sum;
    if (e != 0) loss += e / (double)s->V * (s->class_sum * above - row->weighted);
    return loss + s->options->z_loss * row_lse(row) * row_lse(row);
}

/* dlogits of one row: with g and gz the gradients of its loss's first two terms and its z term,
 *   d z_v = P p_v - g (1 - e) cw_y [v = y] - g e / V cw_v,  p_v = exp(z_v - lse). */
static void gradient_row(const Scoring *s, const Tensor *dlogits, const Tensor *logits, int64_t row,
                         int64_t y, const Row *of, double g, double gz, double dlse) {
    double e = s->options->label_smoothing, smooth = g * e / (double)s->V;
    double own = 0, other = dlse; /* an ignored row has lse's gradient alone */
    if (y >= 0) {
        own = g * (1 - e) * class_weight(s, y);
        other += smooth * s->class_sum + gz * 2 * s->options->z_loss * row_lse(of);
    }
    bool zero = y < 0 && dlse == 0;
    real factor = (real)(own + other), max = (real)of->max, log_sum = (real)of->log_sum;
    real rest = (real)(of->log_sum - log_sum);
    real z[STRIP], d[STRIP] = {0}, cap = (real)s->options->softcap;
    if (!isfinite(log_sum)) rest = 0;
    for (int64_t v = 0; v < s->V; v += STRIP) {
        int64_t n = least(s->V - v, STRIP);
        if (!zero) {
            load_logits(z, logits, row_start(logits, row) + v, n, cap);
            SIMD
            for (int64_t i = 0; i < n; i++) d[i] = factor * vexp(z[i] - max - log_sum - rest);
            if (y >= v && y < v + n) { /* p_y - 1 is exact where it matters */
                double p = exp((double)z[y - v] - of->max - of->log_sum);
                d[y - v] = (real)(own * (p - 1) + other * p);
            }
            if (y >= 0 && e != 0)
                for (int64_t i = 0; i < n; i++) d[i] -= (real)(smooth * class_weight(s, v + i));
            if (cap != 0) {
                SIMD
                for (int64_t i = 0; i < n; i++) d[i] *= 1 - z[i] / cap * (z[i] / cap);
            }
        }
        store(dlogits, row_start(dlogits, row) + v, d, n);
    }
}

int64_t CPU(score_rows)(const Scoring *s, const Tensor *logits, const Tensor *dlogits, int64_t n0,
                        int64_t n, Tensor *losses, Tensor *lse, Tensor *lse_low, Tensor *predicted,
                        bool largest) {
    int64_t correct = 0;
#pragma omp parallel for schedule(static) num_threads(cpu_threads()) reduction(+ : correct)
    for (int64_t i = 0; i < n; i++) {
        int64_t y = label(s, n0 + i);
        Row row = scan(s, logits, row_start(logits, i), y, largest);
        ((real *)losses->data)[n0 + i] = y < 0 ? 0 : (real)row_loss(s, &row, y);
        real high = (real)row_lse(&row);
        ((real *)lse->data)[n0 + i] = high;
        if (lse_low)
            ((real *)lse_low->data)[n0 + i] =
                isfinite(high) ? (real)(row.max - (double)high + row.log_sum) : 0;
        if (predicted) ((int64_t *)predicted->data)[n0 + i] = y < 0 ? -1 : row.largest;
        correct += y >= 0 && row.largest == y;
        if (dlogits) gradient_row(s, dlogits, logits, i, y, &row, s->scale, s->z_scale, /*dlse=*/0);
    }
    return correct;
}

void CPU(gradient_rows)(const Scoring *s, const Tensor *dlogits, const Tensor *logits, int64_t n0,
                        int64_t n, const Tensor *dloss, const Tensor *dlse) {
    bool each = s->options->reduction == REDUCE_NONE;
    PARALLEL
    for (int64_t i = 0; i < n; i++) {
        double g = (double)((const real *)dloss->data)[each ? n0 + i : 0];
        double of_lse = dlse ? (double)((const real *)dlse->data)[n0 + i] : 0;
        int64_t y = label(s, n0 + i);
        Row row = scan(s, logits, row_start(logits, i), y, /*largest=*/false);
        gradient_row(s, dlogits, logits, i, y, &row, g * s->scale, g * s->z_scale, of_lse);
    }
}

void CPU(reduce_losses)(const Scoring *s, Tensor *loss, Tensor *accuracy, const Tensor *losses,
                        const Tensor *lse, int64_t correct) {
    int64_t N = losses->shape[0];
    double sum = 0, z_sum = 0;
    for (int64_t n = 0; n < N; n++) {
        double l = (double)((const real *)lse->data)[n];
        sum += (double)((const real *)losses->data)[n];
        if (s->options->z_loss != 0 && label(s, n) >= 0) z_sum += s->options->z_loss * l * l;
    }
    if (accuracy) *(real *)accuracy->data = (real)((double)correct / (double)s->count);
    if (!loss) return;
    real *to = loss->data;
    if (s->scale == s->z_scale) *to = (real)(sum * s->scale);
    else *to = (real)((sum - z_sum) * s->scale + z_sum * s->z_scale);
}

const char *CPU(cross_entropy_fwd)(Tensor *loss, Tensor *losses, Tensor *lse, Tensor *accuracy,
                                   Tensor *predicted, Tensor *lse_low, Tensor *stats,
                                   const Tensor *logits, const Tensor *target,
                                   const Tensor *class_weight, const Tensor *num_items,
                                   const LossOptions *options, void *stream) {
    (void)stats, (void)stream;
    int64_t N = logits->shape[0];
    Scoring s;
    const char *error =
        CPU(scoring)(&s, target, class_weight, num_items, options, N, logits->shape[1]);
    if (error) return error;
    int64_t correct = CPU(score_rows)(&s, logits, /*dlogits=*/NULL, 0, N, losses, lse, lse_low,
                                      predicted, accuracy || predicted);
    CPU(reduce_losses)(&s, loss, accuracy, losses, lse, correct);
    return NULL;
}

const char *CPU(cross_entropy_bwd)(Tensor *dlogits, Tensor *stats, const Tensor *dloss,
                                   const Tensor *dlse, const Tensor *logits, const Tensor *target,
                                   const Tensor *class_weight, const Tensor *num_items,
                                   const Tensor *lse, const Tensor *lse_low,
                                   const LossOptions *options, void *stream) {
    (void)stats, (void)lse, (void)lse_low, (void)stream;
    int64_t N = logits->shape[0];
    Scoring s;
    const char *error =
        CPU(scoring)(&s, target, class_weight, num_items, options, N, logits->shape[1]);
    if (error) return error;
    CPU(gradient_rows)(&s, dlogits, logits, 0, N, dloss, dlse);
    return NULL;
}
