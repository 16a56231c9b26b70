// attention_bwd_units.cuh: the main kernel of attention's backward finishes the gradients itself:
// it rounds the sums of dQ and adds up the shares of dK and dV while later heads are computed.
// What this is a part of: attention_bwd.cu.
//
// A line is a query head of a batch entry. The lines are computed in their order, some together.
//   1. The writer adds 1 to the line's count of tiles when a tile's dQ, dK and dV are in memory.
//   2. do_units() draws units of work by a ticket: UNIT rows of dQ after another, of the lines of a
//      group of query heads, then dK and dV of that group; and waits until all tiles of the lines
//      that it needs are done.
//   3. It leaves zeros where it has read sums of dQ, and adds 1 to the line's count of units.
//   4. The writer of line n + places, whose sums take the place of those of line n, waits for all
//      of its units.
// Nobody waits for ever: all tiles of a line are drawn before any of line n + places, a block of
// threads computes its tiles in the order drawn, and a unit waits for tiles alone.
// Two warps do this all the time, by way of shared memory, for they have few registers to load to;
// so do the consumers when there are no more tiles.
#pragma once
#include "attention_bwd.cuh"

constexpr int UNIT = 16;       // rows
constexpr unsigned POLL = 500; // ns between two looks at a count

__host__ __device__ inline int parts_of(int rows, int size) { return (rows + size - 1) / size; }

// By the thread that has written the tile's dQ, dK and dV by bulk copies, or has waited for the
// consumers' zeros.
__device__ __forceinline__ void tile_is_done(const BwdParams &p, const Tile &tile) {
    bulk_wait<0>();
    fence_async();
    add_release(&p.progress[line_of(p, tile)].tiles, 1);
}

// One thread, before the tile's sums of dQ are added to.
__device__ __forceinline__ void wait_for_place(const BwdParams &p, const Tile &tile) {
    const int before = line_of(p, tile) - p.places;
    if (before < 0) return;
    const int *units = &p.progress[before].units;
    while (load_acquire(units) < parts_of(p.problem.Sq, UNIT)) __nanosleep(POLL);
    fence_async();
}

// All lanes of a warp, each for a line of its own.
__device__ __forceinline__ void wait_for_lines(const BwdParams &p, int first, int count) {
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        const int *tiles = &p.progress[first + i].tiles;
        while (load_acquire(tiles) < (int)p.order.blocks) __nanosleep(POLL);
    }
    __syncwarp();
}

// 16 bytes at a time, from memory to the warp's buffer.
__device__ __forceinline__ void copy_pieces(uint32_t to, const float4 *from, int pieces) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < pieces; i += 32) copy_async(to + 16 * i, from + i);
}

// What a lane has of a row of D elements: 4 of them from `column` on, of every AT_ONCE-th row.
template <int D> struct Lane {
    static constexpr int AT_ONCE = 128 / D;
    int thread = opaque(threadIdx.x);
    int column = thread % (D / 4) * 4, row = thread % 32 / (D / 4);
};

// Where store_dq() leaves, of a row of sums, a column that is a multiple of 4; the next lies beside
// it, the two after those 8 floats on.
__device__ __forceinline__ int column_of_sums(int column) {
    return column / 32 * 32 + column % 8 * 4 + column % 32 / 8 * 2;
}

// dQ = scale * its sums, rows first .. of a line, by a warp.
template <typename T, int D>
__device__ __forceinline__ void dq_unit(const BwdParams &p, int buffer, int line, int first) {
    static_assert(UNIT * D * 4 <= UNIT_BUFFER, "");
    const int rows = min(UNIT, p.problem.Sq - first), pieces = rows * (D / 4);
    const int64_t at = (int64_t)(line % p.places) * p.problem.Sq + first;
    float4 *sums = (float4 *)(p.units.sums + at * D);
    copy_pieces(shared_at(buffer), sums, pieces);
    wait_for_copies();
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < pieces; i += 32) sums[i] = make_float4(0, 0, 0, 0);
    __syncwarp();
    const Lane<D> lane;
    const int b = line / p.problem.Hq;
    T *to = p.units.dq.at<T>(b, first + lane.row, line - b * p.problem.Hq) + lane.column;
    const char *from = shared + buffer + lane.row * D * 4 + column_of_sums(lane.column) * 4;
#pragma unroll 1
    for (int r = lane.row; r < rows && lane.column < p.problem.D; r += lane.AT_ONCE) {
        const float2 low = *(const float2 *)from, high = *(const float2 *)(from + 32);
        const float scale = p.problem.scale;
        store<T, 4>(to, {low.x * scale, low.y * scale, high.x * scale, high.y * scale});
        from += lane.AT_ONCE * D * 4, to += lane.AT_ONCE * p.units.dq.row;
    }
    __syncwarp(); // all have read the buffer, and written
}

// dK (0) or dV (1) = the sum of the shares of a group of query heads, rows first .., by a warp.
template <typename T, int D>
__device__ __forceinline__ void keys_unit(const BwdParams &p, int buffer, int which, int group,
                                          int first) {
    const int rows = min(p.units.key_rows, p.problem.Sk - first), bytes = p.units.share_bytes;
    const int b = group / p.problem.Hk, head = group - b * p.problem.Hk;
    const char *shares = (const char *)p.units.shares[which];
    shares += (((int64_t)b * p.problem.Sk + first) * p.problem.Hk + head) * bytes;
#pragma unroll 1
    for (int r = 0; r < rows; r++, shares += (int64_t)p.problem.Hk * bytes)
        copy_pieces(shared_at(buffer + r * bytes), (const float4 *)shares, bytes / 16);
    wait_for_copies();
    __syncwarp();
    const Lane<D> lane;
    T *to = p.units.keys[which].at<T>(b, first + lane.row, head) + lane.column;
#pragma unroll 1
    for (int r = lane.row; r < rows && lane.column < p.problem.D; r += lane.AT_ONCE) {
        const char *share = shared + buffer + r * bytes + lane.column * 2;
        float sum[4] = {};
#pragma unroll 1
        for (int g = 0; g < p.group; g++, share += p.problem.D * 2) {
            const Packed<T, 4> x = load_packed<T, 4>((const T *)share);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += x[j];
        }
        store<T, 4>(to, sum);
        to += lane.AT_ONCE * p.units.keys[which].row;
    }
    __syncwarp();
}

__device__ __forceinline__ unsigned next_unit(const BwdParams &p) {
    return threadIdx.x % 32 == 0 ? next_number(p.units.next) : 0;
}

// All lanes of a warp, with UNIT_BUFFER bytes of its own, until there are no more units.
template <typename T, int D>
__device__ __forceinline__ void do_units(const BwdParams &p, int buffer) {
    int known = -1; // the last of what it has waited for: a line, or all lines of a group
#pragma unroll 1
    for (;;) {
        const unsigned unit = __shfl_sync(~0u, next_unit(p), 0);
        if (unit >= p.units.count) return;
        const int group = unit / p.units.of_group, rest = unit - group * p.units.of_group;
        const int of_dq = parts_of(p.problem.Sq, UNIT), of_lines = p.group * of_dq;
        const bool is_dq = rest < of_lines;
        const int line = group * p.group + (is_dq ? rest / of_dq : 0);
        const int needed = is_dq ? line : p.units.lines + group;
        if (needed != known) wait_for_lines(p, line, is_dq ? 1 : p.group);
        known = needed;
        if (is_dq) {
            dq_unit<T, D>(p, opaque(buffer), line, rest % of_dq * UNIT);
            if (threadIdx.x % 32 == 0) add_release(&p.progress[line].units, 1);
        } else {
            const int which = rest - of_lines >= p.units.of_keys;
            const int block = rest - of_lines - which * p.units.of_keys;
            keys_unit<T, D>(p, opaque(buffer), which, group, block * p.units.key_rows);
        }
    }
}
