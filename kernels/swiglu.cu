// swiglu.cu: silu(gate) * up, forward and backward (formulas: csrc/ops.h).
//
// Memory-bound: 3 elements moved per element forward, 5 backward. A thread takes one 16-byte vector
// of each operand, and a block one tile of one row: many short-lived blocks, started in the order
// of memory. Tensors that are dense throughout count as a single long row, so that no tile is
// ragged but the last.
#include "common.cuh"

constexpr int MAX_BLOCK = 1024;

struct Spot {
    int64_t row, column;
};

template <typename T> struct Matrix {
    T *data;
    int64_t stride; // in elements, between rows
    __device__ T *at(Spot s) const { return data + s.row * stride + s.column; }
};

// Where this thread's vector begins: its row, and its column or -1 beyond the row's end.
template <int VEC> __device__ __forceinline__ Spot spot(int64_t width, unsigned tiles) {
    unsigned row = blockIdx.x / tiles;
    int64_t column = ((int64_t)(blockIdx.x - row * tiles) * blockDim.x + threadIdx.x) * VEC;
    return {row, column < width ? column : -1};
}

// sigmoid in fp32. The fast forms err by a few units of fp32's last place, far below bf16's and
// fp16's; fp32 data takes the exact ones.
template <typename T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// x sigmoid(x), its exponential at most 1: the fast division gives 0 for divisors above 2^126.
template <typename T> __device__ __forceinline__ float silu(float x) {
    if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-x));
    float e = __expf(-fabsf(x));
    return __fdividef(x < 0 ? x * e : x, 1.0f + e);
}

template <typename T, int VEC>
__global__ void __launch_bounds__(MAX_BLOCK)
    swiglu_fwd_kernel(Matrix<T> y, Matrix<const T> gate, Matrix<const T> up, int64_t width,
                      unsigned tiles) {
    Spot at = spot<VEC>(width, tiles);
    if (at.column < 0) return;
    Packed<T, VEC> g = load_packed<T, VEC>(gate.at(at)), u = load_packed<T, VEC>(up.at(at));
    float out[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) out[j] = rounded<T>(silu<T>(g[j])) * u[j];
    store<T, VEC>(y.at(at), out);
}

// dgate and dup may be gate and up: a thread has read its elements before it writes them.
template <typename T, int VEC>
__global__ void __launch_bounds__(MAX_BLOCK)
    swiglu_bwd_kernel(Matrix<T> dgate, Matrix<T> dup, Matrix<const T> dy, Matrix<const T> gate,
                      Matrix<const T> up, int64_t width, unsigned tiles) {
    Spot at = spot<VEC>(width, tiles);
    if (at.column < 0) return;
    Packed<T, VEC> d = load_packed<T, VEC>(dy.at(at)), g = load_packed<T, VEC>(gate.at(at));
    Packed<T, VEC> u = load_packed<T, VEC>(up.at(at));
    float to_gate[VEC], to_up[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        float x = g[j], dout = d[j], s = sigmoid<T>(x);
        to_gate[j] = dout * u[j] * s * (1.0f + x * (1.0f - s));
        to_up[j] = dout * rounded<T>(silu<T>(x));
    }
    store<T, VEC>(dgate.at(at), to_gate);
    store<T, VEC>(dup.at(at), to_up);
}

// The operands as rows of one width; a single row where all are dense. NULL, or an error.
static const char *shape_of(const Tensor *const *t, Rows *r, int count, bool *wide, int vec) {
    bool dense = true;
    *wide = true;
    for (int i = 0; i < count; i++) {
        if (!as_rows(t[i], &r[i])) return NOT_ROWS;
        dense = dense && (r[i].stride == r[i].width || r[i].n == 1);
    }
    for (int i = 0; i < count; i++) {
        if (dense) r[i] = {1, r[i].n * r[i].width, r[i].n * r[i].width};
        *wide = *wide && vectors_of(t[i], &r[i], vec);
    }
    return nullptr;
}

// Blocks that share a row evenly.
struct Tiles {
    int64_t a_row;
    int block;
};

static Tiles tiles_of(int64_t width, int vec) {
    int64_t vectors = width / vec, tiles = (vectors + MAX_BLOCK - 1) / MAX_BLOCK;
    if (tiles == 0) return {0, 32};
    return {tiles, (int)((vectors + tiles - 1) / tiles + 31) / 32 * 32};
}

template <typename T>
static const char *fwd(Tensor *y, const Tensor *gate, const Tensor *up, void *stream) {
    constexpr int VEC = 16 / sizeof(T);
    const Tensor *t[] = {y, gate, up};
    Rows r[3];
    bool wide;
    const char *error = shape_of(t, r, 3, &wide, VEC);
    if (error) return error;
    Tiles tiles = tiles_of(r[0].width, wide ? VEC : 1);
    return launch(wide ? swiglu_fwd_kernel<T, VEC> : swiglu_fwd_kernel<T, 1>, r[0].n * tiles.a_row,
                  tiles.block, 0, stream, {(T *)y->data, r[0].stride},
                  {(const T *)gate->data, r[1].stride}, {(const T *)up->data, r[2].stride},
                  r[0].width, (unsigned)tiles.a_row);
}

template <typename T>
static const char *bwd(Tensor *dgate, Tensor *dup, const Tensor *dy, const Tensor *gate,
                       const Tensor *up, void *stream) {
    constexpr int VEC = 16 / sizeof(T);
    const Tensor *t[] = {dgate, dup, dy, gate, up};
    Rows r[5];
    bool wide;
    const char *error = shape_of(t, r, 5, &wide, VEC);
    if (error) return error;
    Tiles tiles = tiles_of(r[0].width, wide ? VEC : 1);
    return launch(wide ? swiglu_bwd_kernel<T, VEC> : swiglu_bwd_kernel<T, 1>, r[0].n * tiles.a_row,
                  tiles.block, 0, stream, {(T *)dgate->data, r[0].stride},
                  {(T *)dup->data, r[1].stride}, {(const T *)dy->data, r[2].stride},
                  {(const T *)gate->data, r[3].stride}, {(const T *)up->data, r[4].stride},
                  r[0].width, (unsigned)tiles.a_row);
}

extern "C" const char *swiglu_fwd_cuda(Tensor *y, const Tensor *gate, const Tensor *up,
                                       void *stream) {
    BY_DTYPE(gate->dtype, fwd<T>(y, gate, up, stream))
}

extern "C" const char *swiglu_bwd_cuda(Tensor *dgate, Tensor *dup, const Tensor *dy,
                                       const Tensor *gate, const Tensor *up, void *stream) {
    BY_DTYPE(gate->dtype, bwd<T>(dgate, dup, dy, gate, up, stream))
}
