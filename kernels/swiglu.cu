// swiglu.cu: silu(gate) * up, forward and backward (formulas: csrc/ops.h).
//
// Memory-bound: 3 elements moved per element forward, 5 backward. Every thread has ITEMS x 16 bytes
// of each operand in flight before the first use. One block covers a tile of one row; tensors that
// are dense throughout count as a single long row, so that no tile is ragged but the last.
#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int ITEMS = 2; // 16-byte vectors per thread and operand: 16 KB of loads a block forward

template <typename T> struct Matrix {
    T *data;
    int64_t stride; // in elements, between rows
};

// sigmoid in fp32. The fast forms err by a few units of fp32's last place, far below bf16's and
// fp16's; fp32 data takes the exact ones.
template <typename T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// silu, from its sigmoid: x * sigmoid would be -inf * 0 for x = -inf.
template <typename T> __device__ __forceinline__ float silu(float x) {
    if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-x));
    return __fdividef(x, 1.0f + __expf(-x));
}

// Where thread's item begins: its row, and its column or -1 beyond the row's end.
template <int VEC>
__device__ __forceinline__ int64_t column_of(int64_t tile, int64_t tiles, int item, int64_t width) {
    int64_t column = (tile % tiles * ITEMS + item) * (BLOCK * VEC) + threadIdx.x * VEC;
    return column < width ? column : -1;
}

template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    swiglu_fwd_kernel(Matrix<T> y, Matrix<const T> gate, Matrix<const T> up, int64_t width,
                      int64_t tiles) {
    int64_t row = blockIdx.x / tiles;
    Packed<T, VEC> g[ITEMS], u[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int64_t column = column_of<VEC>(blockIdx.x, tiles, i, width);
        if (column < 0) continue;
        g[i] = load_packed<T, VEC>(gate.data + row * gate.stride + column);
        u[i] = load_packed<T, VEC>(up.data + row * up.stride + column);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int64_t column = column_of<VEC>(blockIdx.x, tiles, i, width);
        if (column < 0) continue;
        float out[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) out[j] = rounded<T>(silu<T>(g[i][j])) * u[i][j];
        store<T, VEC>(y.data + row * y.stride + column, out);
    }
}

// dgate and dup may be gate and up: a thread has read its elements before it writes them.
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    swiglu_bwd_kernel(Matrix<T> dgate, Matrix<T> dup, Matrix<const T> dy, Matrix<const T> gate,
                      Matrix<const T> up, int64_t width, int64_t tiles) {
    int64_t row = blockIdx.x / tiles;
    Packed<T, VEC> d[ITEMS], g[ITEMS], u[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int64_t column = column_of<VEC>(blockIdx.x, tiles, i, width);
        if (column < 0) continue;
        d[i] = load_packed<T, VEC>(dy.data + row * dy.stride + column);
        g[i] = load_packed<T, VEC>(gate.data + row * gate.stride + column);
        u[i] = load_packed<T, VEC>(up.data + row * up.stride + column);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int64_t column = column_of<VEC>(blockIdx.x, tiles, i, width);
        if (column < 0) continue;
        float to_gate[VEC], to_up[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            float x = g[i][j], dout = d[i][j], s = sigmoid<T>(x);
            to_gate[j] = dout * u[i][j] * s * (1.0f + x * (1.0f - s));
            to_up[j] = dout * rounded<T>(silu<T>(x));
        }
        store<T, VEC>(dgate.data + row * dgate.stride + column, to_gate);
        store<T, VEC>(dup.data + row * dup.stride + column, to_up);
    }
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

template <typename T>
static const char *fwd(Tensor *y, const Tensor *gate, const Tensor *up, void *stream) {
    constexpr int VEC = 16 / sizeof(T);
    const Tensor *t[] = {y, gate, up};
    Rows r[3];
    bool wide;
    const char *error = shape_of(t, r, 3, &wide, VEC);
    if (error) return error;
    int64_t span = BLOCK * ITEMS * (wide ? VEC : 1), tiles = (r[0].width + span - 1) / span;
    return launch(wide ? swiglu_fwd_kernel<T, VEC> : swiglu_fwd_kernel<T, 1>, r[0].n * tiles, BLOCK,
                  0, stream, {(T *)y->data, r[0].stride}, {(const T *)gate->data, r[1].stride},
                  {(const T *)up->data, r[2].stride}, r[0].width, tiles);
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
    int64_t span = BLOCK * ITEMS * (wide ? VEC : 1), tiles = (r[0].width + span - 1) / span;
    return launch(wide ? swiglu_bwd_kernel<T, VEC> : swiglu_bwd_kernel<T, 1>, r[0].n * tiles, BLOCK,
                  0, stream, {(T *)dgate->data, r[0].stride}, {(T *)dup->data, r[1].stride},
                  {(const T *)dy->data, r[2].stride}, {(const T *)gate->data, r[3].stride},
                  {(const T *)up->data, r[4].stride}, r[0].width, tiles);
}

extern "C" const char *swiglu_fwd_cuda(Tensor *y, const Tensor *gate, const Tensor *up,
                                       void *stream) {
    BY_DTYPE(gate->dtype, fwd<T>(y, gate, up, stream))
}

extern "C" const char *swiglu_bwd_cuda(Tensor *dgate, Tensor *dup, const Tensor *dy,
                                       const Tensor *gate, const Tensor *up, void *stream) {
    BY_DTYPE(gate->dtype, bwd<T>(dgate, dup, dy, gate, up, stream))
}
