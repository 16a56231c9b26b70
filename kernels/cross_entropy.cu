// cross_entropy.cu: cross-entropy of given logits (formulas: csrc/ops.h).
//
// Memory-bound: forward reads the logits once (online softmax: every thread keeps a running maximum
// and a sum scaled to it), backward reads them and writes as much. One block per row; a row's
// vectors start at the 16-byte boundary at or before it, so that any V and any stride is read in
// vectors, with guarded elements at the two ends. What the rows share (the reduction's factors) is
// computed into stats on the device: the host never waits for it. The sum of exponentials is kept
// without the largest logit's 1, and lse in two floats, so that p_y - 1, p and the loss have all
// their digits where a row is confident of its label and where its logits are large.
#include "cross_entropy.cuh"

// Blocks of the backward that must fit a multiprocessor: on Hopper as many as need no spills.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int PLAIN_RESIDENT = 4, RESIDENT = 3;
#else
constexpr int PLAIN_RESIDENT = 2, RESIDENT = 2;
#endif

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

template <typename T, bool PLAIN>
__device__ RowSums scan(const T *row, const Labels &labels, bool want_largest, float origin) {
    RowVectors<T> vectors(row, labels.V);
    RowSums r;
    for (int64_t k = threadIdx.x; k < vectors.count; k += BLOCK) {
        float z[RowVectors<T>::VEC];
        vectors.load_or_pad(z, row, k);
        add_vector<T, PLAIN>(r, z, vectors.first(k), labels, want_largest, origin);
    }
    return join_block(r);
}

template <typename T, bool PLAIN>
__global__ void __launch_bounds__(BLOCK)
    cross_entropy_fwd_kernel(Scores scores, const T *__restrict__ logits, int64_t stride,
                             Labels labels) {
    for (int64_t n = blockIdx.x; n < labels.N; n += gridDim.x) {
        const T *row = logits + n * stride;
        float origin = PLAIN ? 0 : origin_of(row, labels), label_logit = 0;
        RowSums r = scan<T, PLAIN>(row, labels, scores.want_largest, origin);
        if (threadIdx.x) continue;
        int64_t y = labels.of(n);
        if (y >= 0) label_logit = capped(to_float(row[y]), PLAIN ? 0 : (float)labels.o.softcap);
        scores.write<PLAIN, double>(n, y, labels, r.softmax.max, r.softmax.log_sum(), label_logit,
                                    r, origin);
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
        RowGradient g = gradient_of(labels, y, dloss[labels.o.reduction == REDUCE_NONE ? n : 0],
                                    dlse ? dlse[n] : 0.0f, stats);
        g.finish(high);
        bool zero = g.zero(); // even where logits are infinite
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

Labels labels_of(const Tensor *target, const Tensor *class_weight, int64_t N, int64_t V,
                 const LossOptions *o) {
    return {target->data, target->dtype == I64, floats(class_weight), N, V, *o};
}

Scores scores_of(Tensor *losses, Tensor *lse, Tensor *lse_low, Tensor *predicted, Tensor *stats,
                 const Tensor *accuracy) {
    return {floats(losses),  floats(lse),
            floats(lse_low), predicted ? (int64_t *)predicted->data : nullptr,
            floats(stats),   accuracy || predicted};
}

const char *cross_entropy_stats(const Labels &labels, Tensor *stats, const Tensor *num_items,
                                void *stream) {
    return launch(cross_entropy_stats_kernel, 1, BLOCK, 0, stream, floats(stats), labels,
                  floats(num_items));
}

const char *cross_entropy_reduce(const Labels &labels, const Scores &scores, Tensor *loss,
                                 Tensor *accuracy, void *stream) {
    if (!loss && !accuracy) return nullptr;
    return launch(cross_entropy_reduce_kernel, 1, BLOCK, 0, stream, floats(loss), floats(accuracy),
                  scores.losses, scores.lse, scores.stats, labels);
}

static int64_t blocks_of(int64_t rows) { return rows < INT32_MAX ? rows : INT32_MAX; }

template <typename T>
static const char *rows_of(const Labels &labels, const Scores &scores, const Tensor *logits,
                           void *stream) {
    auto kernel =
        is_plain(labels) ? cross_entropy_fwd_kernel<T, true> : cross_entropy_fwd_kernel<T, false>;
    return launch(kernel, blocks_of(labels.N), BLOCK, 0, stream, scores, (const T *)logits->data,
                  logits->stride[0], labels);
}

static const char *cross_entropy_rows(const Labels &labels, const Scores &scores,
                                      const Tensor *logits, void *stream) {
    BY_DTYPE(logits->dtype, rows_of<T>(labels, scores, logits, stream))
}

template <typename T>
static const char *bwd(Tensor *dlogits, Tensor *stats, const Tensor *dloss, const Tensor *dlse,
                       const Tensor *logits, const Labels &labels, const Tensor *num_items,
                       const Tensor *lse, const Tensor *lse_low, void *stream) {
    const char *error = cross_entropy_stats(labels, stats, num_items, stream);
    if (error) return error;
    auto kernel =
        is_plain(labels) ? cross_entropy_bwd_kernel<T, true> : cross_entropy_bwd_kernel<T, false>;
    return launch(kernel, blocks_of(labels.N), BLOCK, 0, stream, (T *)dlogits->data,
                  dlogits->stride[0], floats(dloss), floats(dlse), (const T *)logits->data,
                  logits->stride[0], floats(lse), floats(lse_low), floats(stats), labels);
}

extern "C" const char *cross_entropy_fwd_cuda(Tensor *loss, Tensor *losses, Tensor *lse,
                                              Tensor *accuracy, Tensor *predicted, Tensor *lse_low,
                                              Tensor *stats, const Tensor *logits,
                                              const Tensor *target, const Tensor *class_weight,
                                              const Tensor *num_items, const LossOptions *options,
                                              void *stream) {
    Labels labels = labels_of(target, class_weight, logits->shape[0], logits->shape[1], options);
    Scores scores = scores_of(losses, lse, lse_low, predicted, stats, accuracy);
    const char *error = cross_entropy_stats(labels, stats, num_items, stream);
    if (!error) error = cross_entropy_rows(labels, scores, logits, stream);
    return error ? error : cross_entropy_reduce(labels, scores, loss, accuracy, stream);
}

extern "C" const char *cross_entropy_bwd_cuda(Tensor *dlogits, Tensor *stats, const Tensor *dloss,
                                              const Tensor *dlse, const Tensor *logits,
                                              const Tensor *target, const Tensor *class_weight,
                                              const Tensor *num_items, const Tensor *lse,
                                              const Tensor *lse_low, const LossOptions *options,
                                              void *stream) {
    Labels labels = labels_of(target, class_weight, logits->shape[0], logits->shape[1], options);
    BY_DTYPE(logits->dtype,
             bwd<T>(dlogits, stats, dloss, dlse, logits, labels, num_items, lse, lse_low, stream))
}
