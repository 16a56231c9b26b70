/* module.c: the CPython module flatout._C: one wrapper per entry point of ops.h.
 *
 * A wrapper parses its arguments by their signature, checks shapes and dtypes, and calls the
 * CPU or the CUDA op; nothing is computed here. Long because there are many entry points: the
 * sections are those of ops.h, each the checks of an op and then its wrappers. */
#include "cpu.h"
#include "tensor.h"

#ifndef FLATOUT_VERSION
#define FLATOUT_VERSION "0"
#endif
#ifndef FLATOUT_CUDA_ARCHS
#define FLATOUT_CUDA_ARCHS ""
#endif

/* kernels/device.cu; absent without nvcc */
__attribute__((weak)) const char *cuda_enter(int device, int *previous);
__attribute__((weak)) void cuda_leave(int previous);
__attribute__((weak)) int cuda_build_version(void);
__attribute__((weak)) int cuda_device_count(void);
__attribute__((weak)) int cuda_multiprocessors(int device);

/* ---- Dispatch -------------------------------------------------------------------------------- */

#ifdef __x86_64__
#define PICK_F32(op) \
    (cpu_level() == 2 ? op##_cpu_f32_avx512 : cpu_level() == 1 ? op##_cpu_f32_avx2 : op##_cpu_f32)
#else
#define PICK_F32(op) op##_cpu_f32
#endif

/* Where no argument has this many elements, waking threads and handing over the interpreter's lock
 * cost more than the work. */
enum { LARGE_FROM = 16384 };

static bool is_large(const Args *args) {
    for (int i = 0; i < args->tensors; i++) {
        if (args->t[i] && elements(args->t[i]) >= LARGE_FROM) return true;
    }
    int64_t sum = 0;
    for (int l = 0; l < args->lists; l++) {
        for (int64_t n = 0; n < args->list[l].n; n++) sum += elements(&args->list[l].items[n]);
    }
    return sum >= LARGE_FROM;
}

/* Call the op that `like` (a tensor of the main dtype) asks for, and end the wrapper. */
#define RUN(op, args, like, ...)                                            \
    do {                                                                    \
        const char *error = NULL;                                           \
        if ((args)->device >= 0) {                                          \
            int previous = -1;                                              \
            if (!op##_cuda) error = no_cuda((args)->device);                \
            if (!error) error = cuda_enter((args)->device, &previous);      \
            if (!error) error = op##_cuda(__VA_ARGS__, (args)->stream);     \
            if (previous >= 0) cuda_leave(previous);                        \
        } else {                                                            \
            bool large = is_large(args);                                    \
            PyThreadState *state = large ? PyEval_SaveThread() : NULL;      \
            cpu_set_serial(!large);                                         \
            error = (like)->dtype == F64 ? op##_cpu_f64(__VA_ARGS__, NULL)  \
                                         : PICK_F32(op)(__VA_ARGS__, NULL); \
            cpu_set_serial(false);                                          \
            if (state) PyEval_RestoreThread(state);                         \
        }                                                                   \
        return finish(args, error);                                         \
    } while (0)

static const char *no_cuda(int device) {
    (void)device;
    return cuda_enter ? "NotImplementedError: no CUDA kernel for this op yet"
                      : "RuntimeError: flatout was built without CUDA (flatout.info() tells)";
}

/* An op's error string begins with the exception's name where it is not a RuntimeError. */
static PyObject *finish(Args *args, const char *error) {
    args_free(args);
    if (!error) Py_RETURN_NONE;
    static const struct {
        const char *prefix;
        PyObject **type;
    } kinds[] = {{"IndexError: ", &PyExc_IndexError},
                 {"MemoryError: ", &PyExc_MemoryError},
                 {"ValueError: ", &ArgumentValueError},
                 {"NotImplementedError: ", &PyExc_NotImplementedError},
                 {"RuntimeError: ", &PyExc_RuntimeError}};
    PyObject *type = PyExc_RuntimeError;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        size_t n = strlen(kinds[k].prefix);
        if (strncmp(error, kinds[k].prefix, n)) continue;
        type = *kinds[k].type;
        error += n;
        break;
    }
    return PyErr_Format(type, "%s: %s", args->signature->function, error);
}

/* Wrappers begin with ENTRY and return `refuse` where a check has set the exception. */
#define ENTRY(declared)                                     \
    static Signature signature = {.text = declared};        \
    (void)self;                                             \
    Args args_, *args = &args_;                             \
    if (!parse(args, &signature, argv, nargs)) return NULL; \
    Tensor **t = args->t;                                   \
    (void)t

#define WRAPPER(name) static PyObject *name(PyObject *self, PyObject *const *argv, Py_ssize_t nargs)

static PyObject *refuse(Args *args) {
    args_free(args);
    return NULL;
}

static bool is_data(const Args *args, const Tensor *t) {
    return is_float(args, t) && rows_last(args, t);
}

/* `t` has x's shape and dtype. */
static bool like(const Args *args, const Tensor *t, const Tensor *x) {
    return same_shape(args, t, x) && same_dtype(args, t, x) && (!t || rows_last(args, t));
}

static bool is_vector(const Args *args, const Tensor *t, int64_t n) {
    return has_shape(args, t, 1, &n);
}

static bool is_scalar(const Args *args, const Tensor *t) {
    if (!t || elements(t) == 1) return true;
    return fail_value(args, t->name, "expected one element, got %lld", (long long)elements(t));
}

static bool finite_from_0(const Args *args, double value, const char *name) {
    return need_float(args, value >= 0 && isfinite(value), name, "a finite number >= 0", value);
}

/* Double data has double operands, and nothing else has. */
static bool both_f64(const Args *args, const Tensor *t, const Tensor *x) {
    if ((t->dtype == F64) == (x->dtype == F64)) return true;
    return fail_type(args, t->name, "expected %s beside %s of %s, got %s",
                     x->dtype == F64 ? "float64" : "float32, bfloat16 or float16", x->name,
                     dtype_name(x->dtype), dtype_name(t->dtype));
}

/* ---- RMSNorm --------------------------------------------------------------------------------- */

static bool norm_checks(const Args *args, const Tensor *x, const Tensor *w, const Tensor *rstd) {
    return is_data(args, x) && is_data(args, w) && is_vector(args, w, last_dim(x)) &&
           need_int(args, last_dim(x) > 0, x->name, "a last dimension of at least 1", 0) &&
           is_stat(args, rstd, x) && (!rstd || is_vector(args, rstd, rows(x))) &&
           both_f64(args, w, x);
}

/* (P, H), at least `least` rows of sums over x's last dimension. */
static bool has_sums(const Args *args, const Tensor *t, int64_t least, const Tensor *x) {
    if (!has_ndim(args, t, 2)) return false;
    int64_t shape[] = {t->shape[0], last_dim(x)};
    return has_shape(args, t, 2, shape) &&
           need_int(args, shape[0] >= least, t->name,
                    least > 1 ? "at least 2 rows" : "at least 1 row", shape[0]);
}

/* A weight's gradient and its partial sums, both or neither, by the names of the arguments. */
static bool partial_checks(const Args *args, const Tensor *dw, const char *dw_name,
                           const Tensor *partial, const char *name, const Tensor *w,
                           const Tensor *x) {
    if (!need_both(args, partial, name, dw, dw_name)) return false;
    return !dw || (like(args, dw, w) && is_stat(args, partial, x) && has_sums(args, partial, 1, w));
}

WRAPPER(rms_norm_fwd) {
    ENTRY("rms_norm_fwd(>y, >rstd?, x, w, float eps, float offset)");
    Tensor *y = t[0], *rstd = t[1], *x = t[2], *w = t[3];
    if (!norm_checks(args, x, w, rstd) || !like(args, y, x) ||
        !finite_from_0(args, args->f[0], "eps"))
        return refuse(args);
    RUN(rms_norm_fwd, args, x, y, rstd, x, w, args->f[0], args->f[1]);
}

WRAPPER(rms_norm_bwd) {
    ENTRY("rms_norm_bwd(>dx=dy, >dw?, >dw_partial?, dy, x, w, rstd, float offset)");
    Tensor *dx = t[0], *dw = t[1], *partial = t[2], *dy = t[3], *x = t[4], *w = t[5], *rstd = t[6];
    if (!norm_checks(args, x, w, rstd) || !like(args, dx, x) || !like(args, dy, x) ||
        !partial_checks(args, dw, "dw", partial, "dw_partial", w, x))
        return refuse(args);
    RUN(rms_norm_bwd, args, x, dx, dw, partial, dy, x, w, rstd, args->f[0]);
}

WRAPPER(add_rms_norm_fwd) {
    ENTRY("add_rms_norm_fwd(>y, >s, >rstd?, x, residual, w, float eps, float offset)");
    Tensor *y = t[0], *s = t[1], *rstd = t[2], *x = t[3], *residual = t[4], *w = t[5];
    if (!norm_checks(args, x, w, rstd) || !like(args, y, x) || !like(args, s, x) ||
        !like(args, residual, x) || !finite_from_0(args, args->f[0], "eps"))
        return refuse(args);
    RUN(add_rms_norm_fwd, args, x, y, s, rstd, x, residual, w, args->f[0], args->f[1]);
}

WRAPPER(add_rms_norm_bwd) {
    ENTRY("add_rms_norm_bwd(>dx=dy, >dw?, >dw_partial?, dy, ds?, s, w, rstd, float offset)");
    Tensor *dx = t[0], *dw = t[1], *partial = t[2], *dy = t[3], *ds = t[4], *s = t[5], *w = t[6],
           *rstd = t[7];
    if (!norm_checks(args, s, w, rstd) || !like(args, dx, s) || !like(args, dy, s) ||
        !like(args, ds, s) || !partial_checks(args, dw, "dw", partial, "dw_partial", w, s))
        return refuse(args);
    RUN(add_rms_norm_bwd, args, s, dx, dw, partial, dy, ds, s, w, rstd, args->f[0]);
}

/* ---- SwiGLU ---------------------------------------------------------------------------------- */

/* Without an `up` the last dimension of `gate` holds [gate | up]: they become two views of it. */
static bool split(Args *args, Tensor *gate, int at) {
    Tensor *up = &args->tensor[at];
    int last = gate->ndim - 1;
    if (args->t[at]) return true;
    if (!need_int(args, gate->shape[last] % 2 == 0, gate->name,
                  "[gate | up] in an even last dimension", gate->shape[last]))
        return false;
    const char *name = up->name;
    gate->shape[last] /= 2;
    args->t[at] = up;
    *up = *gate;
    up->name = name;
    up->data = (char *)gate->data + gate->shape[last] * item_size(gate->dtype);
    return true;
}

WRAPPER(swiglu_fwd) {
    ENTRY("swiglu_fwd(>y, gate, up?)");
    if (!is_data(args, t[1]) || !split(args, t[1], 2)) return refuse(args);
    Tensor *y = t[0], *gate = t[1], *up = t[2];
    if (!like(args, up, gate) || !like(args, y, gate)) return refuse(args);
    RUN(swiglu_fwd, args, gate, y, gate, up);
}

WRAPPER(swiglu_bwd) {
    ENTRY("swiglu_bwd(>dgate=gate, >dup=up?, dy, gate, up?)");
    if (!need_both(args, t[1], "dup", t[4], "up") || !is_data(args, t[3]) ||
        !like(args, t[0], t[3]) || !split(args, t[0], 1) || !split(args, t[3], 4))
        return refuse(args);
    Tensor *dgate = t[0], *dup = t[1], *dy = t[2], *gate = t[3], *up = t[4];
    if (!like(args, up, gate) || !like(args, dy, gate) || !like(args, dup, gate))
        return refuse(args);
    RUN(swiglu_bwd, args, gate, dgate, dup, dy, gate, up);
}

/* ---- Rotary embedding ------------------------------------------------------------------------ */

/* (T, H, D) -> (1, T, H, D), so that the ops know one layout. */
static void add_batch(Tensor *t) {
    if (!t || t->ndim != 3) return;
    for (int d = 3; d > 0; d--) t->shape[d] = t->shape[d - 1], t->stride[d] = t->stride[d - 1];
    t->shape[0] = 1;
    t->stride[0] = 0;
    t->ndim = 4;
}

/* (S, D), (1, S, D) -> (B, S, D), all batches on one table. */
static void spread_table(Tensor *table, int64_t B) {
    if (table->ndim == 2) {
        for (int d = 2; d > 0; d--)
            table->shape[d] = table->shape[d - 1], table->stride[d] = table->stride[d - 1];
        table->ndim = 3;
        table->shape[0] = 1;
    }
    if (table->ndim == 3 && table->shape[0] == 1) table->shape[0] = B, table->stride[0] = 0;
}

static bool rope_checks(const Args *args, Tensor *q, Tensor *k, Tensor *cos, Tensor *sin) {
    if (!is_data(args, q) || (k && (!is_data(args, k) || !same_dtype(args, k, q)))) return false;
    if (q->ndim != 3 && q->ndim != 4)
        return fail_value(args, q->name, "expected (B, S, H, D) or (T, H, D), got %d dimensions",
                          q->ndim);
    if (k && !has_ndim(args, k, q->ndim)) return false;
    add_batch(q);
    add_batch(k);
    spread_table(cos, q->shape[0]);
    spread_table(sin, q->shape[0]);
    int64_t head[4] = {q->shape[0], q->shape[1], k ? k->shape[2] : 0, q->shape[3]};
    int64_t table[3] = {q->shape[0], q->shape[1], q->shape[3]};
    return need_int(args, q->shape[3] % 2 == 0, q->name, "an even head dimension", q->shape[3]) &&
           has_shape(args, k, 4, head) && is_data(args, cos) && is_data(args, sin) &&
           has_shape(args, cos, 3, table) && has_shape(args, sin, 3, table) &&
           both_f64(args, cos, q) && both_f64(args, sin, q);
}

WRAPPER(rope_fwd) {
    ENTRY("rope_fwd(>q_out=q, >k_out=k?, q, k?, cos, sin)");
    Tensor *q_out = t[0], *k_out = t[1], *q = t[2], *k = t[3], *cos = t[4], *sin = t[5];
    add_batch(q_out);
    add_batch(k_out);
    if (!need_both(args, k_out, "k_out", k, "k") || !rope_checks(args, q, k, cos, sin) ||
        !like(args, q_out, q) || (k && !like(args, k_out, k)))
        return refuse(args);
    RUN(rope_fwd, args, q, q_out, k_out, q, k, cos, sin);
}

WRAPPER(rope_bwd) {
    ENTRY("rope_bwd(>dq=dq_out, >dk=dk_out?, dq_out, dk_out?, cos, sin)");
    Tensor *dq = t[0], *dk = t[1], *dq_out = t[2], *dk_out = t[3], *cos = t[4], *sin = t[5];
    add_batch(dq);
    add_batch(dk);
    if (!need_both(args, dk, "dk", dk_out, "dk_out") ||
        !rope_checks(args, dq_out, dk_out, cos, sin) || !like(args, dq, dq_out) ||
        (dk && !like(args, dk, dk_out)))
        return refuse(args);
    RUN(rope_bwd, args, dq_out, dq, dk, dq_out, dk_out, cos, sin);
}

static bool head_norm_checks(const Args *args, const Tensor *x, const Tensor *w, Tensor *rstd) {
    if (rstd && rstd->ndim == 2) { /* (T, H) -> (1, T, H) */
        for (int d = 2; d > 0; d--)
            rstd->shape[d] = rstd->shape[d - 1], rstd->stride[d] = rstd->stride[d - 1];
        rstd->shape[0] = 1;
        rstd->ndim = 3;
    }
    return need_int(args, x->shape[3] > 0, x->name, "a head dimension of at least 2", 0) &&
           is_data(args, w) && is_vector(args, w, x->shape[3]) && is_stat(args, rstd, x) &&
           has_shape(args, rstd, 3, x->shape) && both_f64(args, w, x);
}

WRAPPER(qk_norm_rope_fwd) {
    ENTRY("qk_norm_rope_fwd(>q_out=q, >k_out=k, >q_rstd?, >k_rstd?, q, k, q_weight, k_weight, cos, "
          "sin, float eps)");
    Tensor *q_out = t[0], *k_out = t[1], *q_rstd = t[2], *k_rstd = t[3], *q = t[4], *k = t[5],
           *qw = t[6], *kw = t[7], *cos = t[8], *sin = t[9];
    add_batch(q_out);
    add_batch(k_out);
    if (!rope_checks(args, q, k, cos, sin) || !like(args, q_out, q) || !like(args, k_out, k) ||
        !head_norm_checks(args, q, qw, q_rstd) || !head_norm_checks(args, k, kw, k_rstd) ||
        !finite_from_0(args, args->f[0], "eps"))
        return refuse(args);
    RUN(qk_norm_rope_fwd, args, q, q_out, k_out, q_rstd, k_rstd, q, k, qw, kw, cos, sin,
        args->f[0]);
}

WRAPPER(qk_norm_rope_bwd) {
    ENTRY("qk_norm_rope_bwd(>dq=dq_out, >dk=dk_out, >dq_weight?, >dk_weight?, >dq_partial?, "
          ">dk_partial?, "
          "dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin)");
    Tensor *dq = t[0], *dk = t[1], *dqw = t[2], *dkw = t[3], *dq_partial = t[4], *dk_partial = t[5],
           *dq_out = t[6], *dk_out = t[7], *q = t[8], *k = t[9], *qw = t[10], *kw = t[11],
           *q_rstd = t[12], *k_rstd = t[13], *cos = t[14], *sin = t[15];
    Tensor *gradients[] = {dq, dk, dq_out, dk_out};
    for (int g = 0; g < 4; g++) add_batch(gradients[g]);
    if (!rope_checks(args, q, k, cos, sin) || !like(args, dq, q) || !like(args, dq_out, q) ||
        !like(args, dk, k) || !like(args, dk_out, k) || !head_norm_checks(args, q, qw, q_rstd) ||
        !head_norm_checks(args, k, kw, k_rstd) ||
        !partial_checks(args, dqw, "dq_weight", dq_partial, "dq_partial", qw, q) ||
        !partial_checks(args, dkw, "dk_weight", dk_partial, "dk_partial", kw, k))
        return refuse(args);
    RUN(qk_norm_rope_bwd, args, q, dq, dk, dqw, dkw, dq_partial, dk_partial, dq_out, dk_out, q, k,
        qw, kw, q_rstd, k_rstd, cos, sin);
}

/* ---- Attention ------------------------------------------------------------------------------- */

typedef struct {
    Tensor *q, *k, *v, *out, *lse, *cu_q, *cu_k;
} Attention;

static bool cu_checks(const Args *args, const Tensor *cu) {
    return is_dtype(args, cu, I32) && has_ndim(args, cu, 1) && is_contiguous(args, cu) &&
           need_int(args, cu->shape[0] >= 1, cu->name, "at least 1 entry", 0);
}

static bool attention_layout(const Args *args, const Attention *a) {
    int packed = a->cu_q != NULL;
    const Tensor *q = a->q, *k = a->k;
    if (!has_ndim(args, q, 4 - packed) || !has_ndim(args, k, 4 - packed)) return false;
    int64_t Hq = q->shape[2 - packed], Hk = k->shape[2 - packed], D = last_dim(q);
    if (!need_int(args, D > 0, q->name, "a head dimension of at least 1", 0)) return false;
    if (last_dim(k) != D)
        return fail_value(args, k->name, "expected q's head dimension %lld, got %lld", (long long)D,
                          (long long)last_dim(k));
    if (Hk == 0 ? Hq != 0 : Hq % Hk)
        return fail_value(args, k->name,
                          "expected a number of heads that divides q's %lld, got %lld",
                          (long long)Hq, (long long)Hk);
    if (!packed)
        return k->shape[0] == q->shape[0] ||
               fail_value(args, k->name, "expected q's batch of %lld, got %lld",
                          (long long)q->shape[0], (long long)k->shape[0]);
    return cu_checks(args, a->cu_q) && cu_checks(args, a->cu_k) &&
           same_shape(args, a->cu_k, a->cu_q);
}

static bool attention_checks(const Args *args, const Attention *a, double scale, double softcap) {
    const Tensor *q = a->q;
    int packed = a->cu_q != NULL;
    if (!need_both(args, a->cu_k, "cu_seqlens_k", a->cu_q, "cu_seqlens_q")) return false;
    if (!is_data(args, q) || !is_data(args, a->k) || !same_dtype(args, a->k, q) ||
        !like(args, a->v, a->k) || !attention_layout(args, a) || !like(args, a->out, q))
        return false;
    int64_t dense_lse[] = {q->shape[0], q->shape[2], q->shape[1]};
    int64_t packed_lse[] = {q->shape[1], q->shape[0]};
    return is_stat(args, a->lse, q) &&
           has_shape(args, a->lse, 3 - packed, packed ? packed_lse : dense_lse) &&
           need_float(args, isfinite(scale), "scale", "a finite number", scale) &&
           finite_from_0(args, softcap, "softcap");
}

WRAPPER(attention_fwd) {
    ENTRY("attention_fwd(>out, >lse, >workspace?, q, k, v, cu_seqlens_q?, cu_seqlens_k?, int "
          "max_seqlen_q, int max_seqlen_k, float scale, int left, int right, float softcap)");
    Attention a = {
        .out = t[0], .lse = t[1], .q = t[3], .k = t[4], .v = t[5], .cu_q = t[6], .cu_k = t[7]};
    if (!attention_checks(args, &a, args->f[0], args->f[1])) return refuse(args);
    RUN(attention_fwd, args, a.q, a.out, a.lse, t[2], a.q, a.k, a.v, a.cu_q, a.cu_k, args->i[0],
        args->i[1], args->f[0], args->i[2], args->i[3], args->f[1]);
}

WRAPPER(attention_bwd) {
    ENTRY("attention_bwd(>dq, >dk, >dv, >workspace?, dout, dlse?, q, k, v, out, lse, "
          "cu_seqlens_q?, cu_seqlens_k?, int max_seqlen_q, int max_seqlen_k, float scale, int "
          "left, int right, float softcap, int deterministic)");
    Tensor *dq = t[0], *dk = t[1], *dv = t[2], *dout = t[4], *dlse = t[5];
    Attention a = {
        .q = t[6], .k = t[7], .v = t[8], .out = t[9], .lse = t[10], .cu_q = t[11], .cu_k = t[12]};
    if (!attention_checks(args, &a, args->f[0], args->f[1]) || !like(args, dq, a.q) ||
        !like(args, dk, a.k) || !like(args, dv, a.v) || !like(args, dout, a.q) ||
        (dlse && (!is_stat(args, dlse, a.q) || !same_shape(args, dlse, a.lse))))
        return refuse(args);
    RUN(attention_bwd, args, a.q, dq, dk, dv, t[3], dout, dlse, a.q, a.k, a.v, a.out, a.lse, a.cu_q,
        a.cu_k, args->i[0], args->i[1], args->f[0], args->i[2], args->i[3], args->f[1], args->i[4]);
}

/* ---- Cross-entropy --------------------------------------------------------------------------- */

/* The wrappers' shared tail: `int ignore_index, int reduction, int seq, int shift, float
 * label_smoothing, float z_loss, float softcap`. */
static bool loss_options(const Args *args, LossOptions *o, int64_t N) {
    *o = (LossOptions){.ignore_index = args->i[0],
                       .reduction = args->i[1],
                       .seq = args->i[2],
                       .shift = args->i[3],
                       .label_smoothing = args->f[0],
                       .z_loss = args->f[1],
                       .softcap = args->f[2]};
    return need_int(args, o->reduction >= REDUCE_NONE && o->reduction <= REDUCE_SUM, "reduction",
                    "0 (none), 1 (mean) or 2 (sum)", o->reduction) &&
           need_int(args, N == 0 || (o->seq > 0 && N % o->seq == 0), "seq",
                    "the last dimension of target", o->seq) &&
           need_float(args, o->label_smoothing >= 0 && o->label_smoothing <= 1, "label_smoothing",
                      "a number in 0 .. 1", o->label_smoothing) &&
           need_float(args, isfinite(o->z_loss), "z_loss", "a finite number", o->z_loss) &&
           finite_from_0(args, o->softcap, "softcap");
}

typedef struct {
    const Tensor *target, *class_weight, *num_items, *stats;
    int64_t N, V;
} Labels;

static bool label_checks(const Args *args, const Labels *l, const Tensor *x) {
    int64_t four = 4;
    return is_index(args, l->target) && is_vector(args, l->target, l->N) &&
           is_contiguous(args, l->target) && is_stat(args, l->class_weight, x) &&
           is_vector(args, l->class_weight, l->V) && is_stat(args, l->num_items, x) &&
           is_scalar(args, l->num_items) && is_stat(args, l->stats, x) &&
           has_shape(args, l->stats, 1, &four) &&
           need_int(args, l->V > 0 || l->N == 0, x->name, "at least 1 class", 0);
}

typedef struct {
    const Tensor *loss, *losses, *lse, *accuracy, *predicted;
} LossOutputs;

static bool loss_checks(const Args *args, const LossOutputs *l, const Tensor *x, int64_t N,
                        int64_t reduction) {
    return is_stat(args, l->losses, x) && is_vector(args, l->losses, N) &&
           is_stat(args, l->lse, x) && is_vector(args, l->lse, N) && is_stat(args, l->loss, x) &&
           is_scalar(args, l->loss) && is_stat(args, l->accuracy, x) &&
           is_scalar(args, l->accuracy) && is_dtype(args, l->predicted, I64) &&
           is_vector(args, l->predicted, N) && is_contiguous(args, l->predicted) &&
           (!l->loss == (reduction == REDUCE_NONE) ||
            fail_value(args, "loss", "expected None exactly for reduction none, got %s",
                       l->loss ? "an array" : "None"));
}

/* dloss: one element, or one per row for REDUCE_NONE. */
static bool dloss_checks(const Args *args, const Tensor *dloss, const Tensor *dlse, const Tensor *x,
                         int64_t N, int64_t reduction) {
    return is_stat(args, dloss, x) &&
           (reduction == REDUCE_NONE ? is_vector(args, dloss, N) : is_scalar(args, dloss)) &&
           is_stat(args, dlse, x) && is_vector(args, dlse, N);
}

#define LOSS_OPTIONS                                                                             \
    "int ignore_index, int reduction, int seq, int shift, float label_smoothing, float z_loss, " \
    "float softcap)"

WRAPPER(cross_entropy_fwd) {
    ENTRY("cross_entropy_fwd(>loss?, >losses, >lse, >accuracy?, >predicted?, >lse_low?, >stats, "
          "logits, target, class_weight?, num_items?, " LOSS_OPTIONS);
    LossOutputs out = {
        .loss = t[0], .losses = t[1], .lse = t[2], .accuracy = t[3], .predicted = t[4]};
    Tensor *lse_low = t[5], *logits = t[7];
    LossOptions o;
    if (!is_data(args, logits) || !has_ndim(args, logits, 2)) return refuse(args);
    Labels labels = {.target = t[8],
                     .class_weight = t[9],
                     .num_items = t[10],
                     .stats = t[6],
                     .N = logits->shape[0],
                     .V = logits->shape[1]};
    if (!label_checks(args, &labels, logits) || !loss_options(args, &o, labels.N) ||
        !loss_checks(args, &out, logits, labels.N, o.reduction) ||
        !is_stat(args, lse_low, logits) || !is_vector(args, lse_low, labels.N))
        return refuse(args);
    RUN(cross_entropy_fwd, args, logits, t[0], t[1], t[2], t[3], t[4], lse_low, t[6], logits, t[8],
        t[9], t[10], &o);
}

WRAPPER(cross_entropy_bwd) {
    ENTRY("cross_entropy_bwd(>dlogits=logits, >stats, dloss, dlse?, logits, target, class_weight?, "
          "num_items?, lse, lse_low?, " LOSS_OPTIONS);
    Tensor *dlogits = t[0], *logits = t[4], *lse = t[8], *lse_low = t[9];
    LossOptions o;
    if (!is_data(args, logits) || !has_ndim(args, logits, 2)) return refuse(args);
    Labels labels = {.target = t[5],
                     .class_weight = t[6],
                     .num_items = t[7],
                     .stats = t[1],
                     .N = logits->shape[0],
                     .V = logits->shape[1]};
    if (!label_checks(args, &labels, logits) || !loss_options(args, &o, labels.N) ||
        !like(args, dlogits, logits) || !is_stat(args, lse, logits) ||
        !is_vector(args, lse, labels.N) || !is_stat(args, lse_low, logits) ||
        !is_vector(args, lse_low, labels.N) ||
        !dloss_checks(args, t[2], t[3], logits, labels.N, o.reduction))
        return refuse(args);
    RUN(cross_entropy_bwd, args, logits, dlogits, t[1], t[2], t[3], logits, t[5], t[6], t[7], lse,
        lse_low, &o);
}

typedef struct {
    const Tensor *dx, *dw, *db, *dw_accum, *db_accum, *workspace, *x, *w, *bias;
    Tensor *logits_chunk;
} Linear;

/* Rows of an even share of N rows, in tiles of 128 where that many fit. */
static int64_t even_rows(int64_t N, int64_t most) {
    int64_t chunks = N > most ? (N + most - 1) / most : 1;
    int64_t even = ((N + chunks - 1) / chunks + 127) / 128 * 128;
    return even < 1 ? 1 : even < most ? even : most;
}

/* Whether all rows of logits in dw's memory, and the columns that dw's first rows come from in the
 * workspace, have room. */
static bool one_chunk_fits(const Args *args, const Linear *l, int64_t most) {
    const Tensor *space = l->workspace, *chunk = l->logits_chunk;
    Tensor spare;
    bool bytes = space && space->ndim == 1 && space->dtype == U8;
    int64_t columns = dw_rows_on_logits(chunk, l->dw), item = item_size(l->dw->dtype);
    return need_int(args, chunk->shape[0] <= most, "logits_chunk",
                    "dw only beside dw_accum, or with room for all rows of logits", most) &&
           need_int(args, bytes && spare_logits(&spare, chunk, columns, item, space->shape[0]) >= 0,
                    "workspace", "uint8 with room for the logits that dw overwrites",
                    space ? elements(space) : 0) &&
           need_int(args, !chunk->shape[0] || (uintptr_t)space->data % 16 == 0, "workspace",
                    "0 bytes past a 16-byte boundary", (int64_t)((uintptr_t)space->data % 16)) &&
           is_contiguous(args, space);
}

/* A logits_chunk that is dw: its memory, as rows that begin on 16-byte boundaries. */
static bool chunk_in_dw(const Args *args, const Linear *l) {
    Tensor *chunk = l->logits_chunk;
    const Tensor *dw = l->dw;
    if (!dw || !same_view(chunk, dw)) return true;
    if (!is_contiguous(args, dw)) return false;
    int64_t N = l->x->shape[0], V = dw->shape[0], per = 16 / item_size(dw->dtype);
    int64_t stride = (V + per - 1) / per * per;
    int64_t most = V ? V * dw->shape[1] / stride : 0;
    if (!need_int(args, most > 0, "logits_chunk", "a dw with room for one row of logits", 0))
        return false;
    chunk->shape[0] = l->dw_accum ? even_rows(N, most) : N;
    chunk->shape[1] = V;
    chunk->stride[0] = stride;
    return l->dw_accum || one_chunk_fits(args, l, most);
}

static bool linear_checks(const Args *args, const Linear *l) {
    const Tensor *x = l->x, *w = l->w;
    if (!is_data(args, x) || !has_ndim(args, x, 2) || !is_data(args, w) || !has_ndim(args, w, 2) ||
        !same_dtype(args, w, x) || (l->dw && !has_ndim(args, l->dw, 2)) || !chunk_in_dw(args, l))
        return false;
    int64_t V = w->shape[0], H = x->shape[1], weight[] = {V, H};
    int64_t chunk[] = {l->logits_chunk->ndim == 2 ? l->logits_chunk->shape[0] : 1, V};
    return has_shape(args, w, 2, weight) && is_data(args, l->bias) && is_vector(args, l->bias, V) &&
           (!l->bias || both_f64(args, l->bias, x)) && like(args, l->dx, x) &&
           like(args, l->dw, w) && is_vector(args, l->db, V) &&
           (!l->db || (l->bias ? same_dtype(args, l->db, l->bias)
                               : fail_value(args, "bias", "expected an array, for db is one"))) &&
           is_stat(args, l->dw_accum, x) && has_shape(args, l->dw_accum, 2, weight) &&
           need_both(args, l->db_accum, "db_accum", l->db, "db") && is_stat(args, l->db_accum, x) &&
           is_vector(args, l->db_accum, V) && same_dtype(args, l->logits_chunk, x) &&
           has_shape(args, l->logits_chunk, 2, chunk) && rows_last(args, l->logits_chunk) &&
           need_int(args, chunk[0] > 0 || x->shape[0] == 0, "logits_chunk", "at least 1 row", 0);
}

WRAPPER(linear_cross_entropy_fwd) {
    ENTRY("linear_cross_entropy_fwd(>loss?, >losses, >lse, >accuracy?, >predicted?, >dx?, "
          ">dw=logits_chunk?, >db?, >dw_accum?, >db_accum?, >logits_chunk=dw, >stats, >workspace?, "
          "x, w, target, bias?, class_weight?, num_items?, " LOSS_OPTIONS);
    LossOutputs out = {
        .loss = t[0], .losses = t[1], .lse = t[2], .accuracy = t[3], .predicted = t[4]};
    Linear linear = {.dx = t[5],
                     .dw = t[6],
                     .db = t[7],
                     .dw_accum = t[8],
                     .db_accum = t[9],
                     .logits_chunk = t[10],
                     .workspace = t[12],
                     .x = t[13],
                     .w = t[14],
                     .bias = t[16]};
    LossOptions o;
    if (!linear_checks(args, &linear)) return refuse(args);
    Labels labels = {.target = t[15],
                     .class_weight = t[17],
                     .num_items = t[18],
                     .stats = t[11],
                     .N = linear.x->shape[0],
                     .V = linear.w->shape[0]};
    if (!label_checks(args, &labels, linear.x) || !loss_options(args, &o, labels.N) ||
        !loss_checks(args, &out, linear.x, labels.N, o.reduction))
        return refuse(args);
    RUN(linear_cross_entropy_fwd, args, linear.w, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7],
        t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15], t[16], t[17], t[18], &o);
}

WRAPPER(linear_cross_entropy_bwd) {
    ENTRY("linear_cross_entropy_bwd(>dx?, >dw=logits_chunk?, >db?, >dw_accum?, >db_accum?, "
          ">logits_chunk=dw, >stats, >workspace?, dloss, dlse?, x, w, target, bias?, "
          "class_weight?, num_items?, "
          "lse, " LOSS_OPTIONS);
    Linear linear = {.dx = t[0],
                     .dw = t[1],
                     .db = t[2],
                     .dw_accum = t[3],
                     .db_accum = t[4],
                     .logits_chunk = t[5],
                     .workspace = t[7],
                     .x = t[10],
                     .w = t[11],
                     .bias = t[13]};
    Tensor *lse = t[16];
    LossOptions o;
    if (!linear_checks(args, &linear)) return refuse(args);
    Labels labels = {.target = t[12],
                     .class_weight = t[14],
                     .num_items = t[15],
                     .stats = t[6],
                     .N = linear.x->shape[0],
                     .V = linear.w->shape[0]};
    if (!label_checks(args, &labels, linear.x) || !loss_options(args, &o, labels.N) ||
        !is_stat(args, lse, linear.x) || !is_vector(args, lse, labels.N) ||
        !dloss_checks(args, t[8], t[9], linear.x, labels.N, o.reduction))
        return refuse(args);
    RUN(linear_cross_entropy_bwd, args, linear.w, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7],
        t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15], lse, &o);
}

/* ---- Embedding ------------------------------------------------------------------------------- */

static bool embedding_checks(const Args *args, const Tensor *y, const Tensor *ids,
                             const Tensor *w) {
    if (!is_data(args, w) || !has_ndim(args, w, 2)) return false;
    int64_t shape[] = {ids->ndim == 1 ? ids->shape[0] : -1, w->shape[1]};
    return is_index(args, ids) && has_ndim(args, ids, 1) && is_contiguous(args, ids) &&
           same_dtype(args, y, w) && rows_last(args, y) && has_shape(args, y, 2, shape);
}

WRAPPER(embedding_fwd) {
    ENTRY("embedding_fwd(>y, ids, w)");
    Tensor *y = t[0], *ids = t[1], *w = t[2];
    if (!embedding_checks(args, y, ids, w)) return refuse(args);
    RUN(embedding_fwd, args, y, y, ids, w);
}

/* Ids come sorted, with their order, or with scratch to sort them in. */
static bool order_checks(const Args *args, const Tensor *sorted, const Tensor *ids,
                         const Tensor *order) {
    int64_t N = ids->shape[0], shape[] = {2, N};
    if (sorted && order)
        return fail_value(args, "sorted", "expected None where order is given, got an array");
    if (!sorted && !order)
        return fail_value(args, "order", "expected an array where sorted is None, got None");
    _Static_assert(EMBEDDING_SORTED == 16384, "the message below says so");
    return is_dtype(args, order, I64) && is_contiguous(args, order) &&
           same_shape(args, order, ids) && is_dtype(args, sorted, I64) &&
           is_contiguous(args, sorted) && has_shape(args, sorted, 2, shape) &&
           (order ||
            need_int(args, N <= EMBEDDING_SORTED, "ids", "at most 16384 where order is None", N));
}

WRAPPER(embedding_bwd) {
    ENTRY("embedding_bwd(>dw, >partial, >sorted?, dy, ids, order?)");
    Tensor *dw = t[0], *partial = t[1], *sorted = t[2], *dy = t[3], *ids = t[4], *order = t[5];
    if (!embedding_checks(args, dy, ids, dw) || !order_checks(args, sorted, ids, order) ||
        !is_stat(args, partial, dy) || !has_sums(args, partial, 2, dw) ||
        !need_int(args, partial->shape[0] % 2 == 0, "partial", "an even number of rows",
                  partial->shape[0]))
        return refuse(args);
    RUN(embedding_bwd, args, dy, dw, partial, sorted, dy, ids, order);
}

/* ---- Optimizer ------------------------------------------------------------------------------- */

static bool list_checks(const Args *args, const TensorList *list) {
    for (int64_t n = 0; n < list->n; n++) {
        if (!is_float(args, &list->items[n]) || !is_contiguous(args, &list->items[n])) return false;
    }
    return true;
}

/* Lists of equal lengths, item by item of equal shapes, and all of the first item's dtype. */
static bool lists_match(const Args *args, const TensorList *list, const TensorList *as) {
    if (list->n != as->n)
        return fail_value(args, list->items->name, "expected %lld arrays as in %s, got %lld",
                          (long long)as->n, as->items->name, (long long)list->n);
    for (int64_t n = 0; n < list->n; n++) {
        if (!same_shape(args, &list->items[n], &as->items[n])) return false;
    }
    return list_checks(args, list);
}

static bool one_dtype(const Args *args, const TensorList *list, const Tensor *as) {
    for (int64_t n = 0; n < list->n; n++) {
        if (!same_dtype(args, &list->items[n], as)) return false;
    }
    return true;
}

/* The tensor that picks the CPU op and whether to release the interpreter: of the widest dtype
 * (F64 where any is), the largest. */
static const Tensor *widest(const TensorList *list, const Tensor *otherwise) {
    const Tensor *best = list->n ? &list->items[0] : otherwise;
    for (int64_t n = 1; n < list->n; n++) {
        const Tensor *t = &list->items[n];
        bool wider = t->dtype == F64 && best->dtype != F64;
        bool larger = (t->dtype == F64) == (best->dtype == F64) && elements(t) > elements(best);
        if (wider || larger) best = t;
    }
    return best;
}

typedef struct {
    uintptr_t low, high; /* of an item's bytes */
    const Tensor *item;
    bool written;
} Span;

/* Few: by insertion. */
static void insert_spans(Span *span, int64_t count) {
    for (int64_t i = 1; i < count; i++) {
        Span moved = span[i];
        int64_t at = i;
        for (; at > 0 && span[at - 1].low > moved.low; at--) span[at] = span[at - 1];
        span[at] = moved;
    }
}

/* Many: byte after byte of the address from the lowest, but those that all share, into the other
 * array and back. Returns the sorted one. (qsort took a third of a step of 400 parameters.) */
static Span *radix_sort_spans(Span *from, Span *to, int64_t count) {
    uintptr_t differ = 0;
    for (int64_t i = 1; i < count; i++) differ |= from[i].low ^ from[0].low;
    for (int shift = 0; shift < 8 * (int)sizeof differ; shift += 8) {
        if (!(differ >> shift & 255)) continue;
        int64_t place[257] = {0};
        for (int64_t i = 0; i < count; i++) place[(from[i].low >> shift & 255) + 1]++;
        for (int b = 0; b < 256; b++) place[b + 1] += place[b];
        for (int64_t i = 0; i < count; i++) to[place[from[i].low >> shift & 255]++] = from[i];
        Span *sorted = to;
        to = from, from = sorted;
    }
    return from;
}

static int64_t add_spans(Span *span, const TensorList *list, bool written) {
    int64_t count = 0;
    for (int64_t n = 0; n < list->n; n++) {
        const Tensor *t = &list->items[n];
        int64_t bytes = elements(t) * item_size(t->dtype);
        uintptr_t low = (uintptr_t)t->data;
        if (bytes) span[count++] = (Span){low, low + (uintptr_t)bytes, t, written};
    }
    return count;
}

/* Sorted spans of contiguous arrays: a written one reaches into no other. */
static bool spans_disjoint(const Args *args, const Span *span, int64_t count) {
    const Span *reach = NULL, *written_reach = NULL; /* those that end last so far */
    for (int64_t i = 0; i < count; i++) {
        const Span *other = span[i].written ? reach : written_reach;
        if (other && other->high > span[i].low)
            return fail_value(args, span[i].item->name, "an array overlaps one of %s in memory",
                              other->item->name);
        if (!reach || span[i].high > reach->high) reach = &span[i];
        if (span[i].written && (!written_reach || span[i].high > written_reach->high))
            written_reach = &span[i];
    }
    return true;
}

/* No array of an output list shares memory with another of any list (all are contiguous). */
static bool lists_disjoint(const Args *args) {
    enum { FEW = 32 };
    Span few[FEW], *span = few;
    int64_t most = 0, count = 0;
    for (int l = 0; l < args->lists; l++) most += args->list[l].n;
    if (most > FEW) span = PyMem_Malloc(2 * (size_t)most * sizeof *span);
    if (!span) return PyErr_NoMemory(), false;
    for (int i = 0, l = 0; i < args->signature->count; i++) {
        const struct Param *param = &args->signature->param[i];
        if (param->kind != 'l') continue;
        count += add_spans(span + count, &args->list[l++], param->output);
    }
    if (most <= FEW) insert_spans(span, count);
    const Span *sorted = most <= FEW ? span : radix_sort_spans(span, span + most, count);
    bool ok = spans_disjoint(args, sorted, count);
    if (most > FEW) PyMem_Free(span);
    return ok;
}

WRAPPER(global_norm) {
    ENTRY("global_norm(>norm, >coef?, >partial, list tensors, float max_norm)");
    Tensor *norm = t[0], *coef = t[1], *partial = t[2];
    const TensorList *tensors = &args->list[0];
    if (!list_checks(args, tensors)) return refuse(args);
    const Tensor *main = widest(tensors, norm);
    if (!is_stat(args, norm, main) || !is_scalar(args, norm) || !is_stat(args, coef, main) ||
        !is_scalar(args, coef) || !is_stat(args, partial, main) ||
        !need_int(args, elements(partial) > 0, "partial", "at least 1 element", 0) ||
        !need_float(args, args->f[0] >= 0, "max_norm", "a number >= 0", args->f[0]))
        return refuse(args);
    RUN(global_norm, args, main, norm, coef, partial, tensors, args->f[0]);
}

WRAPPER(scale) {
    ENTRY("scale(>list tensors, coef)");
    const TensorList *tensors = &args->list[0];
    const Tensor *coef = t[0];
    if (!list_checks(args, tensors) || !lists_disjoint(args)) return refuse(args);
    const Tensor *main = widest(tensors, coef);
    if (!is_stat(args, coef, main) || !is_scalar(args, coef)) return refuse(args);
    RUN(scale, args, main, tensors, coef);
}

static bool adamw_lists(const Args *args, const TensorList *p, const TensorList *g,
                        const TensorList *m, const TensorList *v, const TensorList *steps) {
    if (!list_checks(args, p) || !lists_match(args, g, p) || !lists_match(args, m, p) ||
        !lists_match(args, v, p) ||
        !need_int(args, steps->n == p->n, "steps", "one array per parameter", steps->n))
        return false;
    for (int64_t n = 0; n < steps->n; n++) {
        if (!is_dtype(args, &steps->items[n], F32) || !is_scalar(args, &steps->items[n]))
            return false;
    }
    if (!p->n) return true;
    bool f64 = p->items->dtype == F64;
    return one_dtype(args, p, p->items) && one_dtype(args, g, p->items) &&
           one_dtype(args, m, m->items) && one_dtype(args, v, m->items) &&
           (f64 == (m->items->dtype == F64) ||
            fail_type(args, m->items->name, "expected float64 exactly where params are, got %s",
                      dtype_name(m->items->dtype))) &&
           lists_disjoint(args);
}

WRAPPER(adamw_step) {
    ENTRY("adamw_step(>list params, list grads, >list exp_avgs, >list exp_avg_sqs, list steps, "
          "coef?, grad_scale?, found_inf?, lr_tensor?, float lr, float beta1, float beta2, float "
          "eps, float weight_decay, int maximize, int stochastic_rounding, int seed)");
    const TensorList *p = &args->list[0], *g = &args->list[1], *m = &args->list[2],
                     *v = &args->list[3], *steps = &args->list[4];
    AdamWOptions o = {.lr = args->f[0],
                      .beta1 = args->f[1],
                      .beta2 = args->f[2],
                      .eps = args->f[3],
                      .weight_decay = args->f[4],
                      .maximize = args->i[0],
                      .stochastic_rounding = args->i[1],
                      .seed = args->i[2]};
    Tensor none = {.dtype = F32, .ndim = 1};
    const Tensor *main = widest(p, &none), *coef = t[0];
    if (!adamw_lists(args, p, g, m, v, steps) || !is_stat(args, coef, main) ||
        !is_scalar(args, coef))
        return refuse(args);
    for (int i = 1; i < 4; i++) {
        if (!is_dtype(args, t[i], F32) || !is_scalar(args, t[i])) return refuse(args);
    }
    if (!need_float(args, isfinite(o.lr), "lr", "a finite number", o.lr) ||
        !finite_from_0(args, o.eps, "eps") ||
        !need_float(args, o.beta1 >= 0 && o.beta1 < 1, "beta1", "a number in 0 .. 1, 1 excluded",
                    o.beta1) ||
        !need_float(args, o.beta2 >= 0 && o.beta2 < 1, "beta2", "a number in 0 .. 1, 1 excluded",
                    o.beta2) ||
        !finite_from_0(args, o.weight_decay, "weight_decay"))
        return refuse(args);
    RUN(adamw_step, args, main, p, g, m, v, steps, coef, t[1], t[2], t[3], &o);
}

/* ---- Facts about the build and the machine --------------------------------------------------- */

/* Every wrapper above, for the table of methods and for build_info(). */
/* clang-format off */
#define OPS(X)                                                                                     \
    X(rms_norm_fwd) X(rms_norm_bwd) X(add_rms_norm_fwd) X(add_rms_norm_bwd)                        \
    X(swiglu_fwd) X(swiglu_bwd) X(rope_fwd) X(rope_bwd) X(qk_norm_rope_fwd) X(qk_norm_rope_bwd)    \
    X(attention_fwd) X(attention_bwd) X(cross_entropy_fwd) X(cross_entropy_bwd)                    \
    X(linear_cross_entropy_fwd) X(linear_cross_entropy_bwd)                                        \
    X(embedding_fwd) X(embedding_bwd) X(global_norm) X(scale) X(adamw_step)
/* clang-format on */

static int add_backends(PyObject *ops, const char *name, bool cuda) {
    PyObject *backends = PyUnicode_FromString(cuda ? "cpu cuda" : "cpu");
    int failed = !backends || PyDict_SetItemString(ops, name, backends);
    Py_XDECREF(backends);
    return failed;
}

/* {entry point: the backends it was compiled for} */
static PyObject *backends_of_ops(void) {
    PyObject *ops = PyDict_New();
    int failed = !ops;
#define BACKENDS(op) failed = failed || add_backends(ops, #op, op##_cuda);
    OPS(BACKENDS)
    if (failed) Py_CLEAR(ops);
    return ops;
}

static PyObject *build_info(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    static const char *const levels[] = {"plain", "avx2", "avx512"};
    return Py_BuildValue("{s:s,s:s,s:i,s:O,s:i,s:s,s:N}", "version", FLATOUT_VERSION, "cpu",
                         levels[cpu_level()], "cpu_threads", cpu_threads(), "cuda",
                         cuda_enter ? Py_True : Py_False, "cuda_version",
                         cuda_build_version ? cuda_build_version() : 0, "cuda_archs",
                         FLATOUT_CUDA_ARCHS, "ops", backends_of_ops());
}

static PyObject *attention_workspace(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    AttentionShape shape;
    int64_t *const field[] = {&shape.backward, &shape.B,     &shape.Sq,     &shape.Sk,
                              &shape.Hq,       &shape.Hk,    &shape.D,      &shape.sequences,
                              &shape.left,     &shape.right, &shape.capped, &shape.deterministic};
    const Py_ssize_t fields = sizeof field / sizeof *field;
    if (nargs != fields)
        return PyErr_Format(PyExc_TypeError, "attention_workspace: expected %zd integers, got %zd",
                            fields, nargs);
    for (Py_ssize_t i = 0; i < fields; i++) {
        *field[i] = PyLong_AsLongLong(args[i]);
        if (*field[i] == -1 && PyErr_Occurred()) return NULL;
    }
    return PyLong_FromLongLong(attention_workspace_cuda ? attention_workspace_cuda(&shape) : 0);
}

static PyObject *set_num_threads(PyObject *self, PyObject *count) {
    (void)self;
    long n = PyLong_AsLong(count);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 0 || n > 4096) {
        PyErr_Format(ArgumentValueError,
                     "set_num_threads: count: expected 1 .. 4096, or 0 for the default, got %ld",
                     n);
        return NULL;
    }
    cpu_set_threads((int)n);
    Py_RETURN_NONE;
}

static PyObject *multiprocessors(PyObject *self, PyObject *device) {
    (void)self;
    long index = PyLong_AsLong(device);
    if (index == -1 && PyErr_Occurred()) return NULL;
    return PyLong_FromLong(cuda_multiprocessors ? cuda_multiprocessors((int)index) : 0);
}

static PyObject *device_count(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(cuda_device_count ? cuda_device_count() : 0);
}

/* ---- Module ---------------------------------------------------------------------------------- */

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL},

static PyMethodDef methods[] = {
    OPS(METHOD) /* with its own comma */
    {"build_info", build_info, METH_NOARGS, "What this binary was built with."},
    {"set_num_threads", set_num_threads, METH_O, "Threads of the CPU ops; 0: OpenMP's default."},
    {"multiprocessors", multiprocessors, METH_O, "Multiprocessors of a CUDA device; 0: none."},
    {"attention_workspace", (PyCFunction)(void (*)(void))attention_workspace, METH_FASTCALL,
     "Bytes of attention's workspace on CUDA, by (backward, B, Sq, Sk, Hq, Hk, D, sequences, left, "
     "right, capped, deterministic)."},
    {"device_count", device_count, METH_NOARGS, "Usable CUDA devices; 0 without a driver."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    cpu_init();
    return tensor_init(module);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)module_exec}, {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "flatout._C",
                                        .m_doc = "flatout's ops; csrc/ops.h is their manual.",
                                        .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
