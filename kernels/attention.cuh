// attention.cuh: what attention's forward and backward on Hopper share: sequences and their tiles,
// the masks, products of tiles that hold NaN behind a mask, tensor maps.
#pragma once
#include "sm90.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int OPEN = 1 << 30;    // a window without bound
constexpr int LONGEST = 1 << 29; // rows of a sequence: sums of positions and bounds fit an int
constexpr int STAGES = 2;      // of every ring: a third of K and V, or of Q and dO, exceeds 227 KB
constexpr int WARPGROUP = 128; // threads

// All of a block's shared memory, laid out by each kernel: a name that all functions know costs no
// register.
extern __shared__ __align__(1024) char shared[];

__device__ __forceinline__ uint32_t shared_at(int offset) {
    return shared_address(shared) + offset;
}

// x, the same in all lanes, known to be so: what follows from it then takes the uniform datapath,
// from which wgmma has its addresses.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Where block number `block` lies in a ring, and the parity of its barriers' phase.
struct Stage {
    int index;
    uint32_t parity;
};
__device__ __forceinline__ Stage stage_of(unsigned block) {
    return {(int)(block % STAGES), block / STAGES & 1};
}

// ---- Sequences and tiles ------------------------------------------------------------------------

// Dense: B sequences of Sq queries and Sk keys. Packed: `sequences` of them in one batch entry of
// Sq and Sk rows in all, and cu_q, cu_k say where each begins.
struct Problem {
    const int *cu_q, *cu_k; // NULL: dense
    int B, sequences, Sq, Sk, Hq, Hk, D;
    bool packed;
    int left, right; // query i sees keys i + sk - sq - left .. i + sk - sq + right
    float scale, softcap;
};

// One block of a head of a sequence: queries q0 .. q0 + sq against keys k0 .. k0 + sk of entry b.
struct Tile {
    int q0, sq, k0, sk;
    int b, head; // head < 0: no more tiles
    int from;    // the block's first row within the sequence
    int padding;
};

// What a kernel before it leaves for the persistent one, in the workspace.
struct Plan {
    unsigned next;      // the first tile that no block of threads has taken
    int tiles;          // packed: how many
    unsigned next_unit; // the first that no warp has taken (attention_bwd_units.cuh)
    int padding;
    int2 tile[1]; // packed: sequence, block
};

__host__ __device__ inline int64_t plan_capacity(int64_t rows, int64_t sequences, int64_t block) {
    int64_t most = sequences < rows ? sequences : rows;
    return rows / block + (most > 0 ? most : 0) + 2;
}

__device__ __forceinline__ int clamped(const int *cu, int at, int total) {
    return min(max(cu[at], 0), total);
}

// Rows of sequence s; the one after the last has those that belong to none.
__device__ __forceinline__ int2 rows_of(const int *cu, int s, int sequences, int total) {
    int from = clamped(cu, s, total), to = s < sequences ? clamped(cu, s + 1, total) : total;
    return make_int2(from, max(to - from, 0));
}

// Heads whose tiles run together, longest first, so that what they share stays in L2.
struct Order {
    unsigned blocks; // of a head, dense
    unsigned heads;  // B Hq, in all
    unsigned together;
    bool last_first;
};

// The tile at place `ticket` of the order; head < 0 beyond the last. `by_query`: blocks of queries.
__device__ __forceinline__ Tile tile_at(const Problem &p, const Order &order, const Plan *plan,
                                        unsigned ticket, int rows, bool by_query) {
    const unsigned heads = p.Hq;
    Tile tile = {};
    tile.head = -1;
    if (ticket >= (p.cu_q ? plan->tiles * heads : order.blocks * order.heads)) return tile;
    if (!p.cu_q) {
        unsigned section = ticket / (order.blocks * order.together);
        unsigned first = section * order.together;
        unsigned width = min(order.together, order.heads - first);
        unsigned rest = ticket - first * order.blocks, block = rest / width;
        unsigned head = first + rest - block * width;
        if (order.last_first) block = order.blocks - 1 - block;
        tile.b = head / heads, tile.head = head % heads;
        tile.sq = p.Sq, tile.sk = p.Sk, tile.from = block * rows;
        return tile;
    }
    int2 at = plan->tile[ticket / heads];
    int2 q = rows_of(p.cu_q, at.x, p.sequences, p.Sq), k = rows_of(p.cu_k, at.x, p.sequences, p.Sk);
    bool unused = at.x == p.sequences;
    tile.head = ticket % heads, tile.from = at.y * rows;
    tile.q0 = q.x, tile.sq = unused && !by_query ? 0 : q.y;
    tile.k0 = k.x, tile.sk = unused && by_query ? 0 : k.y;
    return tile;
}

// ---- Masks: which pairs of a query and a key see each other -------------------------------------

struct Range {
    int from, to;
};

__device__ __forceinline__ Range keys_seen(const Problem &p, const Tile &tile, int query) {
    int aligned = query + tile.sk - tile.sq;
    return {max(0, aligned - p.left), min(tile.sk, aligned + p.right + 1)};
}

__device__ __forceinline__ Range queries_seen(const Problem &p, const Tile &tile, int key) {
    int aligned = key - tile.sk + tile.sq;
    return {max(0, aligned - p.right), min(tile.sq, aligned + p.left + 1)};
}

// The blocks of queries or of keys that see, or are seen by, some row of a tile; and which of those
// by all of its rows.
struct Blocks {
    int first, end;
    int whole_first, whole_end;
};

__device__ __forceinline__ Blocks uniform(const Blocks &b) {
    return {uniform(b.first), uniform(b.end), uniform(b.whole_first), uniform(b.whole_end)};
}

// A thread of a consumer warpgroup.
struct Consumer {
    int group, thread;
};

// ---- Numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ float tanh_exact(float x) { // to 1e-7, absolute
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * LOG2E * x));
}

template <typename T> __device__ __forceinline__ float low_half(uint32_t pair) {
    if constexpr (IS_BF16<T>) return __uint_as_float(pair << 16);
    return __half2float(__ushort_as_half((unsigned short)(pair & 0xffff)));
}
template <typename T> __device__ __forceinline__ float high_half(uint32_t pair) {
    if constexpr (IS_BF16<T>) return __uint_as_float(pair & 0xffff0000u);
    return __half2float(__ushort_as_half((unsigned short)(pair >> 16)));
}

// Whether one of the warpgroup's BYTES (a multiple of 2048) from `at` on holds an infinity or NaN:
// an exponent of ones, whose complement is 0.
template <typename T>
__device__ __forceinline__ bool holds_not_finite(const char *at, int bytes, int thread) {
    constexpr uint32_t EXPONENTS = IS_BF16<T> ? 0x7f807f80u : 0x7c007c00u;
    uint32_t least = ~0u; // of the complements, in each half
    for (int i = thread * 16; i < bytes; i += WARPGROUP * 16) {
        uint4 x = *(const uint4 *)(at + i);
        least = __vimin3_u16x2(least, ~x.x & EXPONENTS, ~x.y & EXPONENTS);
        least = __vimin3_u16x2(least, ~x.z & EXPONENTS, ~x.w & EXPONENTS);
    }
    return !(least & 0xffffu) || !(least >> 16);
}

// ---- Products past NaN --------------------------------------------------------------------------

// The pair of columns 8 j + 2 (lane % 4) of a row of a [D / 64][ROWS][64] tile.
template <int ROWS>
__device__ __forceinline__ uint32_t pair_of(const char *tile, int row, int j, int lane) {
    int chunk = (j % 8) ^ (row % 8);
    return *(const uint32_t *)(tile + (j / 8 * ROWS + row) * 128 + chunk * 16 + lane % 4 * 4);
}

// x, of which the compiler knows nothing: what a rare path alone derives from it is then not
// computed ahead, for every path, into registers that are short.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// What wgmma computes, sum += a x with a (64, ROWS) in registers and x (ROWS, D) in shared memory,
// over the visible pairs alone: a is 0 where it is masked, but 0 times an infinity or NaN that no
// row may see is NaN. Row r of this thread's two sees rows seen[r] of x.
template <typename T, int ROWS, int N, int A>
__device__ __forceinline__ void multiply_visible(float (&sum)[N], const uint32_t (&a)[A],
                                                 const char *x, const Range (&seen)[2], int lane) {
    static_assert(A * 4 == ROWS, "");
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) {
#pragma unroll 1
        for (int i = 0; i < 16; i++) {
            int row = 16 * k + i, source = lane / 4 * 4 + i % 8 / 2;
            float factor[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t pair = __shfl_sync(~0u, i < 8 ? a[4 * k + r] : a[4 * k + 2 + r], source);
                factor[r] = i % 2 ? high_half<T>(pair) : low_half<T>(pair);
            }
#pragma unroll
            for (int j = 0; j < N / 4; j++) {
                uint32_t pair = pair_of<ROWS>(x, row, j, lane);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (row < seen[r].from || row >= seen[r].to) continue;
                    sum[4 * j + 2 * r] += factor[r] * low_half<T>(pair);
                    sum[4 * j + 2 * r + 1] += factor[r] * high_half<T>(pair);
                }
            }
        }
    }
}

// ---- Tiles in and out ---------------------------------------------------------------------------

// One thread: a [D / 64][ROWS][64] tile from row `row` of a head.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                          int row, int head, int b, uint64_t hint) {
#pragma unroll
    for (int box = 0; box < D / 64; box++)
        tma_load(to + box * ROWS * 128, map, barrier, box * 64, row, head, b, hint);
}

template <int D, int ROWS>
__device__ __forceinline__ void store_tile(const CUtensorMap *map, uint32_t from, int row, int head,
                                           int b) {
#pragma unroll
    for (int box = 0; box < D / 64; box++)
        tma_store(map, from + box * ROWS * 128, box * 64, row, head, b);
}

// The warpgroup's accumulator, rounded, into rows `first` .. of a [D / 64][ROWS][64] tile.
template <typename T, int ROWS, int N>
__device__ __forceinline__ void store_accumulator(uint32_t tile, int first, const float (&sum)[N]) {
    const int lane = threadIdx.x % 32, row = first + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        int chunk = 2 * j + lane / 16;
        uint32_t at = tile + (chunk / 8 * ROWS + row) * 128 + ((chunk % 8) ^ (row % 8)) * 16;
        store_matrices(at, pack_pair<T>(sum[8 * j], sum[8 * j + 1]),
                       pack_pair<T>(sum[8 * j + 2], sum[8 * j + 3]),
                       pack_pair<T>(sum[8 * j + 4], sum[8 * j + 5]),
                       pack_pair<T>(sum[8 * j + 6], sum[8 * j + 7]));
    }
}

// A (B, S, H, D) tensor as the kernels address it without TMA.
struct Memory {
    void *data;
    int64_t b, row, head; // strides
    template <typename T> __device__ T *at(int entry, int64_t r, int h) const {
        return (T *)data + entry * b + r * row + h * head;
    }
};

// Rows first .. first + rows of a staged tile to memory, by the warpgroup: for the last rows of a
// packed sequence, behind which the next one's lie.
template <typename T, int ROWS>
__device__ __forceinline__ void store_rows(T *to, int64_t stride, const char *tile, int first,
                                           int rows, int D) {
    const int chunks = D / 8;
    for (int i = threadIdx.x % WARPGROUP; i < rows * chunks; i += WARPGROUP) {
        int r = i / chunks, chunk = i - r * chunks, row = first + r;
        const char *from = tile + (chunk / 8 * ROWS + row) * 128 + ((chunk % 8) ^ (row % 8)) * 16;
        *(uint4 *)(to + r * stride + chunk * 8) = *(const uint4 *)from;
    }
    __syncwarp(); // wgmma and named barriers want whole warps
}

template <typename T>
__device__ __forceinline__ void zero_rows(T *to, int64_t stride, int rows, int D) {
    const int chunks = D / 8;
    for (int i = threadIdx.x % WARPGROUP; i < rows * chunks; i += WARPGROUP) {
        int r = i / chunks;
        *(uint4 *)(to + r * stride + (i - r * chunks) * 8) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
}

// ---- Host side ----------------------------------------------------------------------------------

#define BAD_STRIDES                                                                              \
    "ValueError: strides and addresses must be multiples of 16 bytes on CUDA, and no stride 0; " \
    "copy first"

#define REFUSED_MAP "RuntimeError: cuTensorMapEncodeTiled refused a tensor"
#define MANY_TILES "NotImplementedError: more than 2^31 - 1 tiles of attention; split the batch"
#define SMALL_WORKSPACE                                                                        \
    "ValueError: workspace: expected at least attention_workspace() bytes of uint8, 256-byte " \
    "aligned"

// (B, S, H, D), B = 1 where packed.
static inline Tensor as_dense(const Tensor *t) {
    Tensor view = *t;
    if (t->ndim == 4) return view;
    view.ndim = 4, view.shape[0] = 1, view.stride[0] = 0;
    for (int d = 0; d < 3; d++) view.shape[d + 1] = t->shape[d], view.stride[d + 1] = t->stride[d];
    return view;
}

static inline Memory memory_of(const Tensor *t) {
    Tensor x = as_dense(t);
    return {x.data, x.stride[0], x.stride[1], x.stride[2]};
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// libcuda is not linked to: a machine without a driver must be able to import the module.
static inline Encode tensor_map_encoder() {
    static Encode found = nullptr;
    if (Encode f = __atomic_load_n(&found, __ATOMIC_ACQUIRE)) return f;
    void *f = nullptr;
    cudaDriverEntryPointQueryResult status;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                         &status) != cudaSuccess)
        return nullptr;
    __atomic_store_n(&found, (Encode)f, __ATOMIC_RELEASE);
    return (Encode)f;
}

static inline bool has_workspace(const Tensor *workspace, int64_t bytes) {
    return workspace && workspace->dtype == U8 && workspace->ndim == 1 &&
           workspace->shape[0] >= bytes && workspace->stride[0] == 1 &&
           (uintptr_t)workspace->data % 256 == 0;
}

// What TMA and 16-byte accesses ask of the rows of a 16-bit tensor.
static inline bool has_16_byte_rows(const Tensor *t) {
    Tensor x = as_dense(t);
    for (int d = 0; d < 4; d++) {
        if (x.shape[d] == 0) return true;
    }
    for (int d = 0; d < 3; d++) {
        int64_t bytes = x.shape[d] > 1 ? 2 * x.stride[d] : 16;
        if (bytes <= 0 || bytes % 16 || bytes >= (int64_t)1 << 40) return false;
    }
    return (uintptr_t)x.data % 16 == 0;
}

// Boxes of `rows` x 64 elements of t. What the box has beyond t reads as zeros.
static inline const char *make_map(CUtensorMap *map, const Tensor *t, int rows) {
    Encode encode = tensor_map_encoder();
    if (!encode) return "RuntimeError: the CUDA driver has no cuTensorMapEncodeTiled (needs 12.0)";
    Tensor x = as_dense(t);
    *map = {};
    for (int d = 0; d < 4; d++) {
        if (x.shape[d] == 0) return nullptr; // no tile of it is ever loaded
    }
    if (!has_16_byte_rows(t)) return BAD_STRIDES;
    cuuint64_t shape[4], stride[3];
    const int order[4] = {3, 1, 2, 0}; // D, S, H, B
    for (int d = 0; d < 4; d++) shape[d] = (cuuint64_t)x.shape[order[d]];
    for (int d = 1; d < 4; d++) {
        int64_t bytes = x.shape[order[d]] > 1 ? 2 * x.stride[order[d]] : 16;
        stride[d - 1] = (cuuint64_t)bytes;
    }
    const cuuint32_t box[4] = {64, (cuuint32_t)rows, 1, 1}, step[4] = {1, 1, 1, 1};
    CUresult result = encode(
        map, x.dtype == BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        4, x.data, shape, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : REFUSED_MAP;
}

int64_t attention_bwd_workspace(const AttentionShape &shape);

// Fills the plan for blocks of `rows` rows; cu says where sequences of `total` rows begin, NULL
// where dense (attention_plan.cu).
const char *attention_plan(Plan *plan, const Problem &p, const int *cu, int total, int rows,
                           int64_t capacity, bool last_first, void *stream);

// What both directions ask of their arguments, and the problem they make.
static inline const char *set_problem(Problem *p, const Tensor *q, const Tensor *k,
                                      const Tensor *cu_q, const Tensor *cu_k, double scale,
                                      int64_t left, int64_t right, double softcap) {
    if (q->dtype != BF16 && q->dtype != F16)
        return "NotImplementedError: attention on CUDA takes bfloat16 and float16";
    Tensor a = as_dense(q), b = as_dense(k);
    if (a.shape[3] > 128 || a.shape[3] % 8)
        return "NotImplementedError: head dimensions on CUDA are multiples of 8, at most 128";
    if (a.shape[1] >= LONGEST || b.shape[1] >= LONGEST)
        return "NotImplementedError: sequences on CUDA have less than 2^29 rows";
    if (a.shape[0] * a.shape[2] >= LONGEST || (cu_q && cu_q->shape[0] >= LONGEST))
        return "NotImplementedError: batch times heads must be less than 2^29 on CUDA";
    *p = {cu_q ? (const int *)cu_q->data : nullptr, cu_k ? (const int *)cu_k->data : nullptr};
    p->B = (int)a.shape[0], p->Sq = (int)a.shape[1], p->Hq = (int)a.shape[2];
    p->Sk = (int)b.shape[1], p->Hk = (int)b.shape[2], p->D = (int)a.shape[3];
    p->packed = cu_q;
    p->sequences = cu_q ? (int)cu_q->shape[0] - 1 : p->B;
    p->left = left < 0 || left > OPEN ? OPEN : (int)left;
    p->right = right < 0 || right > OPEN ? OPEN : (int)right;
    p->scale = (float)scale, p->softcap = (float)softcap;
    // The driver encodes tensor maps in the thread's context, and a thread of autograd's may have
    // none until the runtime is told its device.
    if (cudaSetDevice(q->device) != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
    return needs_hopper(q->device);
}

// Heads whose `bytes` each fit `budget` together; whole groups that share a key head.
static inline int heads_together(int64_t budget, int64_t bytes, int group, int64_t heads) {
    int64_t n = bytes > 0 ? budget / bytes : heads;
    n = (n < 1 ? 1 : n) * group;
    return (int)(n < heads ? n : heads);
}
