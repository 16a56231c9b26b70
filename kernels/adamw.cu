// adamw.cu: AdamW, the global norm of gradients, scaling by a coefficient (formulas: csrc/ops.h).
//
// Memory-bound: AdamW moves 14 bytes per bf16 parameter (p, g, m, v read; p, m, v written), the
// norm 2. A whole list of tensors goes into one launch: the table of addresses and sizes is the
// kernel's parameter (at most 32,764 bytes), and every tensor is cut into chunks, so that a block
// finds its chunk by a binary search in that table. Longer lists take several launches.
//
// AdamW's chunks are small: a thread has one vector of each array, so that many short-lived blocks
// start in the order of memory. The norm and the scaling, of one array, loop over large chunks.
#include "../csrc/random.h"
#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int MAX_TENSORS = 512;     // 60 bytes each in the AdamW table: 30,728 of 32,764 bytes
constexpr int64_t CHUNK = 64 * 1024; // elements, of the norm and the scaling

// Tensor n's chunks are first[n] .. first[n + 1] - 1.
struct Chunks {
    int count; // of tensors
    int first[MAX_TENSORS + 1];
    int64_t elements[MAX_TENSORS];
};

struct Place {
    int tensor;
    int64_t from, n; // elements of the tensor
};

__device__ __forceinline__ Place place_of(const Chunks &c, int chunk, int64_t size) {
    int low = 0, high = c.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (c.first[middle] <= chunk) low = middle;
        else high = middle;
    }
    int64_t from = (int64_t)(chunk - c.first[low]) * size, left = c.elements[low] - from;
    return {low, from, left < size ? left : size};
}

// The next tensors of the list, as many as a table holds, in chunks of this size; returns the index
// behind them.
static int64_t take(Chunks *c, const TensorList *list, int64_t from, int64_t size) {
    c->count = 0, c->first[0] = 0;
    int64_t n = from, chunks = 0;
    for (; n < list->n && c->count < MAX_TENSORS; n++) {
        int64_t elements = 1;
        for (int d = 0; d < list->items[n].ndim; d++) elements *= list->items[n].shape[d];
        int64_t more = (elements + size - 1) / size;
        if (chunks + more > INT32_MAX) break;
        chunks += more;
        c->elements[c->count] = elements;
        c->first[++c->count] = (int)chunks;
    }
    return n;
}

static bool aligned(const void *p) { return (uintptr_t)p % 16 == 0; }

// ---- Global norm --------------------------------------------------------------------------------

struct NormTable {
    Chunks chunks;
    const void *data[MAX_TENSORS];
    uint8_t dtype[MAX_TENSORS];
    bool wide[MAX_TENSORS];
};

// The sum of squares of a thread's share of a chunk: at most CHUNK / BLOCK = 256 terms in float,
// and once more in double where the squares leave float's range.
template <typename T, int VEC> __device__ double sum_squares(const T *x, int64_t n) {
    float sum = 0;
    uint32_t bits = 0; // any bit of any element but its sign
    int64_t whole = n / VEC * VEC;
#pragma unroll 4
    for (int64_t i = threadIdx.x * VEC; i < whole; i += BLOCK * VEC) {
        Packed<T, VEC> v = load_packed<T, VEC>(x + i);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += v[j] * v[j];
        bits |= any_bits(v);
    }
    for (int64_t i = whole + threadIdx.x; i < n; i += BLOCK) {
        sum += to_float(x[i]) * to_float(x[i]);
        bits |= to_float(x[i]) != 0;
    }
    if (bits == 0 || (sum > 1e-30f && sum < 1e38f)) return sum;
    double wide = 0;
    for (int64_t i = threadIdx.x * VEC; i < whole; i += BLOCK * VEC)
        for (int j = 0; j < VEC; j++) wide += (double)to_float(x[i + j]) * to_float(x[i + j]);
    for (int64_t i = whole + threadIdx.x; i < n; i += BLOCK)
        wide += (double)to_float(x[i]) * to_float(x[i]);
    return wide;
}

template <typename T> __device__ double sum_squares(const void *x, Place at, bool wide) {
    const T *from = (const T *)x + at.from;
    return wide ? sum_squares<T, 16 / sizeof(T)>(from, at.n) : sum_squares<T, 1>(from, at.n);
}

// Block b takes chunks b, b + gridDim.x, ...; partial[b] is the norm of them (a norm, since squares
// of 1e30 would leave float's range), joined with what an earlier launch left there.
__global__ void __launch_bounds__(BLOCK)
    global_norm_kernel(float *__restrict__ partial, const __grid_constant__ NormTable t,
                       bool first) {
    __shared__ double part[BLOCK / 32];
    double sum = 0;
    for (int chunk = blockIdx.x; chunk < t.chunks.first[t.chunks.count]; chunk += gridDim.x) {
        Place at = place_of(t.chunks, chunk, CHUNK);
        const void *x = t.data[at.tensor];
        bool wide = t.wide[at.tensor];
        switch (t.dtype[at.tensor]) {
        case BF16: sum += sum_squares<bf16>(x, at, wide); break;
        case F16: sum += sum_squares<f16>(x, at, wide); break;
        default: sum += sum_squares<float>(x, at, wide);
        }
    }
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < BLOCK / 32; warp++) sum += part[warp];
    if (!first) sum += (double)partial[blockIdx.x] * partial[blockIdx.x];
    partial[blockIdx.x] = (float)sqrt(sum);
}

// norm and coef from the partial norms: one block, a fixed tree.
__global__ void __launch_bounds__(BLOCK)
    global_norm_final_kernel(float *norm, float *coef, const float *__restrict__ partial, int64_t P,
                             double max_norm) {
    __shared__ double part[BLOCK];
    wait_for_previous_kernel();
    double sum = 0;
    for (int64_t p = threadIdx.x; p < P; p += BLOCK) sum += (double)partial[p] * partial[p];
    part[threadIdx.x] = sum;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x) return;
    double whole = sqrt(part[0]), factor = max_norm / (whole + 1e-6);
    *norm = (float)whole;
    if (coef) *coef = (float)(factor > 1 ? 1 : factor); // NaN stays NaN
}

// ---- Scale --------------------------------------------------------------------------------------

template <typename T, int VEC> __device__ void scale_chunk(T *x, int64_t n, float factor) {
    int64_t whole = n / VEC * VEC;
#pragma unroll 4
    for (int64_t i = threadIdx.x * VEC; i < whole; i += BLOCK * VEC) {
        float v[VEC];
        load<T, VEC>(v, x + i);
#pragma unroll
        for (int j = 0; j < VEC; j++) v[j] *= factor;
        store<T, VEC>(x + i, v);
    }
    for (int64_t i = whole + threadIdx.x; i < n; i += BLOCK)
        x[i] = from_float<T>(to_float(x[i]) * factor);
}

template <typename T>
__device__ void scale_chunk(const void *x, Place at, bool wide, float factor) {
    T *from = (T *)x + at.from;
    if (wide) scale_chunk<T, 16 / sizeof(T)>(from, at.n, factor);
    else scale_chunk<T, 1>(from, at.n, factor);
}

__global__ void __launch_bounds__(BLOCK)
    scale_kernel(const __grid_constant__ NormTable t, const float *__restrict__ coef) {
    float factor = *coef;
    if (factor == 1.0f) return;
    Place at = place_of(t.chunks, blockIdx.x, CHUNK);
    const void *x = t.data[at.tensor];
    bool wide = t.wide[at.tensor];
    switch (t.dtype[at.tensor]) {
    case BF16: scale_chunk<bf16>(x, at, wide, factor); break;
    case F16: scale_chunk<f16>(x, at, wide, factor); break;
    default: scale_chunk<float>(x, at, wide, factor);
    }
}

// ---- AdamW --------------------------------------------------------------------------------------

struct AdamWTable {
    Chunks chunks;
    void *p[MAX_TENSORS], *m[MAX_TENSORS], *v[MAX_TENSORS];
    const void *g[MAX_TENSORS];
    const float *step[MAX_TENSORS];
    int64_t flat[MAX_TENSORS]; // index of the first element in the whole list; bit 63: all aligned
};
static_assert(sizeof(AdamWTable) + 256 <= 32764, "kernel parameters are at most 32,764 bytes");

constexpr int64_t WIDE = INT64_MIN; // the bit of AdamWTable::flat

struct DeviceScalars {
    const float *coef, *grad_scale, *found_inf, *lr; // each may be NULL
};

// What a tensor's elements have in common: computed by one thread.
struct Factors {
    float coef, grad_scale; // coef: negative to maximize
    float decay, beta1, beta2, eps;
    float correction, step_size; // sqrt(1 - beta2^t), lr / (1 - beta1^t)
};

// In float32 as torch's fused kernel computes them, so that the results are its own bit for bit.
__device__ Factors factors_of(float step, DeviceScalars s, const AdamWOptions &o) {
    float lr = s.lr ? *s.lr : (float)o.lr;
    float beta1 = (float)o.beta1, beta2 = (float)o.beta2;
    return {(s.coef ? *s.coef : 1.0f) * (o.maximize ? -1.0f : 1.0f),
            s.grad_scale ? *s.grad_scale : 1.0f,
            lr * (float)o.weight_decay,
            beta1,
            beta2,
            (float)o.eps,
            __fsqrt_rn(1.0f - powf(beta2, step)),
            __fdiv_rn(lr, 1.0f - powf(beta1, step))};
}

// EXACT: IEEE division and square root, where anything is stored as float32. The fast ones err by
// an ulp or two of float32, which a result rounded to 16 bits almost never shows.
template <bool EXACT> __device__ __forceinline__ float divide(float a, float b) {
    return EXACT ? __fdiv_rn(a, b) : __fdividef(a, b);
}

template <bool EXACT> __device__ __forceinline__ float square_root(float a) {
    if (EXACT) return __fsqrt_rn(a);
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(a));
    return root;
}

// Each operation is torch's fused kernel's, written out so that the compiler forms the same ones
// for vectors and for single elements.
template <bool EXACT>
__device__ __forceinline__ void update(float &p, float g, float &m, float &v, const Factors &f) {
    float grad = __fmul_rn(g, f.coef);
    if (f.grad_scale != 1.0f) grad = __fdiv_rn(grad, f.grad_scale);
    float square = __fmul_rn(grad, grad);
    if (f.decay != 0) p = __fmaf_rn(-f.decay, p, p); // or an infinite p would become NaN
    m = __fmaf_rn(f.beta1, m, __fmaf_rn(-f.beta1, grad, grad));
    v = __fmaf_rn(f.beta2, v, __fmaf_rn(-f.beta2, square, square));
    float root = divide<EXACT>(square_root<EXACT>(v), f.correction);
    p = __fsub_rn(p, divide<EXACT>(__fmul_rn(f.step_size, m), __fadd_rn(root, f.eps)));
}

// The two keys of a chunk: beyond a multiple of 2^32 the flat index has another high half.
struct Keys {
    RandomKey key[2];
    int64_t boundary; // flat indices from here on use key[1]

    __device__ const RandomKey &of(int64_t flat) const { return key[flat >= boundary]; }
    // Whether n elements from here on need both.
    __device__ bool split(int64_t flat, int n) const {
        return flat < boundary && flat + n > boundary;
    }
};

__device__ Keys keys_of(uint64_t seed, float step, int64_t flat, int64_t n) {
    uint64_t high = (uint64_t)flat >> 32;
    Keys keys = {{random_key(seed, (uint64_t)step, high)}, (int64_t)((high + 1) << 32)};
    if (flat + n > keys.boundary) keys.key[1] = random_key(seed, (uint64_t)step, high + 1);
    return keys;
}

// v as T; stochastic rounding takes 16 bits of each word, from `shift` on. Only bf16 is rounded so.
template <typename T, int VEC, bool STOCHASTIC>
__device__ __forceinline__ void store_rounded(T *to, const float (&v)[VEC],
                                              const uint32_t (&word)[VEC], int shift) {
    if constexpr (STOCHASTIC && IS_BF16<T>) {
        Vec<uint16_t, VEC> bits;
#pragma unroll
        for (int j = 0; j < VEC; j++)
            bits.v[j] = float_to_bf16_stochastic(v[j], word[j] >> shift & 0xffff);
        *reinterpret_cast<Vec<uint16_t, VEC> *>(to) = bits;
    } else {
        store<T, VEC>(to, v);
    }
}

// One vector of all four arrays, loaded before any is used.
template <typename T, typename S, int VEC, bool STOCHASTIC> struct Quad {
    Packed<T, VEC> p, g;
    Packed<S, VEC> m, v;

    __device__ void read(const T *from_p, const T *from_g, const S *from_m, const S *from_v) {
        p = load_packed<T, VEC>(from_p), g = load_packed<T, VEC>(from_g);
        m = load_packed<S, VEC>(from_m), v = load_packed<S, VEC>(from_v);
    }

    // flat: the first element's index in the whole list.
    __device__ void step(T *to_p, S *to_m, S *to_v, int64_t flat, const Factors &f,
                         const RandomKey &key) const {
        float values[VEC], avgs[VEC], squares[VEC];
        uint32_t word[2][VEC] = {};
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            values[j] = p[j], avgs[j] = m[j], squares[j] = v[j];
            update<sizeof(T) == 4 || sizeof(S) == 4>(values[j], g[j], avgs[j], squares[j], f);
            if (!STOCHASTIC) continue;
            uint32_t inner = random_inner(key, (uint32_t)(flat + j));
            word[0][j] = random_word(key, inner, 0), word[1][j] = random_word(key, inner, 1);
        }
        store_rounded<T, VEC, STOCHASTIC>(to_p, values, word[0], 0);
        store_rounded<S, VEC, STOCHASTIC>(to_m, avgs, word[1], 16);
        store_rounded<S, VEC, STOCHASTIC>(to_v, squares, word[0], 16);
    }
};

template <typename T, typename S, int VEC, bool STOCHASTIC>
__global__ void __launch_bounds__(BLOCK, STOCHASTIC || sizeof(T) == 4 ? 3 : 4)
    adamw_step_kernel(const __grid_constant__ AdamWTable t, DeviceScalars scalars, AdamWOptions o) {
    __shared__ Factors f;
    __shared__ Keys keys;
    if (scalars.found_inf && *scalars.found_inf != 0) return;
    Place at = place_of(t.chunks, blockIdx.x, BLOCK * VEC);
    T *p = (T *)t.p[at.tensor] + at.from;
    const T *g = (const T *)t.g[at.tensor] + at.from;
    S *m = (S *)t.m[at.tensor] + at.from, *v = (S *)t.v[at.tensor] + at.from;
    int64_t flat = (t.flat[at.tensor] & ~WIDE) + at.from;
    int n = (int)at.n, whole = t.flat[at.tensor] & WIDE ? n / VEC * VEC : 0, i = threadIdx.x * VEC;
    Quad<T, S, VEC, STOCHASTIC> quad;
    if (i < whole) quad.read(p + i, g + i, m + i, v + i);
    // Takes a microsecond or two, in two warps, while the loads are under way.
    if (threadIdx.x == 0) f = factors_of(*t.step[at.tensor], scalars, o);
    if (STOCHASTIC && threadIdx.x == 32) keys = keys_of(o.seed, *t.step[at.tensor], flat, at.n);
    __syncthreads();
    auto single = [&](int j) {
        Quad<T, S, 1, STOCHASTIC> one;
        one.read(p + j, g + j, m + j, v + j);
        one.step(p + j, m + j, v + j, flat + j, f, keys.of(flat + j));
    };
    if (i < whole) {
        if (!STOCHASTIC || !keys.split(flat + i, VEC))
            quad.step(p + i, m + i, v + i, flat + i, f, keys.of(flat + i));
        else
            for (int j = i; j < i + VEC; j++) single(j);
    }
    for (int j = whole + threadIdx.x; j < n; j += BLOCK) single(j);
}

// ---- Launchers ----------------------------------------------------------------------------------

static int64_t take_data(NormTable *t, const TensorList *list, int64_t from) {
    int64_t end = take(&t->chunks, list, from, CHUNK);
    for (int64_t n = from; n < end; n++) {
        t->data[n - from] = list->items[n].data;
        t->dtype[n - from] = (uint8_t)list->items[n].dtype;
        t->wide[n - from] = aligned(list->items[n].data);
    }
    return end;
}

static const char *no_double(const TensorList *list) {
    for (int64_t n = 0; n < list->n; n++)
        if (list->items[n].dtype == F64) return "NotImplementedError: float64 runs on the CPU only";
    return nullptr;
}

extern "C" const char *global_norm_cuda(Tensor *norm, Tensor *coef, Tensor *partial,
                                        const TensorList *tensors, double max_norm, void *stream) {
    const char *error = no_double(tensors);
    int64_t P = 1, n = 0;
    for (int d = 0; d < partial->ndim; d++) P *= partial->shape[d];
    NormTable table;
    do { // once for an empty list too: partial must be written
        bool first = n == 0;
        n = take_data(&table, tensors, n);
        if (!error)
            error = launch(global_norm_kernel, P, BLOCK, 0, stream, (float *)partial->data, table,
                           first);
    } while (!error && n < tensors->n);
    if (error) return error;
    return launch_after(global_norm_final_kernel, 1, BLOCK, 0, stream, (float *)norm->data,
                        coef ? (float *)coef->data : nullptr, (const float *)partial->data, P,
                        max_norm);
}

extern "C" const char *scale_cuda(const TensorList *tensors, const Tensor *coef, void *stream) {
    const char *error = no_double(tensors);
    NormTable table;
    for (int64_t n = 0; !error && n < tensors->n;) {
        n = take_data(&table, tensors, n);
        error = launch(scale_kernel, table.chunks.first[table.chunks.count], BLOCK, 0, stream,
                       table, (const float *)coef->data);
    }
    return error;
}

// Elements of a vector: 16 bytes of the wider type.
static int64_t vector_of(Dtype p, Dtype m) { return p == F32 || m == F32 ? 4 : 8; }

template <typename T, typename S>
static const char *step(const AdamWTable &t, DeviceScalars s, const AdamWOptions *o, void *stream) {
    constexpr int VEC = 16 / (sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));
    return launch(o->stochastic_rounding ? adamw_step_kernel<T, S, VEC, true>
                                         : adamw_step_kernel<T, S, VEC, false>,
                  t.chunks.first[t.chunks.count], BLOCK, 0, stream, t, s, *o);
}

// The states have the parameters' dtype or float32; float32 parameters may have bf16 states.
static const char *step_of(Dtype p, Dtype m, const AdamWTable &t, DeviceScalars s,
                           const AdamWOptions *o, void *stream) {
    if (p == BF16 && m == BF16) return step<bf16, bf16>(t, s, o, stream);
    if (p == BF16 && m == F32) return step<bf16, float>(t, s, o, stream);
    if (p == F32 && m == F32) return step<float, float>(t, s, o, stream);
    if (p == F32 && m == BF16) return step<float, bf16>(t, s, o, stream);
    if (p == F16 && m == F16) return step<f16, f16>(t, s, o, stream);
    if (p == F16 && m == F32) return step<f16, float>(t, s, o, stream);
    return "NotImplementedError: parameters and states of these dtypes run on the CPU only";
}

static const float *scalar(const Tensor *t) { return t ? (const float *)t->data : nullptr; }

extern "C" const char *adamw_step_cuda(const TensorList *p, const TensorList *g,
                                       const TensorList *m, const TensorList *v,
                                       const TensorList *steps, const Tensor *coef,
                                       const Tensor *grad_scale, const Tensor *found_inf,
                                       const Tensor *lr, const AdamWOptions *options,
                                       void *stream) {
    DeviceScalars scalars = {scalar(coef), scalar(grad_scale), scalar(found_inf), scalar(lr)};
    const char *error = nullptr;
    int64_t flat = 0, chunk = p->n ? BLOCK * vector_of(p->items[0].dtype, m->items[0].dtype) : 0;
    AdamWTable t;
    for (int64_t from = 0, end; !error && from < p->n; from = end) {
        end = take(&t.chunks, p, from, chunk);
        for (int64_t n = from; n < end; n++) {
            int64_t i = n - from;
            t.p[i] = p->items[n].data, t.g[i] = g->items[n].data;
            t.m[i] = m->items[n].data, t.v[i] = v->items[n].data;
            t.step[i] = (const float *)steps->items[n].data;
            bool wide = aligned(t.p[i]) && aligned(t.g[i]) && aligned(t.m[i]) && aligned(t.v[i]);
            t.flat[i] = flat | (wide ? WIDE : 0);
            flat += t.chunks.elements[i];
        }
        error = step_of(p->items[0].dtype, m->items[0].dtype, t, scalars, options, stream);
    }
    return error;
}
