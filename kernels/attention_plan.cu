// attention_plan.cu: the order in which attention's persistent kernels take their tiles, on the
// device, which alone knows the lengths of packed sequences. O(sequences + tiles), one block.
#include "attention.cuh"
#include "sm90.cuh" // for Hopper alone, setup.py sees by this line

constexpr int BINS = 256; // of sequences by their number of tiles
constexpr int THREADS = 1024;

// One block of threads: the first tile is free; packed: lists the tiles of `rows` rows, sequence
// after sequence, those of most tiles first. The order among equals varies from run to run, which
// no result depends on. `last_first`: in a sequence too, the longest tiles of a causal
// forward, or the order in which the backward sums dQ.
static __global__ void __launch_bounds__(THREADS)
    attention_plan_kernel(Plan *plan, const int *cu, int sequences, int total, int rows,
                          int capacity, bool last_first) {
    __shared__ int start[BINS]; // first of each bin's tiles, most tiles a sequence first
    const int thread = threadIdx.x;
    let_next_kernel_start();
    if (thread == 0) plan->next = 0;
    if (!cu) return;
    if (thread < BINS) start[thread] = 0;
    __syncthreads();
    for (int s = thread; s <= sequences; s += THREADS) {
        int n = (rows_of(cu, s, sequences, total).y + rows - 1) / rows;
        if (n) atomicAdd(&start[BINS - min(n, BINS)], n);
    }
    __syncthreads();
    if (thread < 32) {
        int before = 0;
        for (int bin = thread; bin < BINS; bin += 32) {
            int count = start[bin], sum = count;
            for (int lane = 1; lane < 32; lane *= 2) {
                int other = __shfl_up_sync(~0u, sum, lane);
                if (thread >= lane) sum += other;
            }
            start[bin] = before + sum - count;
            before += __shfl_sync(~0u, sum, 31);
        }
        if (thread == 0) plan->tiles = min(before, capacity);
    }
    __syncthreads();
    for (int s = thread; s <= sequences; s += THREADS) {
        int n = (rows_of(cu, s, sequences, total).y + rows - 1) / rows;
        int at = n ? atomicAdd(&start[BINS - min(n, BINS)], n) : 0;
        for (int i = 0; i < n && at + i < capacity; i++)
            plan->tile[at + i] = make_int2(s, last_first ? n - 1 - i : i);
    }
}

const char *attention_plan(Plan *plan, const Problem &p, const int *cu, int total, int rows,
                           int64_t capacity, bool last_first, void *stream) {
    return launch(attention_plan_kernel, 1, cu ? THREADS : 32, 0, stream, plan, cu, p.sequences,
                  total, rows, (int)capacity, last_first);
}
