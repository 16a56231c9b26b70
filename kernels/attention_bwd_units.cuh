// attention_bwd_units.cuh: the main kernel of attention's backward finishes the gradients itself:
// it rounds the sums of dQ and adds up the shares of dK and dV while later heads are computed.
// What this is a part of: attention_bwd.cu.
//
// A line is a query head of a batch entry. The lines are computed in their order, some together.
//   1. The writer adds 1 to the line's count of tiles when a tile's dQ, dK and dV are in memory.
//   2. do_units() draws units of work by a ticket: DQ_ROWS rows of dQ after another, of the lines
//      of a group of query heads, then dK and dV of that group; and waits until all tiles of the
//      lines that it needs are done.
//   3. It leaves zeros where it has read sums of dQ, and adds 1 to the line's count of dQ's units.
//   4. The writer of line n + places, whose sums take the place of those of line n, waits for all
//      of its units.
// Nobody waits for ever: all tiles of a line are drawn before any of line n + places (for
// places >= together, see places_of()), a block of threads computes its tiles in the order drawn,
// units are drawn in the order of lines, and a unit waits for tiles alone.
// Two warps do this all the time, by way of shared memory, for they have few registers to load to;
// so do the consumers when there are no more tiles.
#pragma once
#include "attention_bwd.cuh"

constexpr int DQ_ROWS = 16;    // of a unit of dQ
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
    const int *units = &p.progress[before].dq_units;
    while (load_acquire(units) < parts_of(p.problem.Sq, DQ_ROWS)) __nanosleep(POLL);
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

// dQ = scale * its sums, rows first .. of a line, by a warp.
template <typename T, int D>
__device__ __forceinline__ void finish_dq_rows(const BwdParams &p, int buffer, int line,
                                               int first) {
    static_assert(DQ_ROWS * D * 4 <= UNIT_BUFFER, "");
    const int rows = min(DQ_ROWS, p.problem.Sq - first), pieces = rows * (D / 4);
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
// A key line is a key head of a batch entry.
template <typename T, int D>
__device__ __forceinline__ void sum_key_shares(const BwdParams &p, int buffer, int which,
                                               int key_line, int first) {
    const int rows = min(p.units.key_rows, p.problem.Sk - first), bytes = p.units.share_bytes;
    const int b = key_line / p.problem.Hk, head = key_line - b * p.problem.Hk;
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
        for (int g = 0; g < p.group_size; g++, share += p.problem.D * 2) {
            const Packed<T, 4> x = load_packed<T, 4>((const T *)share);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += x[j];
        }
        store<T, 4>(to, sum);
        to += lane.AT_ONCE * p.units.keys[which].row;
    }
    __syncwarp();
}

__device__ __forceinline__ unsigned draw_unit(const BwdParams &p) {
    return threadIdx.x % 32 == 0 ? next_number(p.units.next) : 0;
}

// All lanes of a warp, with UNIT_BUFFER bytes of its own, until there are no more units.
template <typename T, int D>
__device__ __forceinline__ void do_units(const BwdParams &p, int buffer) {
    int known = -1; // the last of what it has waited for: a line, or all lines of a group
#pragma unroll 1
    for (;;) {
        const unsigned unit = __shfl_sync(~0u, draw_unit(p), 0);
        if (unit >= p.units.count) return;
        const int key_line = unit / p.units.of_group, rest = unit - key_line * p.units.of_group;
        const int of_dq = parts_of(p.problem.Sq, DQ_ROWS), of_lines = p.group_size * of_dq;
        const bool is_dq = rest < of_lines;
        const int line = key_line * p.group_size + (is_dq ? rest / of_dq : 0);
        const int needed = is_dq ? line : p.units.lines + key_line;
        if (needed != known) wait_for_lines(p, line, is_dq ? 1 : p.group_size);
        known = needed;
        if (is_dq) {
            finish_dq_rows<T, D>(p, opaque(buffer), line, rest % of_dq * DQ_ROWS);
            if (threadIdx.x % 32 == 0) add_release(&p.progress[line].dq_units, 1);
        } else {
            const int which = rest - of_lines >= p.units.of_keys;
            const int block = rest - of_lines - which * p.units.of_keys;
            sum_key_shares<T, D>(p, opaque(buffer), which, key_line, block * p.units.key_rows);
        }
    }
}
