// attention_bwd.cuh: what the parts of attention's backward share. What they do: attention_bwd.cu.
#pragma once
#include "attention.cuh"

constexpr int BLOCK_N = 128; // keys: dK and dV take D registers of each of 256 threads
constexpr int THREADS = 3 * WARPGROUP, GROUPS = 2;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// Bytes that a warp of do_units() reads at once: 16 rows of 128 sums.
constexpr int UNIT_BUFFER = 8 << 10;

template <int D> struct Bwd {
    // S, dP, dK and dV are 2 D / 2 + 2 BLOCK_M / 2 registers: 192.
    static constexpr int BLOCK_M = D == 128 ? 64 : 128;
    static constexpr int KEYS = BLOCK_N * D * 2, QUERIES = BLOCK_M * D * 2; // bytes of a tile
    static constexpr int DSCORES = BLOCK_M * BLOCK_N * 2, DQ_PART = 64 * 64 * 4;
    static constexpr int ROWS = BLOCK_M * 4; // bytes of lse or delta
    static constexpr int K = 0, V = K + KEYS, Q = V + KEYS, DO = Q + STAGES * QUERIES;
    static constexpr int DS = DO + STAGES * QUERIES, DQ = DS + STAGES * DSCORES;
    static constexpr int LSE = DQ + GROUPS * DQ_PART, DELTA = LSE + STAGES * ROWS;
    static constexpr int BARRIERS = DELTA + STAGES * ROWS, MAILBOX = BARRIERS + 128;
    static constexpr int UNIT_BUFFERS = MAILBOX + 128, BYTES = UNIT_BUFFERS + 2 * UNIT_BUFFER;
    static_assert(BYTES <= 227 << 10, "");
    static_assert(GROUPS * 4 * UNIT_BUFFER <= 2 * STAGES * QUERIES,
                  "the consumers' lie over Q, dO");
};

enum {
    KV_FULL,
    KV_EMPTY,
    Q_FULL,
    Q_EMPTY = 4,
    DO_FULL = 6,
    DO_EMPTY = 8,
    TILE_FULL = 10,
    TILE_EMPTY = 12,
    KEYS_READY = 14
};
constexpr int WITH_WRITER = WARPGROUP + 32; // threads that DQ_EMPTY and DQ_FULL wait for
enum { DS_READY = 1, DQ_EMPTY = 2, DQ_FULL = 4, OWN = 6, TURN_COME = 8, TURN_DONE };

// A place of the mailbox. It stays as it is until all are through with the tile, so that nobody
// needs registers for it.
struct Slot {
    Tile tile;
    Blocks blocks;
};
template <int D> __device__ __forceinline__ Slot *slot_in(const Stage &s) {
    return (Slot *)(shared + Bwd<D>::MAILBOX) + s.index;
}

static_assert(STAGES * sizeof(Slot) <= 128 && KEYS_READY + STAGES <= 16, "the room in Bwd<D>");

// Where dK or dV go: the gradient, or each query head's share of it.
struct Output {
    CUtensorMap map;
    Memory memory;
};

struct Progress {
    int tiles, dq_units; // of a line: tiles whose gradients are in memory; units of dQ finished
};

// The work of attention_bwd_units.cuh.
struct Units {
    Memory dq, keys[2];    // dK and dV
    const void *shares[2]; // of them, (B, Sk, Hq, D)
    float *sums;           // (places, Sq, width): dQ unscaled, as store_dq() has them
    unsigned *next;        // the first unit that no warp has taken
    int lines;
    int count, of_group, of_keys; // in all (0: attention_bwd_finish() does it); of a group; of dK
    int key_rows, share_bytes;    // of a unit of dK; a group's shares of one key
};

struct BwdParams {
    CUtensorMap q, k, v, dout, rows, dq;
    Output dk, dv;
    Units units;
    Progress *progress; // of every line, a query head of a batch entry
    int places;         // lines whose sums of dQ are there at a time
    Problem problem;
    Order order;
    Plan *plan;
    int copies;       // of lse and delta
    int *turn;        // (B, Hq, Sq): how many blocks of keys have added to the dQ from this row on
    int group_size;   // query heads of a key head
    bool in_order;    // deterministic: dQ's sums in a fixed order (attention_bwd_dq.cuh)
    bool store_first; // in order and dense: the first to add stores instead, over what was there
    float score_scale, log2_scale;
    float cap, slope; // from tanh to powers of 2, -1; without softcap 1, 0
};

// The workspace's parts, in bytes from its begin: a function of AttentionShape (csrc/ops.h) alone,
// of no value of a tensor and no device.
struct Workspace {
    int64_t plan, rows, turn, progress, dq, dk, dv, end;
    int64_t stride, capacity; // floats of a line of rows, tiles
    int width, copies;        // columns of dq; of lse and delta
    int64_t together, places; // lines: whose tiles run together; whose sums of dQ are there
    bool has_units;           // the main kernel finishes the gradients
};

// What attention_bwd() is given, and its workspace's memory.
struct Tensors {
    Tensor *dq, *dk, *dv;
    const Tensor *dout, *dlse, *q, *k, *v, *out, *lse;
    char *memory;
};

__device__ __forceinline__ int line_of(const BwdParams &p, const Tile &tile) {
    return tile.b * p.problem.Hq + tile.head;
}

// Whether TMA stores the 64 keys from `row` on: it leaves rows beyond the tensor alone, not those
// of the next packed sequence.
__device__ __forceinline__ bool by_tma(const BwdParams &p, const Tile &tile, int row) {
    return row < tile.sk && (row + 64 <= tile.sk || !p.problem.packed);
}

// Where store_dq() leaves, of a row of sums, a column that is a multiple of 4; the next lies beside
// it, the two after those 8 floats on.
__device__ __forceinline__ int column_of_sums(int column) {
    return column / 32 * 32 + column % 8 * 4 + column % 32 / 8 * 2;
}

// The kernels before and after the main one (attention_bwd_rows.cu).
const char *attention_bwd_rows(const BwdParams &p, const Workspace &w, const Tensors &t,
                               void *stream);
const char *attention_bwd_finish(const BwdParams &p, const Workspace &w, const Tensors &t,
                                 void *stream);
