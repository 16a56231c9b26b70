// linear_cross_entropy_share.cuh: a row of logits among the blocks of a cluster: each one's share,
// and how their sums come together. What this is a part of: linear_cross_entropy_rows.cuh.
#pragma once
#include "cross_entropy.cuh"

// A block's threads, a power of two. Few where a cluster shares a row: what every warp does once a
// row is then done for more vectors a thread (19 instead of 10 of 151936 bf16 logits in 8 blocks).
constexpr int CLUSTER_THREADS = 128, LONE_THREADS = 256;
#if __CUDA_ARCH__ >= 900
constexpr int THREADS = CLUSTER_THREADS;
constexpr bool BULK = true; // one copy loads a block's share of a row, no instruction a vector
#else
constexpr int THREADS = LONE_THREADS;
constexpr bool BULK = false;
#endif
constexpr int WARPS = THREADS / 32;
constexpr int MOST_BLOCKS = 8; // of a cluster
// A row's bytes in one block, at most, while its cluster can still grow (to MOST_BLOCKS); beyond
// that as much as a block has.
constexpr int64_t SHARE = 48 << 10;
// Blocks a multiprocessor must hold (__launch_bounds__), whose loads in flight hide memory's
// latency: they leave a thread 64 registers, and 80 for rows that are not plain. None spills.
constexpr int PLAIN_RESIDENT = 1024 / THREADS, RESIDENT = 768 / THREADS;

// ---- Sums come together -------------------------------------------------------------------------

// An index as 32 bits, those of NONE the largest.
__device__ __forceinline__ uint32_t short_index(int64_t index) {
    return index < INT32_MAX ? (uint32_t)index : INT32_MAX;
}
__device__ __forceinline__ int64_t long_index(uint32_t index) {
    return index == INT32_MAX ? NONE : index;
}

// The least of the warp's.
__device__ __forceinline__ int64_t first_index(int64_t index) {
    return long_index(__reduce_min_sync(~0u, short_index(index)));
}

// The largest of every LANES lanes, a power of two, in each of them; NaN gives way.
template <int LANES> __device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

__device__ __forceinline__ uint4 packed(const RowSums &r) {
    return make_uint4(__float_as_uint(r.softmax.max), __float_as_uint(r.softmax.rest),
                      short_index(r.largest), __float_as_uint(r.weighted));
}

__device__ __forceinline__ RowSums unpacked(uint4 p) {
    RowSums r;
    r.softmax.max = __uint_as_float(p.x), r.softmax.rest = __uint_as_float(p.y);
    r.largest = long_index(p.z);
    r.weighted = __uint_as_float(p.w);
    return r;
}

// The sums of every LANES lanes, a power of two, in each of them: what the first of those with the
// largest logit has, and the others' terms beside it. Beyond LANES lanes the same ones again.
template <int LANES, bool PLAIN> __device__ __forceinline__ RowSums join_lanes(RowSums r) {
    float top = lanes_max<LANES>(r.softmax.max);
    bool has_top = r.softmax.max == top;
    int first = __ffs(__ballot_sync(~0u, has_top)) - 1; // -1: all are NaN
    float rest = r.softmax.rest;
    if ((int)(threadIdx.x % LANES) != first) rest = ratio(r.softmax.max, top) * (1 + rest);
    r.largest = first_index(has_top ? r.largest : NONE);
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        rest += __shfl_xor_sync(~0u, rest, lane);
        if (!PLAIN) r.weighted += __shfl_xor_sync(~0u, r.weighted, lane);
    }
    r.softmax.max = top, r.softmax.rest = rest;
    return r;
}

// Those of no logit: nothing beside any other.
__device__ __forceinline__ RowSums no_sums() {
    RowSums r;
    r.softmax.rest = -1; // and its maximum's own term, which is 1
    return r;
}

// How a row's sums come together: lanes by shuffles, warps and then blocks by shared memory. Every
// block of a cluster sends its sums to all; whoever has those of all blocks knows too that they
// have read their shares of the row, which may be overwritten from then on.
struct Exchange {
    uint4 of_warp[WARPS], of_block[MOST_BLOCKS];
    uint64_t inbox;

    // By all threads, as early as can be: join() then need not wait for blocks that start late.
    __device__ __forceinline__ void begin(uint32_t size) {
        if (size == 1) return;
        if (threadIdx.x == 0) open_inbox(&inbox, size * sizeof *of_block);
        cluster_arrive();
    }

    // The row's sums, in every thread of the cluster, from those of its warps.
    template <bool PLAIN>
    __device__ __forceinline__ RowSums join(RowSums r, uint32_t rank, uint32_t size) {
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) of_warp[warp] = packed(r);
        __syncthreads();
        if (size == 1) return join_lanes<WARPS, PLAIN>(unpacked(of_warp[lane % WARPS]));
        cluster_wait(); // all inboxes are open
        if (warp == 0) {
            r = join_lanes<WARPS, PLAIN>(unpacked(of_warp[lane % WARPS]));
            if (lane < size) send(&of_block[rank], &inbox, lane, packed(r));
        }
        wait_for_inbox(&inbox);
        lane %= MOST_BLOCKS;
        return join_lanes<MOST_BLOCKS, PLAIN>(lane < size ? unpacked(of_block[lane]) : no_sums());
    }
};

// A block's share of a row: its vectors begin .. end - 1, each used by one thread alone. KEEP: in
// shared memory; else read again for each use. The row's first and last vectors may be edges, of
// which a part lies outside.
template <typename T, bool KEEP> struct Share {
    static constexpr int VEC = RowVectors<T>::VEC;
    T *row;
    RowVectors<T, int> vectors;
    int begin, end;
    uint4 *kept;
    uint64_t *inbox; // of the bulk copy

    __device__ __forceinline__ Share(T *row, int64_t V, uint32_t rank, uint32_t size)
        : row(row), vectors(row, V) {
        extern __shared__ uint4 shared[];
        __shared__ uint64_t arrived;
        int share = (vectors.count + size - 1) >> (__ffs(size) - 1); // size: a power of two
        begin = rank * share, end = min(begin + share, vectors.count);
        kept = shared, inbox = &arrived;
    }

    // f(k) for each of this thread's vectors.
    template <typename F> __device__ __forceinline__ void each(F f) const {
        for (int k = begin + threadIdx.x; k < end; k += THREADS) f(k);
    }
    // The same for the whole ones, without a test of each.
    template <typename F> __device__ __forceinline__ void each_whole(F f) const {
        int k = begin + threadIdx.x, last = whole_end();
        if (k < whole_begin()) k += THREADS;
#pragma unroll 4
        for (; k < last; k += THREADS) f(k);
    }
    __device__ __forceinline__ int whole_begin() const { return max(begin, vectors.lead > 0); }
    __device__ __forceinline__ int whole_end() const {
        return min(end, (vectors.V + vectors.lead) / VEC);
    }
    template <typename F> __device__ __forceinline__ void each_edge(F f) const {
        int last = vectors.count - 1;
        if (vectors.lead == 0 && vectors.V % VEC == 0) return; // most often
#pragma unroll 1
        for (int k = 0; k <= last; k += max(last, 1))
            if (!vectors.whole(k) && owns(k)) f(k);
    }
    __device__ __forceinline__ bool owns(int k) const {
        return k >= begin && k < end && (k - begin) % THREADS == threadIdx.x;
    }

    // Loads of the vectors to keep, which get() may read after wait().
    __device__ __forceinline__ void start() const {
        if (!KEEP) return;
        const T *aligned = row - vectors.lead;
        if (BULK) {
            if (threadIdx.x == 0) start_bulk(aligned);
            __syncthreads(); // from here on anyone may wait for the inbox: it is open
        } else {
            each_whole([&](int k) { copy_async(kept + (k - begin), aligned + (int64_t)k * VEC); });
        }
        each_edge([&](int k) { store<T, VEC>((T *)(kept + (k - begin)), padded(k)); });
    }
    __device__ __forceinline__ void start_bulk(const T *aligned) const {
        int first = whole_begin(), bytes = max(whole_end() - first, 0) * 16;
        open_inbox(inbox, bytes);
        if (bytes > 0) // else the inbox has all that it was opened for
            copy_bulk(kept + (first - begin), aligned + (int64_t)first * VEC, bytes, inbox);
    }
    __device__ __forceinline__ void wait() const {
        if (!KEEP) return;
        if (BULK) wait_for_inbox(inbox);
        else wait_for_copies();
    }
    __device__ __forceinline__ Packed<T, VEC> get(int k) const {
        return KEEP ? load_packed<T, VEC>((const T *)(kept + (k - begin))) : padded(k);
    }
    __device__ __forceinline__ Packed<T, VEC> padded(int k) const {
        if (vectors.whole(k)) return load_packed<T, VEC>(row + vectors.first(k));
        float z[VEC];
        vectors.load_or_pad(z, row, k);
        return pack<T, VEC>(z);
    }

    // f(logit, index) in the row's place.
    template <typename F> __device__ __forceinline__ void write(F f) const {
        T *aligned = row - vectors.lead;
        each_whole([&](int k) {
            Packed<T, VEC> z = get(k);
            float d[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j++) d[j] = f(z[j], vectors.first(k) + j);
            store_whole(aligned + (int64_t)k * VEC, pack<T, VEC>(d).word);
        });
        each_edge([&](int k) {
            Packed<T, VEC> z = get(k);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                int v = vectors.first(k) + j;
                if (v >= 0 && v < vectors.V) row[v] = from_float<T>(f(z[j], v));
            }
        });
    }
};
