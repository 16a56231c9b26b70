/* ops.h: the C ABI of flatout, and its manual.
 *
 * Every op is declared here once, with its formula, its shapes, and what it saves. An op exists
 * on the CPU (csrc/<op>.c, the readable definition) and on CUDA (kernels/<op>.cu); module.c checks
 * the arguments of both and calls one of them. Arguments come in this order: outputs, scratch,
 * inputs, scalars, stream.
 *
 *  - An op returns NULL, or a static string that says what went wrong.
 *  - An op never allocates device memory, synchronizes, prints or reads the environment: outputs,
 *    saved tensors and scratch are arguments, and the caller allocates them. One exception:
 *    linear_cross_entropy on CUDA, the first time at a size (cublaslt.h).
 *  - A pointer marked "or NULL" is optional. Everything else is checked by module.c to be there,
 *    to have the shape written here, to lie on one device, and (outputs) to be writable and to
 *    overlap no other argument, except where it says "may be".
 *  - Tensors have any strides with a contiguous last dimension, unless it says "contiguous".
 *
 * Dimensions: N rows (tokens), H hidden, I intermediate, V vocabulary, B batch, S sequence,
 * T = total packed tokens, D head dimension, Hq and Hk query and key heads, P partial sums.
 * "stat" is the dtype of statistics: f32, and f64 where x is f64.
 */
#ifndef FLATOUT_OPS_H
#define FLATOUT_OPS_H

#include <stdbool.h>
#include <stdint.h>

#define MAX_DIMS 8

typedef enum { F32, BF16, F16, F64, I32, I64, U8, BOOL } Dtype;

/* A borrowed view of an array: nothing here is owned, and it dies with the call. */
typedef struct {
    void *data;
    int64_t shape[MAX_DIMS];
    int64_t stride[MAX_DIMS]; /* in elements */
    const char *name;         /* of the argument, for error messages */
    int ndim;
    int device; /* -1: CPU, else the CUDA device's index */
    Dtype dtype;
    int readonly;
    uintptr_t low, high; /* the bytes that the argument spans, for the checks; empty: both 0 */
} Tensor;

typedef struct {
    const Tensor *items;
    int64_t n;
} TensorList;

enum { REDUCE_NONE, REDUCE_MEAN, REDUCE_SUM };

/* The options of cross_entropy and linear_cross_entropy. */
typedef struct {
    int64_t ignore_index;
    int64_t reduction;      /* REDUCE_... */
    int64_t seq;            /* the last dimension of target: N is a multiple of it */
    int64_t shift;          /* row n = b * seq + s is scored against target[b, s + shift]; */
                            /* rows with s + shift outside 0 .. seq - 1 are ignored */
    double label_smoothing; /* e in 0 .. 1 */
    double z_loss;          /* weight of lse^2 */
    double softcap;         /* c: logits become c tanh(logits / c); 0 = off */
} LossOptions;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t maximize;
    int64_t stochastic_rounding; /* of p, m and v when they are BF16 */
    int64_t seed;                /* of the stochastic rounding */
} AdamWOptions;

/* One declaration, every backend: the CPU op is compiled for plain x86-64 (or any other machine),
 * for AVX2 and for AVX-512, in float; and once in double for F64 tensors. A CUDA op that is not
 * linked in (a build without nvcc) has a NULL address. */
#define OP(name, ...)                                             \
    const char *name##_cpu_f32(__VA_ARGS__, void *stream);        \
    const char *name##_cpu_f32_avx2(__VA_ARGS__, void *stream);   \
    const char *name##_cpu_f32_avx512(__VA_ARGS__, void *stream); \
    const char *name##_cpu_f64(__VA_ARGS__, void *stream);        \
    __attribute__((weak)) const char *name##_cuda(__VA_ARGS__, void *stream);

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(hidden)

/* ---- RMSNorm --------------------------------------------------------------------------------
 * rstd[n] = 1 / sqrt(mean_h x[n,h]^2 + eps)
 * offset == 0 (Llama, Qwen): y = w * round(x * rstd), round to x's dtype
 * offset != 0 (Gemma):       y = (offset + w) * x * rstd, one rounding
 * y, x (..., H); rstd (N,) stat, or NULL; w (H,) of any float dtype. */
OP(rms_norm_fwd, Tensor *y, Tensor *rstd, const Tensor *x, const Tensor *w, double eps,
   double offset)
/* With g = dy * (offset + w) and xhat = x * rstd:
 * dx = rstd * (g - xhat * mean_h(g * xhat)),  dw = sum_n dy * round(xhat) (offset != 0: xhat)
 * dx, dy, x (..., H), dx may be dy; dw (H,) of w's dtype, or NULL for a frozen weight (then
 * dw_partial is NULL too); dw_partial (P, H) stat, scratch: any P gives the same dw for the same
 * P. */
OP(rms_norm_bwd, Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy, const Tensor *x,
   const Tensor *w, const Tensor *rstd, double offset)

/* s = round(x + r);  y = rms_norm(s). All (..., H). */
OP(add_rms_norm_fwd, Tensor *y, Tensor *s, Tensor *rstd, const Tensor *x, const Tensor *r,
   const Tensor *w, double eps, double offset)
/* dx = rms_norm_bwd(dy) + ds is the gradient of x and of r; ds (..., H) or NULL. dx may be dy. */
OP(add_rms_norm_bwd, Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy, const Tensor *ds,
   const Tensor *s, const Tensor *w, const Tensor *rstd, double offset)

/* ---- SwiGLU ---------------------------------------------------------------------------------
 * y = round(silu(gate)) * up,  silu(z) = z / (1 + exp(-z)). All (..., I); [gate | up] packed in
 * one array is two views of it, which module.c makes where `up` is None. */
OP(swiglu_fwd, Tensor *y, const Tensor *gate, const Tensor *up)
/* With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)),  dup = dy * round(silu).
 * dgate and dup may be gate and up. */
OP(swiglu_bwd, Tensor *dgate, Tensor *dup, const Tensor *dy, const Tensor *gate, const Tensor *up)

/* ---- Rotary embedding -----------------------------------------------------------------------
 * With the halves x = [x1 | x2] of a head, cos = [c1 | c2], sin = [s1 | s2] of its position:
 *   out1 = x1 * c1 - x2 * s1,  out2 = x2 * c2 + x1 * s2, in stat, one rounding.
 * q_out, q (B, S, Hq, D); k_out, k (B, S, Hk, D) or both NULL; cos, sin (B, S, D), with a batch
 * stride of 0 where one table serves all (module.c makes these from (T, H, D), (S, D) and
 * (T, D)); float dtype of their own. D is even. q_out may be q, k_out may be k. */
OP(rope_fwd, Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k, const Tensor *cos,
   const Tensor *sin)
/* The transpose of that rotation: dx1 = do1 * c1 + do2 * s2, dx2 = do2 * c2 - do1 * s1.
 * dq may be dq_out, dk may be dk_out. */
OP(rope_bwd, Tensor *dq, Tensor *dk, const Tensor *dq_out, const Tensor *dk_out, const Tensor *cos,
   const Tensor *sin)

/* Qwen3: q_out = rope(rms_norm(q, qw)), k_out = rope(rms_norm(k, kw)), norms over D; every
 * rounding as in rms_norm and rope. qw, kw (D,); q_rstd (B, S, Hq), k_rstd (B, S, Hk) contiguous
 * stat, or NULL. q_out may be q, k_out may be k. */
OP(qk_norm_rope_fwd, Tensor *q_out, Tensor *k_out, Tensor *q_rstd, Tensor *k_rstd, const Tensor *q,
   const Tensor *k, const Tensor *qw, const Tensor *kw, const Tensor *cos, const Tensor *sin,
   double eps)
/* dq = rms_norm_bwd(rope_bwd(dq_out)) from q, qw and q_rstd, and dqw the dw of it, summed over all
 * heads; rope_bwd's result stays in stat. dk and dkw alike. dq may be dq_out, dk may be dk_out.
 * dqw, dkw (D,), each or NULL with its partial; partials (P, D) stat, scratch. */
OP(qk_norm_rope_bwd, Tensor *dq, Tensor *dk, Tensor *dqw, Tensor *dkw, Tensor *dqw_partial,
   Tensor *dkw_partial, const Tensor *dq_out, const Tensor *dk_out, const Tensor *q,
   const Tensor *k, const Tensor *qw, const Tensor *kw, const Tensor *q_rstd, const Tensor *k_rstd,
   const Tensor *cos, const Tensor *sin)

/* ---- Attention ------------------------------------------------------------------------------
 * scores = scale * q k^T, softcap c != 0: c tanh(scores / c);  query i sees key j where
 *   i + sk - sq - left <= j <= i + sk - sq + right   (left, right < 0: open; causal: right = 0)
 * (bottom-right aligned);  lse = log sum_j exp(scores),  out = sum_j exp(scores - lse) v.
 * A row that sees no key has out 0 and lse -inf. Head h of q reads head h / (Hq / Hk) of k, v.
 * Dense:  out, q (B, Sq, Hq, D), k, v (B, Sk, Hk, D), lse (B, Hq, Sq); cu_q, cu_k NULL.
 * Packed: out, q (Tq, Hq, D), k, v (Tk, Hk, D), lse (Hq, Tq); cu_q, cu_k (sequences + 1,) I32:
 *   sequence b is rows cu_q[b] .. cu_q[b+1] - 1, empty ones allowed; rows beyond the last are
 *   written as empty ones. max_q, max_k: bounds of the lengths, 0 = unknown: the CPU
 *   refuses longer sequences, CUDA counts its tiles without.
 * lse is contiguous stat. workspace: U8 scratch of attention_workspace() bytes; NULL on the CPU.
 * On CUDA: BF16 and F16, D a multiple of 8 up to 128, strides and addresses multiples of 16 bytes,
 * cu_q and cu_k read on the device: entries out of order or of range are clamped, not refused. */
OP(attention_fwd, Tensor *out, Tensor *lse, Tensor *workspace, const Tensor *q, const Tensor *k,
   const Tensor *v, const Tensor *cu_q, const Tensor *cu_k, int64_t max_q, int64_t max_k,
   double scale, int64_t left, int64_t right, double softcap)
/* With p = exp(scores - lse), delta = sum_d dout * out - dlse:
 *   dv = p^T dout,  dscores = p * (dout v^T - delta) [* (1 - tanh^2) with softcap],
 *   dq = scale * dscores k,  dk = scale * dscores^T q;  summed over the query heads of a key head.
 * dlse like lse, or NULL. deterministic != 0 fixes the order of dq's sums on CUDA, at a price
 * (kernels/attention_bwd.cu): else dq's last bits vary from run to run there. All other sums, and
 * all on the CPU, have a fixed order anyway. */
OP(attention_bwd, Tensor *dq, Tensor *dk, Tensor *dv, Tensor *workspace, const Tensor *dout,
   const Tensor *dlse, const Tensor *q, const Tensor *k, const Tensor *v, const Tensor *out,
   const Tensor *lse, const Tensor *cu_q, const Tensor *cu_k, int64_t max_q, int64_t max_k,
   double scale, int64_t left, int64_t right, double softcap, int64_t deterministic)

/* The bytes of workspace that such a call needs on CUDA. sequences: -1 for dense, else entries of
 * cu_q less one, and then B = 1, Sq = Tq, Sk = Tk; capped: softcap != 0 or scale <= 0; backward: 0
 * for attention_fwd's, which asks for sizes alone, else attention_bwd's. The others as the op takes
 * them. */
typedef struct {
    int64_t backward, B, Sq, Sk, Hq, Hk, D, sequences, left, right, capped, deterministic;
} AttentionShape;
__attribute__((weak)) int64_t attention_workspace_cuda(const AttentionShape *shape);

/* ---- Cross-entropy --------------------------------------------------------------------------
 * For a row with logits z (after softcap), label y, class weights cw (1 without), e =
 * label_smoothing and lse = log sum_v exp(z_v):
 *   loss_n = (1 - e) cw_y (lse - z_y) + e / V sum_v cw_v (lse - z_v)  +  z_loss lse^2
 * Ignored rows have loss 0; lse is every row's, and so is its gradient dlse. Reductions: sum;
 * mean = (sum of the first two terms) / sum_n cw_y + (sum of the z term) / count of rows, over
 * rows not ignored; num_items given: sum / num_items. A mean over no row is NaN, its gradients 0.
 * loss () f32, or NULL for REDUCE_NONE; losses (N,) f32: per row, unreduced; lse (N,) stat;
 * lse_low (N,) stat or NULL: what lse's rounding left over, itself rounded (0 beside a lse that is
 * not finite), from which the CUDA backward takes exp(z - lse) to the last bits;
 * accuracy () f32 or NULL: share of rows not ignored whose largest logit (the first of equals) is
 * the label's; predicted (N,) I64 or NULL: that largest logit's index, -1 for ignored rows;
 * stats (4,) f32, scratch; logits (N, V); target (N,) I32 or I64, contiguous; class_weight (V,)
 * f32 or NULL; num_items (1,) f32 or NULL. A label outside 0 .. V - 1 that is not ignored: on the
 * CPU an error before anything is written; on CUDA its row's loss and gradients are NaN. (f64
 * logits: losses, loss and stats are f64 too.) */
OP(cross_entropy_fwd, Tensor *loss, Tensor *losses, Tensor *lse, Tensor *accuracy,
   Tensor *predicted, Tensor *lse_low, Tensor *stats, const Tensor *logits, const Tensor *target,
   const Tensor *class_weight, const Tensor *num_items, const LossOptions *options)
/* dlogits (N, V), may be logits; dloss () or, for REDUCE_NONE, (N,) stat; dlse (N,) stat or NULL;
 * lse and lse_low as the forward saved them, lse_low or NULL, which is as 0: then p_v errs by lse's
 * rounding. The CPU reads neither and computes lse anew, in double. */
OP(cross_entropy_bwd, Tensor *dlogits, Tensor *stats, const Tensor *dloss, const Tensor *dlse,
   const Tensor *logits, const Tensor *target, const Tensor *class_weight, const Tensor *num_items,
   const Tensor *lse, const Tensor *lse_low, const LossOptions *options)

/* logits = round(x w^T + bias), then cross_entropy, in chunks of C rows: of the logits only one
 * chunk ever exists. Where dx, dw or db is given, its gradient for dloss = 1 is written as the
 * chunks pass by: dlogits in stat, rounded once to x's dtype;
 *   dx = dlogits w,  dw = sum over chunks of dlogits^T x,  db = sum_n dlogits
 * dw accumulates over chunks in w's dtype, or in dw_accum, rounded once at the end.
 * x (N, H), w (V, H) of x's dtype, bias (V,) or NULL; dx (N, H), dw (V, H), db (V,), each or NULL;
 * scratch: dw_accum (V, H) f32 or NULL, db_accum (V,) stat or NULL without db, logits_chunk (C, V)
 * of x's dtype; workspace U8 or NULL: cuBLASLt's, 32 MiB on 256-byte boundaries is right; without
 * it nothing is timed (cublaslt.h), and dw cannot hold all logits. On CUDA a label out of range
 * makes dw and db NaN besides its row of dx, and bias has x's dtype.
 *
 * logits_chunk may be dw itself (V, H): the logits then lie in its memory, each row of V rounded up
 * to 16 bytes. Beside dw_accum that is idle until the sums are rounded into it: chunks of as many
 * rows as fit. Without dw_accum all N rows are one chunk, which must fit: dw's rows that lie beyond
 * the logits are made first; then those columns of the logits that are still needed, which the
 * first rows of dw come from, move into the end of workspace (spare_logits below), and that is as
 * much less for cuBLASLt. */
OP(linear_cross_entropy_fwd, Tensor *loss, Tensor *losses, Tensor *lse, Tensor *accuracy,
   Tensor *predicted, Tensor *dx, Tensor *dw, Tensor *db, Tensor *dw_accum, Tensor *db_accum,
   Tensor *logits_chunk, Tensor *stats, Tensor *workspace, const Tensor *x, const Tensor *w,
   const Tensor *target, const Tensor *bias, const Tensor *class_weight, const Tensor *num_items,
   const LossOptions *options)
/* The same gradients for any dloss and dlse; the logits are computed anew, and with them what the
 * saved lse holds. */
OP(linear_cross_entropy_bwd, Tensor *dx, Tensor *dw, Tensor *db, Tensor *dw_accum, Tensor *db_accum,
   Tensor *logits_chunk, Tensor *stats, Tensor *workspace, const Tensor *dloss, const Tensor *dlse,
   const Tensor *x, const Tensor *w, const Tensor *target, const Tensor *bias,
   const Tensor *class_weight, const Tensor *num_items, const Tensor *lse,
   const LossOptions *options)

/* Whether dw is made from logits in its own memory. */
static inline bool logits_in_dw(const Tensor *logits, const Tensor *dw, const Tensor *dw_accum) {
    return dw && !dw_accum && dw->shape[0] > 0 && dw->shape[1] > 0 && dw->data == logits->data;
}
/* How many rows of dw then lie on the logits, in whole tiles of a product. */
static inline int64_t dw_rows_on_logits(const Tensor *logits, const Tensor *dw) {
    int64_t taken = logits->shape[0] * logits->stride[0], H = dw->shape[1], V = dw->shape[0];
    int64_t rows = (taken + 128 * H - 1) / (128 * H) * 128;
    return rows < V ? rows : V;
}
/* Room at the end of `bytes` of workspace for the first so many columns of logits, as (N, columns)
 * on 256-byte boundaries; its byte in the workspace, negative where there is too little room. */
static inline int64_t spare_logits(Tensor *spare, const Tensor *logits, int64_t columns,
                                   int64_t item, int64_t bytes) {
    int64_t per = 16 / item;
    *spare = *logits;
    spare->shape[1] = columns;
    spare->stride[0] = (columns + per - 1) / per * per;
    int64_t start = bytes - spare->shape[0] * spare->stride[0] * item;
    return start < 0 ? -1 : start / 256 * 256;
}

/* ---- Embedding ------------------------------------------------------------------------------
 * y[n] = w[ids[n]]. y (N, H), ids (N,) I32 or I64 contiguous, w (V, H). An id outside 0 .. V - 1:
 * on the CPU an error before anything is written; on CUDA its row of y is NaN. */
OP(embedding_fwd, Tensor *y, const Tensor *ids, const Tensor *w)
/* dw[v] = sum over i with ids[i] = v of dy[order[i]]; the sum in stat, in a fixed order, one
 * rounding. All of dw is written. dw (V, H), dy (N, H); ids (N,) ascending; order (N,) I64: where
 * each stood before, from a stable sort. The CPU refuses other ids, and indices outside 0 .. N - 1.
 * CUDA checks neither: ids that name no row are left out, a wrong index reads foreign memory.
 * Or, where order is NULL: ids in any order, at most EMBEDDING_SORTED, which are sorted beside the
 * clearing of dw, for the same bits of dw; sorted (2, N) I64 contiguous is scratch for them, and
 * NULL where order is given.
 * partial (2 P, H) stat, scratch that the CPU does not use: of at most P pieces of the terms, p's
 * share of a row that began before it (2 p), or that goes on after it (2 p + 1). P decides the last
 * bits of dw. */
enum { EMBEDDING_SORTED = 16384 };
OP(embedding_bwd, Tensor *dw, Tensor *partial, Tensor *sorted, const Tensor *dy, const Tensor *ids,
   const Tensor *order)

/* ---- Optimizer ------------------------------------------------------------------------------
 * norm = sqrt(sum of squares over all tensors), coef = min(1, max_norm / (norm + 1e-6)).
 * norm (1,) stat; coef (1,) stat or NULL; partial (P,) stat, scratch; tensors: contiguous, any
 * float dtypes. The sum runs in a fixed order. */
OP(global_norm, Tensor *norm, Tensor *coef, Tensor *partial, const TensorList *tensors,
   double max_norm)
/* t *= coef[0] for every tensor, in place; a coef of exactly 1 writes nothing. coef (1,) stat. */
OP(scale, const TensorList *tensors, const Tensor *coef)
/* torch.optim.AdamW(fused=True)'s order, for every parameter, in stat:
 *   g = g * coef / grad_scale (maximize: -g);  p *= 1 - lr * weight_decay;
 *   m = m + (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2;
 *   p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps),  t = step
 * m and v feed the update before they are rounded on store. found_inf != 0: nothing changes.
 * p, g, m, v: lists of contiguous tensors of equal shapes; p and g share a dtype, m and v too.
 * steps: one () or (1,) F32 tensor per parameter, >= 1: already counting this step. coef: (1,)
 * stat or NULL; grad_scale, found_inf: (1,) F32 or NULL; lr: (1,) F32 that replaces options->lr,
 * or NULL. Stochastic rounding draws from a counter-based hash of (seed, step, index of the
 * element in the whole list), csrc/random.h, so it does not depend on the launch. */
OP(adamw_step, const TensorList *p, const TensorList *g, const TensorList *m, const TensorList *v,
   const TensorList *steps, const Tensor *coef, const Tensor *grad_scale, const Tensor *found_inf,
   const Tensor *lr, const AdamWOptions *options)

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
