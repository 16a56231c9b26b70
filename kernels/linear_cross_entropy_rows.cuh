// linear_cross_entropy_rows.cuh: the kernel that scores rows of logits and writes their gradient
// over them. What this is a part of: linear_cross_entropy.cu.
//
// A row of a large vocabulary is more than one block can keep beside others: a cluster of blocks
// has one row, each block a share of it, and they exchange their sums. A row that does not fit is
// read twice.
// Two ideas save instructions:
//   1. On sm_90 and newer one bulk copy a block loads its share; below, each thread's cp.async.
//   2. Of a plain row that fits the maximum comes first, by packed instructions (two 16-bit logits
//      each), so that the sum of exponentials is not scaled anew as it grows.
#pragma once
#include "linear_cross_entropy_share.cuh"

// ---- The sums of a row --------------------------------------------------------------------------

// The larger of the values in two words, or of their halves; NaN gives way.
template <typename T> __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4)
        return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
    return IS_BF16<T> ? max_bf16x2(a, b) : max_f16x2(a, b);
}

// The largest logit of this warp's vectors; NaN gives way.
template <typename T> __device__ __forceinline__ float largest_of(const Share<T, true> &share) {
    constexpr int VEC = RowVectors<T>::VEC;
    float none[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) none[j] = -INFINITY;
    Packed<T, VEC> top = pack<T, VEC>(none);
#pragma unroll 4
    for (int k = share.begin + threadIdx.x; k < share.end; k += THREADS) {
        Packed<T, VEC> z = share.get(k);
#pragma unroll
        for (int i = 0; i < 4; i++) top.word[i] = larger<T>(top.word[i], z.word[i]);
    }
#pragma unroll
    for (int i = 1; i < 4; i++) top.word[0] = larger<T>(top.word[0], top.word[i]);
    return lanes_max<32>(fmaxf(top[0], top[1])); // fp32: top[1] is no larger
}

// The sum of exp(z - shift), by halves.
template <typename T, int VEC>
__device__ __forceinline__ float exp_sum(const Packed<T, VEC> &z, float shift) {
    float e[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) e[j] = exp_of<T>(z[j], shift);
#pragma unroll
    for (int n = VEC / 2; n > 0; n /= 2)
#pragma unroll
        for (int j = 0; j < n; j++) e[j] += e[j + n];
    return e[0];
}

// The sums of this warp's vectors of a plain row: first the largest logit, which costs little, so
// that nothing is scaled anew afterwards. Its term is left out where it stands; a vector that has
// none like it adds up to less than 1, most often.
template <typename T> __device__ __forceinline__ RowSums warp_sums(const Share<T, true> &share) {
    constexpr int VEC = RowVectors<T>::VEC;
    RowSums r;
    float top = largest_of(share), shift = top == -INFINITY ? 0.0f : top, rest = 0;
    int largest = -1; // where this lane left out a term
#pragma unroll 2
    for (int k = share.begin + threadIdx.x; k < share.end; k += THREADS) {
        Packed<T, VEC> z = share.get(k);
        float part = exp_sum(z, shift);
        if (!(part < 1)) { // NaN too: inf - inf
            part = 0;
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                if (largest < 0 && z[j] == top) largest = share.vectors.first(k) + j;
                else part += exp_of<T>(z[j], shift);
            }
        }
        rest += part;
    }
    // One term stays out of the warp's sum.
    int left_out = __popc(__ballot_sync(~0u, largest >= 0));
    r.softmax.max = top, r.softmax.rest = warp_sum(rest) + (float)max(left_out - 1, 0);
    r.largest = first_index(largest < 0 ? NONE : largest);
    return r;
}

// The same vector by vector, in one pass, for rows that are not kept or not plain.
template <typename T, bool PLAIN, bool KEEP>
__device__ __forceinline__ RowSums warp_sums(const Share<T, KEEP> &share, const Labels &labels,
                                             bool want_largest, float origin) {
    constexpr int VEC = RowVectors<T>::VEC;
    RowSums r;
    share.each([&](int k) {
        Packed<T, VEC> loaded = share.get(k);
        float z[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) z[j] = loaded[j];
        add_vector<T, PLAIN>(r, z, share.vectors.first(k), labels, want_largest, origin);
    });
    return join_lanes<32, PLAIN>(r);
}

// ---- One row ------------------------------------------------------------------------------------

// d z_y. Where y's logit is the largest, p - 1 is no difference of nearly equal numbers so.
template <bool PLAIN>
__device__ __forceinline__ float gradient_at_label(float z, int64_t y, const Softmax &s,
                                                   float inverse, const RowGradient &g,
                                                   const Labels &labels) {
    float p = expf(z - s.max) * inverse, less_one = z == s.max ? -s.rest * inverse : p - 1;
    return finished<PLAIN>(g.own * less_one + g.other * p, z, y, g.smooth, labels);
}

// The scores of one row, where scores.losses is given, and with `gradient` the logits' gradient in
// their place. One kernel for both, so that the scores have the same bits with a gradient and
// without. Row i of logits has label first_row + i. dloss NULL: 1; dlse or NULL.
template <typename T, bool PLAIN, bool KEEP>
__global__ void __launch_bounds__(THREADS, PLAIN ? PLAIN_RESIDENT : RESIDENT)
    linear_cross_entropy_kernel(T *logits, int64_t stride, int64_t first_row, Labels labels,
                                Scores scores, const float *__restrict__ dloss,
                                const float *__restrict__ dlse, bool gradient) {
    constexpr int VEC = RowVectors<T>::VEC;
    __shared__ Exchange exchange;
    uint32_t rank = cluster_rank(), size = cluster_size();
    int64_t i = blockIdx.x >> (__ffs(size) - 1);
    T *row = logits + i * stride;
    Share<T, KEEP> share(row, labels.V, rank, size);
    share.start(); // before anything that waits for memory
    exchange.begin(size);
    int64_t n = first_row + i, y = labels.of(n);
    float cap = PLAIN ? 0 : (float)labels.o.softcap;
    float label_logit = y >= 0 ? capped(to_float(row[y]), cap) : 0;
    float origin = PLAIN ? 0 : origin_of(row, labels);
    float upstream = dloss ? dloss[labels.o.reduction == REDUCE_NONE ? n : 0] : 1;
    RowGradient g = gradient_of(labels, y, upstream, dlse ? dlse[n] : 0, scores.stats);

    share.wait();
    RowSums r;
    if constexpr (PLAIN && KEEP) r = warp_sums(share);
    else r = warp_sums<T, PLAIN>(share, labels, scores.want_largest, origin);
    // Here the label's logit has come: after join() some block writes its gradient in that place.
    label_logit = __shfl_sync(~0u, label_logit, 0);
    r = exchange.join<PLAIN>(r, rank, size);
    float top = r.softmax.max, log_sum = top == INFINITY ? NAN : log1pf(r.softmax.rest);
    float inverse = top == INFINITY ? NAN : 1 / (1 + r.softmax.rest);
    if (scores.losses && rank == 0 && threadIdx.x == 0)
        scores.write<PLAIN, float>(n, y, labels, top, log_sum, label_logit, r, origin);
    if (!gradient) return;

    g.finish(top + log_sum);
    bool zero = g.zero(); // even where logits are infinite
    float factor = (g.own + g.other) * inverse;
    if (zero) share.write([](float, int) { return 0.0f; });
    else
        share.write([&](float z, int v) {
            z = capped(z, cap);
            return finished<PLAIN>(factor * exp_of<T>(z, top), z, v, g.smooth, labels);
        });
    int own = y >= 0 && !zero ? ((int)y + share.vectors.lead) / VEC - share.begin : -1;
    if (own >= 0 && own < share.end - share.begin && own % THREADS == threadIdx.x)
        row[y] =
            from_float<T>(gradient_at_label<PLAIN>(label_logit, y, r.softmax, inverse, g, labels));
}
