// cross_entropy.cu: cross-entropy of given logits (formulas: csrc/ops.h).
//
// Memory-bound: forward reads the logits once (online softmax: every thread keeps a running maximum
// and a sum scaled to it), backward reads them and writes as much. One block per row; a row's
// vectors start at the 16-byte boundary at or before it, so that any V and any stride is read in
// vectors, with guarded elements at the two ends. What the rows share (the reduction's factors) is
// computed into stats on the device: the host never waits for it.
#include "common.cuh"

constexpr int BLOCK = 512;
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
    return cap == 0 ? z : cap * tanhf(z / cap);
}

// A maximum and the sum of exp(z - maximum) so far.
struct Softmax {
    float max = -INFINITY, sum = 0;

    // A vector's logits, its largest one known.
    template <int VEC> __device__ void add(const float (&z)[VEC], float top) {
        if (top > max) { // seldom, after the first few
            sum *= exp2f((max - top) * LOG2E);
            max = top;
        }
        // The difference first: its error is small where the sum is near 1, and its logarithm 0.
        float shift = max == -INFINITY ? 0.0f : max, part = 0;
#pragma unroll
        for (int j = 0; j < VEC; j++) part += exp2f((z[j] - shift) * LOG2E);
        sum += part;
    }

    __device__ void join(float other_max, float other_sum) {
        float top = fmaxf(max, other_max);
        if (top == -INFINITY) {
            sum += other_sum;
        } else {
            sum = sum * expf(max - top) + other_sum * expf(other_max - top);
        }
        max = top;
    }
};

struct Largest {
    float value = -INFINITY;
    int64_t index = INT64_MAX;

    __device__ void join(float other, int64_t at) {
        if (other > value || (other == value && at < index)) value = other, index = at;
    }
};

template <int VEC> __device__ Largest first_of(const float (&z)[VEC], float top, int64_t first) {
    int at = 0;
#pragma unroll
    for (int j = VEC - 1; j >= 0; j--)
        if (z[j] == top) at = j;
    Largest found;
    found.value = top, found.index = first + at;
    return found;
}

// What a block knows of its row after one pass.
struct RowSums {
    Softmax softmax;
    Largest largest;
    float weighted = 0; // sum_v cw_v z_v, for label smoothing
};

__device__ RowSums join_block(RowSums r) {
    __shared__ RowSums part[BLOCK / 32];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        r.softmax.join(__shfl_xor_sync(~0u, r.softmax.max, lane),
                       __shfl_xor_sync(~0u, r.softmax.sum, lane));
        r.largest.join(__shfl_xor_sync(~0u, r.largest.value, lane),
                       __shfl_xor_sync(~0u, r.largest.index, lane));
        r.weighted += __shfl_xor_sync(~0u, r.weighted, lane);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = r;
    __syncthreads();
    for (int warp = 0; threadIdx.x == 0 && warp < BLOCK / 32; warp++) {
        if (warp == 0) continue;
        r.softmax.join(part[warp].softmax.max, part[warp].softmax.sum);
        r.largest.join(part[warp].largest.value, part[warp].largest.index);
        r.weighted += part[warp].weighted;
    }
    return r;
}

template <typename T>
__device__ RowSums scan(const T *row, const Labels &labels, bool want_largest) {
    RowVectors<T> vectors(row, labels.V);
    constexpr int VEC = RowVectors<T>::VEC;
    float cap = (float)labels.o.softcap;
    RowSums r;
    for (int64_t k = threadIdx.x; k < vectors.count; k += BLOCK) {
        float z[VEC], top = -INFINITY;
        vectors.load_or_pad(z, row, k);
        int64_t first = vectors.first(k);
        if (cap != 0 || labels.o.label_smoothing != 0) {
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                bool inside = first + j >= 0 && first + j < labels.V;
                if (inside) z[j] = capped(z[j], cap);
                if (inside && labels.o.label_smoothing != 0)
                    r.weighted += labels.weight(first + j) * z[j];
            }
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) top = fmaxf(top, z[j]);
        if (want_largest && top > r.largest.value) r.largest = first_of(z, top, first);
        r.softmax.add(z, top);
    }
    return join_block(r);
}

template <typename T>
__global__ void __launch_bounds__(BLOCK)
    cross_entropy_fwd_kernel(float *losses, float *lse, int64_t *predicted, float *stats,
                             const T *__restrict__ logits, int64_t stride, Labels labels,
                             bool want_largest) {
    for (int64_t n = blockIdx.x; n < labels.N; n += gridDim.x) {
        const T *row = logits + n * stride;
        RowSums r = scan(row, labels, want_largest);
        if (threadIdx.x) continue;
        int64_t y = labels.of(n);
        float log_sum = logf(r.softmax.sum), l = r.softmax.max + log_sum, loss = 0;
        float e = (float)labels.o.label_smoothing;
        if (y == OUT_OF_RANGE) {
            loss = NAN;
        } else if (y >= 0) {
            float label_logit = capped(to_float(row[y]), (float)labels.o.softcap);
            // Not l - label_logit: where the label is the maximum, log_sum is the loss to the last bit.
            loss = (1 - e) * labels.weight(y) * (r.softmax.max - label_logit + log_sum);
            if (e != 0) loss += e / (float)labels.V * (stats[CLASS_SUM] * l - r.weighted);
            loss += (float)labels.o.z_loss * l * l;
        }
        losses[n] = loss;
        lse[n] = l;
        if (predicted) predicted[n] = y == IGNORED ? -1 : r.largest.index;
        if (want_largest && y >= 0 && r.largest.index == y) atomicAdd((int *)&stats[CORRECT], 1);
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

// dlogits may be logits: a thread has read its vector before it writes it.
template <typename T>
__global__ void __launch_bounds__(BLOCK)
    cross_entropy_bwd_kernel(T *dlogits, int64_t dlogits_stride, const float *__restrict__ dloss,
                             const float *__restrict__ dlse, const T *logits, int64_t stride,
                             const float *__restrict__ lse, const float *__restrict__ stats,
                             Labels labels) {
    constexpr int VEC = RowVectors<T>::VEC;
    float cap = (float)labels.o.softcap;
    for (int64_t n = blockIdx.x; n < labels.N; n += gridDim.x) {
        const T *row = logits + n * stride;
        T *to = dlogits + n * dlogits_stride;
        int64_t y = labels.of(n);
        float l = lse[n];
        RowGradient g = gradient_of(labels, y, l, dloss[labels.o.reduction == REDUCE_NONE ? n : 0],
                                    dlse ? dlse[n] : 0.0f, stats);
        bool zero = g.own == 0 && g.other == 0 && g.smooth == 0; // even where logits are infinite
        RowVectors<T> vectors(row, labels.V);
        bool same_lead = (uintptr_t)to % 16 == (uintptr_t)row % 16;
        for (int64_t k = threadIdx.x; k < vectors.count; k += BLOCK) {
            float z[VEC], d[VEC];
            vectors.load_or_pad(z, row, k);
            int64_t first = vectors.first(k);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float x = capped(z[j], cap), p = expf(x - l);
                d[j] = g.own * (first + j == y ? p - 1 : p) + g.other * p;
                if (g.smooth != 0 && first + j >= 0 && first + j < labels.V)
                    d[j] -= g.smooth * labels.weight(first + j);
                if (cap != 0) d[j] *= 1 - x / cap * (x / cap);
                if (zero) d[j] = 0;
            }
            if (same_lead && vectors.whole(k)) {
                store<T, VEC>(to + first, d);
                continue;
            }
#pragma unroll
            for (int j = 0; j < VEC; j++)
                if (first + j >= 0 && first + j < labels.V) to[first + j] = from_float<T>(d[j]);
        }
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
                       Tensor *predicted, Tensor *stats, const Tensor *logits, const Labels &labels,
                       const Tensor *num_items, void *stream) {
    const char *error = launch(cross_entropy_stats_kernel, 1, BLOCK, 0, stream, floats(stats),
                               labels, floats(num_items));
    if (error) return error;
    error = launch(cross_entropy_fwd_kernel<T>, labels.N < INT32_MAX ? labels.N : INT32_MAX, BLOCK,
                   0, stream, floats(losses), floats(lse),
                   predicted ? (int64_t *)predicted->data : nullptr, floats(stats),
                   (const T *)logits->data, logits->stride[0], labels, accuracy || predicted);
    if (error || (!loss && !accuracy)) return error;
    return launch(cross_entropy_reduce_kernel, 1, BLOCK, 0, stream, floats(loss), floats(accuracy),
                  floats(losses), floats(lse), floats(stats), labels);
}

template <typename T>
static const char *bwd(Tensor *dlogits, Tensor *stats, const Tensor *dloss, const Tensor *dlse,
                       const Tensor *logits, const Labels &labels, const Tensor *num_items,
                       const Tensor *lse, void *stream) {
    const char *error = launch(cross_entropy_stats_kernel, 1, BLOCK, 0, stream, floats(stats),
                               labels, floats(num_items));
    if (error) return error;
    return launch(cross_entropy_bwd_kernel<T>, labels.N < INT32_MAX ? labels.N : INT32_MAX, BLOCK,
                  0, stream, (T *)dlogits->data, dlogits->stride[0], floats(dloss), floats(dlse),
                  (const T *)logits->data, logits->stride[0], floats(lse), floats(stats), labels);
}

extern "C" const char *cross_entropy_fwd_cuda(Tensor *loss, Tensor *losses, Tensor *lse,
                                              Tensor *accuracy, Tensor *predicted, Tensor *stats,
                                              const Tensor *logits, const Tensor *target,
                                              const Tensor *class_weight, const Tensor *num_items,
                                              const LossOptions *options, void *stream) {
    Labels labels = labels_of(target, class_weight, logits, options);
    BY_DTYPE(logits->dtype, fwd<T>(loss, losses, lse, accuracy, predicted, stats, logits, labels,
                                   num_items, stream))
}

extern "C" const char *cross_entropy_bwd_cuda(Tensor *dlogits, Tensor *stats, const Tensor *dloss,
                                              const Tensor *dlse, const Tensor *logits,
                                              const Tensor *target, const Tensor *class_weight,
                                              const Tensor *num_items, const Tensor *lse,
                                              const LossOptions *options, void *stream) {
    Labels labels = labels_of(target, class_weight, logits, options);
    BY_DTYPE(logits->dtype,
             bwd<T>(dlogits, stats, dloss, dlse, logits, labels, num_items, lse, stream))
}
