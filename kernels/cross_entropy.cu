// cross_entropy.cu: cross-entropy of given logits (formulas: csrc/ops.h).
//
// Memory-bound: forward reads the logits once (online softmax: every thread keeps a running maximum
// and a sum scaled to it), backward reads them and writes as much. One block per row; a row's
// vectors start at the 16-byte boundary at or before it, so that any V and any stride is read in
// vectors, with guarded elements at the two ends. What the rows share (the reduction's factors) is
// computed into stats on the device: the host never waits for it. The sum of exponentials is kept
// without the largest logit's 1, and lse in two floats, so that p_y - 1, p and the loss have all
// their digits where a row is confident of its label and where its logits are large.
#include "common.cuh"

constexpr int BLOCK = 512;
// Blocks of the backward that must fit a multiprocessor: on Hopper as many as need no spills.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int PLAIN_RESIDENT = 4, RESIDENT = 3;
#else
constexpr int PLAIN_RESIDENT = 2, RESIDENT = 2;
#endif
constexpr float LOG2E = 1.4426950408889634f;
constexpr int64_t OUT_OF_RANGE = INT64_MIN, IGNORED = -1;

enum { SCALE, Z_SCALE, CLASS_SUM, CORRECT }; // stats: CORRECT holds a 32-bit integer

struct Labels {
    const void *target;
    bool wide; // I64
    const float *class_weight;
    int64_t N, V;
    LossOptions o;

    // Row n's label, IGNORED or OUT_OF_RANGE.
    __device__ int64_t of(int64_t n) const {
        if (o.shift != 0) {
            int64_t at = n % o.seq + o.shift;
            if (at < 0 || at >= o.seq) return IGNORED;
            n += o.shift;
        }
        int64_t y = wide ? ((const int64_t *)target)[n] : ((const int32_t *)target)[n];
        if (y == o.ignore_index) return IGNORED;
        return y < 0 || y >= V ? OUT_OF_RANGE : y;
    }

    __device__ float weight(int64_t y) const { return class_weight ? class_weight[y] : 1.0f; }
};

// A sum over the block in double, in a fixed order; 0 in all threads but the first.
__device__ double block_sum_double(double x) {
    __shared__ double part[BLOCK / 32];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    __syncthreads(); // part may still be read by the call before
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x) return 0.0;
    for (int warp = 1; warp < BLOCK / 32; warp++) x += part[warp];
    return x;
}

// stats, from the labels: one block.
__global__ void __launch_bounds__(BLOCK)
    cross_entropy_stats_kernel(float *stats, Labels labels, const float *num_items) {
    double count = 0, weights = 0, classes = 0;
    for (int64_t n = threadIdx.x; n < labels.N; n += BLOCK) {
        int64_t y = labels.of(n);
        if (y == IGNORED) continue;
        count += 1;
        weights += y == OUT_OF_RANGE ? 0.0 : labels.weight(y);
    }
    for (int64_t v = threadIdx.x; labels.class_weight && v < labels.V; v += BLOCK)
        classes += labels.class_weight[v];
    count = block_sum_double(count);
    weights = block_sum_double(weights);
    classes = block_sum_double(classes);
    if (threadIdx.x) return;
    double scale = 1, z_scale = 1;
    if (labels.o.reduction != REDUCE_NONE && num_items) {
        scale = z_scale = 1 / (double)*num_items;
    } else if (labels.o.reduction == REDUCE_MEAN) { // over no row: a loss of 0 / 0
        scale = 1 / weights, z_scale = 1 / count;
    }
    stats[SCALE] = (float)scale;
    stats[Z_SCALE] = (float)z_scale;
    stats[CLASS_SUM] = labels.class_weight ? (float)classes : (float)labels.V;
    stats[CORRECT] = __int_as_float(0);
}

// Kernels for PLAIN rows, those without softcap and label smoothing, have nothing of them in their
// loops.
static bool is_plain(const Labels &labels) {
    return labels.o.softcap == 0 && labels.o.label_smoothing == 0;
}

// A row as vectors: vector k holds the elements first(k) .. first(k) + VEC - 1.
template <typename T> struct RowVectors {
    static constexpr int VEC = 16 / sizeof(T);
    int64_t V, lead, count;

    __device__ RowVectors(const T *row, int64_t V) : V(V) {
        lead = (uintptr_t)row % 16 / sizeof(T);
        count = (V + lead + VEC - 1) / VEC;
    }
    __device__ int64_t first(int64_t k) const { return k * VEC - lead; }
    __device__ bool whole(int64_t k) const { return first(k) >= 0 && first(k) + VEC <= V; }

    // Elements beyond the row's ends come as -inf.
    __device__ void load_or_pad(float (&z)[VEC], const T *row, int64_t k) const {
        if (whole(k)) {
            load<T, VEC>(z, row + first(k));
            return;
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            int64_t v = first(k) + j;
            z[j] = v >= 0 && v < V ? to_float(row[v]) : -INFINITY;
        }
    }
};

__device__ __forceinline__ float capped(float z, float cap) {
    return cap == 0 ? z : __fmul_rn(cap, tanhf(z / cap)); // never fused: the same bits everywhere
}

// exp(z - shift - low): to the last bits for fp32 logits, else as precisely as 16 bits ask for.
template <typename T> __device__ __forceinline__ float exp_of(float z, float shift, float low = 0) {
    if constexpr (sizeof(T) == 4) return expf(z - shift - low);
    return exp2_approx(fmaf(z - shift, LOG2E, -LOG2E * low));
}

// exp(lower - upper), and 1 for equal infinities.
__device__ __forceinline__ float ratio(float lower, float upper) {
    return lower == upper ? 1.0f : expf(lower - upper);
}

// The logits so far: their maximum, and `rest`, the sum of exp(z - maximum) over all of them but
// that one. Its own term is 1, beside which the small ones of a confident row would be lost.
struct Softmax {
    float max = -INFINITY, rest = 0;

    template <typename T, int VEC> __device__ void add(const float (&z)[VEC]) {
        float top = max, lower[VEC], part = 0; // lower: {max, z...} without the largest of them
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            lower[j] = min_nan(top, z[j]);
            top = max_nan(top, z[j]);
        }
        if (top != max) rest *= expf(max - top);
        float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
        for (int j = 0; j < VEC; j++) part += exp_of<T>(lower[j], shift);
        rest += part;
        max = top;
    }

    __device__ void join(float other_max, float other_rest) {
        if (other_max > max) {
            rest = other_rest + ratio(max, other_max) * (1 + rest);
            max = other_max;
        } else {
            rest += ratio(other_max, max) * (1 + other_rest);
        }
    }

    // log sum_v exp(z_v - max). The largest logit alone is infinite: no class has a probability.
    __device__ double log_sum() const { return max == INFINITY ? NAN : log1p((double)rest); }
};

constexpr int64_t NONE = INT64_MAX;

// Where this thread has seen its maximum first.
template <int VEC>
__device__ __forceinline__ int64_t first_of(const float (&z)[VEC], float top, int64_t first) {
    int at = 0;
#pragma unroll
    for (int j = VEC - 1; j >= 0; j--)
        if (z[j] == top) at = j;
    return first + at;
}

// What a block knows of its row after one pass.
struct RowSums {
    Softmax softmax;
    int64_t largest = NONE; // the maximum's index, the first of equals
    float weighted = 0;     // sum_v cw_v (z_v - origin), for label smoothing

    __device__ void join(float max, float rest, int64_t index, float other_weighted) {
        if (max > softmax.max || (max == softmax.max && index < largest)) largest = index;
        softmax.join(max, rest);
        weighted += other_weighted;
    }
};

__device__ RowSums join_block(RowSums r) {
    __shared__ RowSums part[BLOCK / 32];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        r.join(__shfl_xor_sync(~0u, r.softmax.max, lane),
               __shfl_xor_sync(~0u, r.softmax.rest, lane), __shfl_xor_sync(~0u, r.largest, lane),
               __shfl_xor_sync(~0u, r.weighted, lane));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = r;
    __syncthreads();
    for (int warp = 1; threadIdx.x == 0 && warp < BLOCK / 32; warp++) {
        const RowSums &p = part[warp];
        r.join(p.softmax.max, p.softmax.rest, p.largest, p.weighted);
    }
    return r;
}

// `origin`: near the row's logits, so that large ones cancel before they are added up.
template <typename T, bool PLAIN>
__device__ RowSums scan(const T *row, const Labels &labels, bool want_largest, float origin) {
    RowVectors<T> vectors(row, labels.V);
    constexpr int VEC = RowVectors<T>::VEC;
    float cap = (float)labels.o.softcap;
    RowSums r;
    for (int64_t k = threadIdx.x; k < vectors.count; k += BLOCK) {
        float z[VEC], before = r.softmax.max;
        vectors.load_or_pad(z, row, k);
        int64_t first = vectors.first(k);
        if constexpr (!PLAIN) {
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                bool inside = first + j >= 0 && first + j < labels.V;
                if (inside) z[j] = capped(z[j], cap);
                if (inside && labels.o.label_smoothing != 0)
                    r.weighted += labels.weight(first + j) * (z[j] - origin);
            }
        }
        r.softmax.add<T>(z);
        if (want_largest && r.softmax.max > before) r.largest = first_of(z, r.softmax.max, first);
    }
    return join_block(r);
}

template <typename T, bool PLAIN>
__global__ void __launch_bounds__(BLOCK)
    cross_entropy_fwd_kernel(float *losses, float *lse, float *lse_low, int64_t *predicted,
                             float *stats, const T *__restrict__ logits, int64_t stride,
                             Labels labels, bool want_largest) {
    float cap = PLAIN ? 0 : (float)labels.o.softcap;
    float e = PLAIN ? 0 : (float)labels.o.label_smoothing;
    for (int64_t n = blockIdx.x; n < labels.N; n += gridDim.x) {
        const T *row = logits + n * stride;
        float origin = e != 0 ? capped(to_float(row[0]), cap) : 0.0f;
        if (isinf(origin)) origin = 0;
        RowSums r = scan<T, PLAIN>(row, labels, want_largest, origin);
        if (threadIdx.x) continue;
        int64_t y = labels.of(n), largest = r.largest == NONE ? 0 : r.largest;
        double max = r.softmax.max, log_sum = r.softmax.log_sum();
        float l = (float)(max + log_sum), loss = 0;
        if (y == OUT_OF_RANGE) {
            loss = NAN;
        } else if (y >= 0) {
            // Not from the rounded l: where the label is the maximum, log_sum alone is the loss.
            float label_logit = capped(to_float(row[y]), cap);
            loss = (1 - e) * labels.weight(y) * (float)(max - label_logit + log_sum);
            if (e != 0)
                loss += e / (float)labels.V *
                        (stats[CLASS_SUM] * (float)(max - origin + log_sum) - r.weighted);
            loss += (float)labels.o.z_loss * l * l;
        }
        losses[n] = loss;
        lse[n] = l;
        if (lse_low) lse_low[n] = isfinite(l) ? (float)(max - l + log_sum) : 0.0f;
        if (predicted) predicted[n] = y == IGNORED ? -1 : largest;
        if (want_largest && y >= 0 && largest == y) atomicAdd((int *)&stats[CORRECT], 1);
    }
}

// loss and accuracy: one block, a fixed tree.
__global__ void __launch_bounds__(BLOCK)
    cross_entropy_reduce_kernel(float *loss, float *accuracy, const float *__restrict__ losses,
                                const float *__restrict__ lse, const float *__restrict__ stats,
                                Labels labels) {
    double sum = 0, z_sum = 0, count = 0;
    for (int64_t n = threadIdx.x; n < labels.N; n += BLOCK) {
        bool scored = labels.of(n) != IGNORED;
        float l = scored ? lse[n] : 0.0f;
        count += scored;
        sum += losses[n]; // 0 for ignored rows
        z_sum += (double)l * l;
    }
    z_sum = labels.o.z_loss != 0 ? labels.o.z_loss * z_sum : 0.0;
    sum = block_sum_double(sum);
    z_sum = block_sum_double(z_sum);
    count = block_sum_double(count);
    if (threadIdx.x) return;
    if (accuracy) *accuracy = (float)(__float_as_int(stats[CORRECT]) / count);
    if (!loss) return;
    double scale = stats[SCALE], z_scale = stats[Z_SCALE];
    *loss = (float)(scale == z_scale ? sum * scale : (sum - z_sum) * scale + z_sum * z_scale);
}

// With g and gz the gradients of the loss's first two terms and of its z term:
//   d z_v = own (p_v - [v = y]) + other p_v - smooth cw_v,  p_v = exp(z_v - lse)
struct RowGradient {
    float own, other, smooth;
};

__device__ RowGradient gradient_of(const Labels &labels, int64_t y, float l, float dloss,
                                   float dlse, const float *stats) {
    if (y == OUT_OF_RANGE) return {NAN, NAN, NAN};
    if (y == IGNORED) return {0, dlse, 0};
    float e = (float)labels.o.label_smoothing, g = dloss * stats[SCALE];
    float gz = dloss * stats[Z_SCALE], smooth = g * e / (float)labels.V;
    return {g * (1 - e) * labels.weight(y),
            dlse + smooth * stats[CLASS_SUM] + gz * 2 * (float)labels.o.z_loss * l, smooth};
}

// What label smoothing and softcap make of d z_v; z after softcap.
template <bool PLAIN>
__device__ __forceinline__ float finished(float d, float z, int64_t v, float smooth,
                                          const Labels &labels) {
    if (PLAIN) return d;
    float cap = (float)labels.o.softcap;
    if (smooth != 0 && v >= 0 && v < labels.V) d -= smooth * labels.weight(v);
    return cap == 0 ? d : d * (1 - z / cap * (z / cap));
}

// d z_y, with p - 1 not as a difference of nearly equal numbers.
template <bool PLAIN>
__device__ __forceinline__ float label_gradient(float z, int64_t y, float high, float low,
                                                const RowGradient &g, const Labels &labels) {
    float x = z - high - low;
    return finished<PLAIN>(g.own * expm1f(x) + g.other * expf(x), z, y, g.smooth, labels);
}

// dlogits may be logits: a thread has read its vector before it writes it, and of the label's
// vector z_y before that.
template <typename T, bool PLAIN>
__global__ void __launch_bounds__(BLOCK, PLAIN && sizeof(T) == 2 ? PLAIN_RESIDENT : RESIDENT)
    cross_entropy_bwd_kernel(T *dlogits, int64_t dlogits_stride, const float *__restrict__ dloss,
                             const float *__restrict__ dlse, const T *logits, int64_t stride,
                             const float *__restrict__ lse, const float *__restrict__ lse_low,
                             const float *__restrict__ stats, Labels labels) {
    constexpr int VEC = RowVectors<T>::VEC;
    float cap = PLAIN ? 0 : (float)labels.o.softcap;
    for (int64_t n = blockIdx.x; n < labels.N; n += gridDim.x) {
        const T *row = logits + n * stride;
        T *to = dlogits + n * dlogits_stride;
        int64_t y = labels.of(n);
        float high = lse[n], low = lse_low ? lse_low[n] : 0.0f;
        RowGradient g =
            gradient_of(labels, y, high, dloss[labels.o.reduction == REDUCE_NONE ? n : 0],
                        dlse ? dlse[n] : 0.0f, stats);
        bool zero = g.own == 0 && g.other == 0 && g.smooth == 0; // even where logits are infinite
        RowVectors<T> vectors(row, labels.V);
        bool same_lead = (uintptr_t)to % 16 == (uintptr_t)row % 16;
        bool has_label = y >= 0 && !zero && (y + vectors.lead) / VEC % BLOCK == threadIdx.x;
        float label = 0, factor = g.own + g.other;
        if (has_label)
            label = label_gradient<PLAIN>(capped(to_float(row[y]), cap), y, high, low, g, labels);
        for (int64_t k = threadIdx.x; k < vectors.count; k += BLOCK) {
            float d[VEC] = {};
            int64_t first = vectors.first(k);
            if (!zero) {
                float z[VEC];
                vectors.load_or_pad(z, row, k);
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    float x = capped(z[j], cap), p = exp_of<T>(x, high, low);
                    d[j] = finished<PLAIN>(factor * p, x, first + j, g.smooth, labels);
                }
            }
            if (same_lead && vectors.whole(k)) {
                store<T, VEC>(to + first, d);
                continue;
            }
#pragma unroll
            for (int j = 0; j < VEC; j++)
                if (first + j >= 0 && first + j < labels.V) to[first + j] = from_float<T>(d[j]);
        }
        if (has_label) to[y] = from_float<T>(label);
    }
}

// ---- Launchers ----------------------------------------------------------------------------------

static Labels labels_of(const Tensor *target, const Tensor *class_weight, const Tensor *logits,
                        const LossOptions *o) {
    return {target->data,
            target->dtype == I64,
            class_weight ? (const float *)class_weight->data : nullptr,
            logits->shape[0],
            logits->shape[1],
            *o};
}

static float *floats(const Tensor *t) { return t ? (float *)t->data : nullptr; }

template <typename T>
static const char *fwd(Tensor *loss, Tensor *losses, Tensor *lse, Tensor *accuracy,
                       Tensor *predicted, Tensor *lse_low, Tensor *stats, const Tensor *logits,
                       const Labels &labels, const Tensor *num_items, void *stream) {
    const char *error = launch(cross_entropy_stats_kernel, 1, BLOCK, 0, stream, floats(stats),
                               labels, floats(num_items));
    if (error) return error;
    auto kernel =
        is_plain(labels) ? cross_entropy_fwd_kernel<T, true> : cross_entropy_fwd_kernel<T, false>;
    error = launch(kernel, labels.N < INT32_MAX ? labels.N : INT32_MAX, BLOCK, 0, stream,
                   floats(losses), floats(lse), floats(lse_low),
                   predicted ? (int64_t *)predicted->data : nullptr, floats(stats),
                   (const T *)logits->data, logits->stride[0], labels, accuracy || predicted);
    if (error || (!loss && !accuracy)) return error;
    return launch(cross_entropy_reduce_kernel, 1, BLOCK, 0, stream, floats(loss), floats(accuracy),
                  floats(losses), floats(lse), floats(stats), labels);
}

template <typename T>
static const char *bwd(Tensor *dlogits, Tensor *stats, const Tensor *dloss, const Tensor *dlse,
                       const Tensor *logits, const Labels &labels, const Tensor *num_items,
                       const Tensor *lse, const Tensor *lse_low, void *stream) {
    const char *error = launch(cross_entropy_stats_kernel, 1, BLOCK, 0, stream, floats(stats),
                               labels, floats(num_items));
    if (error) return error;
    auto kernel =
        is_plain(labels) ? cross_entropy_bwd_kernel<T, true> : cross_entropy_bwd_kernel<T, false>;
    return launch(kernel, labels.N < INT32_MAX ? labels.N : INT32_MAX, BLOCK, 0, stream,
                  (T *)dlogits->data, dlogits->stride[0], floats(dloss), floats(dlse),
                  (const T *)logits->data, logits->stride[0], floats(lse), floats(lse_low),
                  floats(stats), labels);
}

extern "C" const char *cross_entropy_fwd_cuda(Tensor *loss, Tensor *losses, Tensor *lse,
                                              Tensor *accuracy, Tensor *predicted, Tensor *lse_low,
                                              Tensor *stats, const Tensor *logits,
                                              const Tensor *target, const Tensor *class_weight,
                                              const Tensor *num_items, const LossOptions *options,
                                              void *stream) {
    Labels labels = labels_of(target, class_weight, logits, options);
    BY_DTYPE(logits->dtype, fwd<T>(loss, losses, lse, accuracy, predicted, lse_low, stats, logits,
                                   labels, num_items, stream))
}

extern "C" const char *cross_entropy_bwd_cuda(Tensor *dlogits, Tensor *stats, const Tensor *dloss,
                                              const Tensor *dlse, const Tensor *logits,
                                              const Tensor *target, const Tensor *class_weight,
                                              const Tensor *num_items, const Tensor *lse,
                                              const Tensor *lse_low, const LossOptions *options,
                                              void *stream) {
    Labels labels = labels_of(target, class_weight, logits, options);
    BY_DTYPE(logits->dtype,
             bwd<T>(dlogits, stats, dloss, dlse, logits, labels, num_items, lse, lse_low, stream))
}
