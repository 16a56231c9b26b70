// cross_entropy.cuh: the rows of cross_entropy, which linear_cross_entropy runs chunk by chunk.
#pragma once
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

// Kernels for PLAIN rows, those without softcap and label smoothing, have nothing of them in their
// loops.
static bool is_plain(const Labels &labels) {
    return labels.o.softcap == 0 && labels.o.label_smoothing == 0;
}

// A row as vectors: vector k holds the elements first(k) .. first(k) + VEC - 1. Index: an integer
// that holds V.
template <typename T, typename Index = int64_t> struct RowVectors {
    static constexpr int VEC = 16 / sizeof(T);
    Index V, lead, count;

    __device__ RowVectors(const T *row, int64_t V) : V((Index)V) {
        lead = (Index)((uintptr_t)row % 16 / sizeof(T));
        count = (this->V + lead + VEC - 1) / VEC;
    }
    __device__ Index first(Index k) const { return k * VEC - lead; }
    __device__ bool whole(Index k) const { return first(k) >= 0 && first(k) + VEC <= V; }

    // Elements beyond the row's ends come as -inf.
    __device__ void load_or_pad(float (&z)[VEC], const T *row, Index k) const {
        if (whole(k)) {
            load<T, VEC>(z, row + first(k));
            return;
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            Index v = first(k) + j;
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

// One more vector of logits, the first of them z_first. `origin`: near the row's logits, so that
// large ones cancel before they are added up.
template <typename T, bool PLAIN, int VEC>
__device__ __forceinline__ void add_vector(RowSums &r, float (&z)[VEC], int64_t first,
                                           const Labels &labels, bool want_largest, float origin) {
    float before = r.softmax.max;
    if constexpr (!PLAIN) {
        float cap = (float)labels.o.softcap;
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

// The first logit, or 0 where it is not needed or infinite.
template <typename T>
__device__ __forceinline__ float origin_of(const T *row, const Labels &labels) {
    if (labels.o.label_smoothing == 0) return 0;
    float z = capped(to_float(row[0]), (float)labels.o.softcap);
    return isinf(z) ? 0 : z;
}

struct Scores {
    float *losses, *lse, *lse_low; // lse_low or NULL
    int64_t *predicted;            // or NULL
    float *stats;
    bool want_largest;

    // Row n's, by one thread. `top` is the largest logit, log_sum = log sum_v exp(z_v - top).
    template <bool PLAIN, typename F>
    __device__ __forceinline__ void write(int64_t n, int64_t y, const Labels &labels, F top,
                                          F log_sum, float label_logit, const RowSums &r,
                                          float origin) const {
        float e = PLAIN ? 0 : (float)labels.o.label_smoothing;
        float l = (float)(top + log_sum), loss = 0;
        if (y == OUT_OF_RANGE) {
            loss = NAN;
        } else if (y >= 0) {
            // Not from the rounded l: where the label is the maximum, log_sum alone is the loss.
            loss = (1 - e) * labels.weight(y) * (float)(top - label_logit + log_sum);
            if (e != 0)
                loss += e / (float)labels.V *
                        (stats[CLASS_SUM] * (float)(top - origin + log_sum) - r.weighted);
            loss += (float)labels.o.z_loss * l * l;
        }
        losses[n] = loss;
        lse[n] = l;
        if (lse_low) lse_low[n] = isfinite(l) ? (float)(top - l + log_sum) : 0.0f;
        int64_t largest = r.largest == NONE ? 0 : r.largest;
        if (predicted) predicted[n] = y == IGNORED ? -1 : largest;
        if (want_largest && y >= 0 && largest == y) atomicAdd((int *)&stats[CORRECT], 1);
    }
};

// With g and gz the gradients of the loss's first two terms and of its z term:
//   d z_v = own (p_v - [v = y]) + other p_v - smooth cw_v,  p_v = exp(z_v - lse)
// `other` has of_lse * lse as well, which finish() adds.
struct RowGradient {
    float own, other, smooth, of_lse;

    __device__ __forceinline__ void finish(float l) {
        if (of_lse != 0) other += of_lse * l;
    }
    __device__ __forceinline__ bool zero() const { return own == 0 && other == 0 && smooth == 0; }
};

__device__ __forceinline__ RowGradient gradient_of(const Labels &labels, int64_t y, float dloss,
                                                   float dlse, const float *stats) {
    if (y == OUT_OF_RANGE) return {NAN, NAN, NAN, 0};
    if (y == IGNORED) return {0, dlse, 0, 0};
    float e = (float)labels.o.label_smoothing, g = dloss * stats[SCALE];
    float gz = dloss * stats[Z_SCALE], smooth = g * e / (float)labels.V;
    return {g * (1 - e) * labels.weight(y), dlse + smooth * stats[CLASS_SUM], smooth,
            gz * 2 * (float)labels.o.z_loss};
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

// ---- Host side (cross_entropy.cu) ---------------------------------------------------------------

Labels labels_of(const Tensor *target, const Tensor *class_weight, int64_t N, int64_t V,
                 const LossOptions *o);

Scores scores_of(Tensor *losses, Tensor *lse, Tensor *lse_low, Tensor *predicted, Tensor *stats,
                 const Tensor *accuracy);

static inline float *floats(const Tensor *t) { return t ? (float *)t->data : nullptr; }

// stats, from all labels.
const char *cross_entropy_stats(const Labels &labels, Tensor *stats, const Tensor *num_items,
                                void *stream);
// loss and accuracy, each or NULL, from all rows' scores.
const char *cross_entropy_reduce(const Labels &labels, const Scores &scores, Tensor *loss,
                                 Tensor *accuracy, void *stream);
