/* cublaslt_choice.c: which algorithm computes a product (see cublaslt.h), and the products. */
#ifdef FLATOUT_CUDA_ARCHS
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cublaslt_problem.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards everything static here */

/* The caller has the interpreter's lock, with which nobody waits for the mutex: who has the mutex
 * may wait for the GPU, and that for work which another thread has yet to launch. */
static void lock(void) {
    if (!pthread_mutex_trylock(&mutex)) return;
    PyThreadState *state = PyEval_SaveThread();
    pthread_mutex_lock(&mutex);
    PyEval_RestoreThread(state);
}

typedef struct {
    Key key;
    Algorithm algorithm; /* the heuristic's first until it is decided */
    bool decided;
    int tries;
} Choice;

static struct {
    Choice *items;
    size_t count, capacity;
} choices;

static Choice *find_choice(const Key *key) {
    for (size_t i = 0; i < choices.count; i++)
        if (!memcmp(&choices.items[i].key, key, sizeof *key)) return &choices.items[i];
    return NULL;
}

static Choice *add_choice(const Key *key) {
    if (choices.count == choices.capacity) {
        size_t capacity = choices.capacity ? 2 * choices.capacity : 32;
        Choice *items = realloc(choices.items, capacity * sizeof *items);
        if (!items) return NULL;
        choices.items = items, choices.capacity = capacity;
    }
    Choice *choice = &choices.items[choices.count++];
    memset(choice, 0, sizeof *choice);
    choice->key = *key;
    return choice;
}

enum { MOST_ROUNDS = 15, MOST_TRIES = 3, MOST_EVENTS = 2 * MOST_ROUNDS * MOST_CANDIDATES };
static const double SMALL = 1e10;    /* operations: 20 us at 500 TFLOPS */
static const double ROUNDS_MS = 80;  /* rounds go on until they have taken longer, or are MOST */
static const double ALL_SECONDS = 5; /* of all timing in this process, loading aside */
static const float HOPELESS = 1.3f;  /* times the fastest's first time */
static const float DRAW = 1.02f;     /* times the least mean: no difference that would last */
static double seconds_spent;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool tuning_is_off(void) {
    static int off = -1;
    if (off < 0) {
        const char *word = getenv("FLATOUT_GEMM_TUNE");
        off = word && !strcmp(word, "off");
    }
    return off;
}

static double operations(const Gemm *g) {
    return 2.0 * (double)g->d->shape[0] * (double)g->d->shape[1] * (double)g->a->shape[1];
}

/* The product's line in the file: everything of the key, and the machine. */
static bool file_key(char *out, size_t size, const Problem *p) {
    struct cudaDeviceProp gpu;
    int driver = 0;
    const Key *k = &p->key;
    if (cudaGetDeviceProperties(&gpu, k->device) != cudaSuccess ||
        cudaDriverGetVersion(&driver) != cudaSuccess)
        return false;
    size_t used = (size_t)snprintf(out, size, "%.200s, driver %d, cuBLASLt %zu:", gpu.name, driver,
                                   lt.GetVersion());
    const Operand *all[] = {&k->a, &k->b, &k->d};
    for (int i = 0; i < 3 && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, " %llux%llu/%lld%c%d@%lld",
                                 (unsigned long long)all[i]->rows, (unsigned long long)all[i]->cols,
                                 (long long)all[i]->ld, all[i]->transposed ? 't' : 'n',
                                 all[i]->type, (long long)all[i]->alignment);
    if (used < size)
        used += (size_t)snprintf(out + used, size - used, " beta %d bias %lld workspace %lld",
                                 k->beta, (long long)k->bias_alignment, (long long)k->workspace);
    return used < size;
}

/* The choice of this product, for the first time the file's or else the heuristic's first. */
static const char *look_up(const Problem *p, Choice **out) {
    Choice *choice = *out = find_choice(&p->key);
    if (choice) return NULL;
    Candidate first;
    if (!candidates_of(p, &first, 1) || first.status != SUCCESS)
        return "RuntimeError: cuBLASLt has no algorithm for a matrix product";
    choice = *out = add_choice(&p->key);
    if (!choice) return "MemoryError: no memory for the choice of an algorithm";
    choice->algorithm = first.algorithm;
    choice->decided = tuning_is_off() || operations(p->g) < SMALL || !p->key.workspace;
    char line[1024];
    Algorithm kept;
    if (choice->decided || !getenv("FLATOUT_GEMM_CACHE") || !file_key(line, sizeof line, p) ||
        !gemm_file_find(line, kept.data))
        return NULL;
    if (lt.MatmulAlgoCheck(p->handle, p->product, p->b, p->a, p->d, p->d, &kept, &first) ==
            SUCCESS &&
        first.workspace <= (size_t)p->key.workspace)
        choice->algorithm = kept, choice->decided = true;
    return NULL;
}

/* Candidates that are compared. */
typedef struct {
    Candidate candidate[MOST_CANDIDATES];
    int count;
    float first_ms[MOST_CANDIDATES]; /* of its one run in the comparison; 0: it is out */
    cudaEvent_t event[MOST_EVENTS];
    int events;
} Contest;

enum { ROW_A = MOST_CANDIDATES, ROW_B, CHECKSUM_ROWS };
typedef unsigned long long Sums[CHECKSUM_ROWS][3];

/* On the device, behind the part of the workspace that cuBLASLt has. */
static Sums *sums_of(const Problem *p) {
    return (Sums *)(void *)((char *)p->g->workspace->data + p->key.workspace);
}

/* At least half of the elements are finite and not 0. */
static bool is_dense(const unsigned long long *sum, const Tensor *t) {
    return 2 * (double)sum[2] >= (double)t->shape[0] * (double)t->shape[1];
}

/* Every candidate once, untimed: the first launch of a kernel loads it, for longer than it runs. */
static void load_kernels(const Contest *c, const Problem *p) {
    for (int i = 0; i < c->count; i++)
        if (c->candidate[i].status == SUCCESS) run(p, &c->candidate[i].algorithm, 0);
}

/* Every candidate once: its result's checksum and its time. False where the operands do not tell
 * algorithms apart, or where CUDA failed. */
static bool compare(Contest *c, const Problem *p) {
    const Gemm *g = p->g;
    Sums *device = sums_of(p), sums;
    bool ok = cudaMemsetAsync(device, 0, sizeof *device, p->stream) == cudaSuccess &&
              !checksum((*device)[ROW_A], g->a, p->stream) &&
              !checksum((*device)[ROW_B], g->b, p->stream);
    for (int i = 0; ok && i < c->count; i++) {
        const Algorithm *algorithm = &c->candidate[i].algorithm;
        if (p->key.beta && run(p, &c->candidate[0].algorithm, 0)) return false;
        cudaEventRecord(c->event[2 * i], p->stream);
        c->first_ms[i] = c->candidate[i].status == SUCCESS && !run(p, algorithm, p->key.beta);
        cudaEventRecord(c->event[2 * i + 1], p->stream);
        ok = !checksum((*device)[i], g->d, p->stream);
    }
    ok = ok && cudaMemcpyAsync(&sums, device, sizeof sums, cudaMemcpyDeviceToHost, p->stream) ==
                   cudaSuccess;
    if (cudaStreamSynchronize(p->stream) != cudaSuccess || !ok || !c->first_ms[0] ||
        !is_dense(sums[ROW_A], g->a) || !is_dense(sums[ROW_B], g->b) || !is_dense(sums[0], g->d))
        return false;
    for (int i = 0; i < c->count; i++) {
        bool equal = !memcmp(sums[i], sums[0], sizeof sums[i]);
        float ms = 0;
        cudaEventElapsedTime(&ms, c->event[2 * i], c->event[2 * i + 1]);
        c->first_ms[i] = c->first_ms[i] != 0 && equal ? ms : 0;
    }
    return c->first_ms[0] > 0;
}

/* Each of the candidates `in`, `rounds` times, in turn, and each time after a kernel that reads an
 * operand: in a model, too, products seldom come one straight after another. */
static bool run_rounds(const Contest *c, const Problem *p, const int *in, int count, int rounds) {
    Sums *device = sums_of(p);
    for (int n = 0; n < rounds * count; n++) {
        if (checksum((*device)[ROW_A], p->g->a, p->stream)) return false;
        cudaEventRecord(c->event[2 * n], p->stream);
        if (run(p, &c->candidate[in[n % count]].algorithm, p->key.beta)) return false;
        cudaEventRecord(c->event[2 * n + 1], p->stream);
    }
    return cudaStreamSynchronize(p->stream) == cudaSuccess;
}

/* Of the candidates within reach of the fastest, after some rounds: the first, in the heuristic's
 * order, whose mean is a draw with the least. Means, for some algorithms are slow now and then,
 * which a median hides. The comparison's run counts as a round, for long products have only one or
 * two others: what runs before it differs from what runs before theirs, but not by candidate. */
static int winner(const Contest *c, const Problem *p) {
    int in[MOST_CANDIDATES], count = 0, best = 0;
    float fastest = c->first_ms[0], sum = 0, mean[MOST_CANDIDATES] = {0};
    for (int i = 1; i < c->count; i++)
        if (c->first_ms[i] > 0 && c->first_ms[i] < fastest) fastest = c->first_ms[i];
    for (int i = 0; i < c->count; i++)
        if (c->first_ms[i] > 0 && c->first_ms[i] <= HOPELESS * fastest)
            in[count++] = i, sum += c->first_ms[i];
    int rounds = ROUNDS_MS / sum < MOST_ROUNDS - 1 ? 1 + (int)(ROUNDS_MS / sum) : MOST_ROUNDS;
    if (!run_rounds(c, p, in, count, rounds)) return 0;
    for (int n = 0; n < count; n++) mean[n] = c->first_ms[in[n]] / (float)(rounds + 1);
    for (int n = 0; n < rounds * count; n++) {
        float ms = 0;
        cudaEventElapsedTime(&ms, c->event[2 * n], c->event[2 * n + 1]);
        mean[n % count] += ms / (float)(rounds + 1);
    }
    float least = mean[0];
    for (int i = 1; i < count; i++)
        if (mean[i] < least) least = mean[i];
    while (mean[best] > DRAW * least) best++;
    return in[best];
}

/* Decides the choice, unless the operands say too little. */
static void measure(const Problem *p, Choice *choice) {
    static Contest contest;
    Contest *c = &contest;
    c->count = candidates_of(p, c->candidate, MOST_CANDIDATES);
    c->candidate[0].algorithm = choice->algorithm; /* the one that all must equal, whatever came */
    load_kernels(c, p);
    double began = now();
    for (c->events = 0; c->events < MOST_EVENTS; c->events++)
        if (cudaEventCreate(&c->event[c->events]) != cudaSuccess) break;
    if (c->events == MOST_EVENTS && c->count && compare(c, p)) {
        choice->algorithm = c->candidate[winner(c, p)].algorithm;
        choice->decided = true;
        char line[1024];
        if (getenv("FLATOUT_GEMM_CACHE") && file_key(line, sizeof line, p))
            gemm_file_add(line, choice->algorithm.data);
    }
    while (c->events) cudaEventDestroy(c->event[--c->events]);
    choice->decided = choice->decided || ++choice->tries == MOST_TRIES;
    seconds_spent += now() - began;
}

static bool is_captured(cudaStream_t stream) {
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

static bool is_empty(const Gemm *g) {
    return !g->d->shape[0] || !g->d->shape[1] || !g->a->shape[1];
}

bool gemm_is_open(const Gemm *g, void *stream) {
    if (is_empty(g) || tuning_is_off() || operations(g) < SMALL || is_captured(stream))
        return false;
    Problem p = {0};
    Choice *choice = NULL;
    Key key;
    lock();
    bool open = seconds_spent < ALL_SECONDS && !to_key(&key, g);
    if (open && !(choice = find_choice(&key)))
        open = !open_problem(&p, g, stream) && !look_up(&p, &choice);
    open = open && !choice->decided;
    close_problem(&p);
    pthread_mutex_unlock(&mutex);
    return open;
}

const char *gemm_choose(const Gemm *g, void *stream) {
    if (!gemm_is_open(g, stream)) return NULL;
    Problem p;
    Choice *choice;
    lock();
    /* Waiting is no sin while another thread captures a stream of its own. */
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const char *error = open_problem(&p, g, stream);
    if (!error) error = look_up(&p, &choice);
    if (!error && !choice->decided) {
        PyThreadState *state = PyEval_SaveThread();
        measure(&p, choice);
        PyEval_RestoreThread(state);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    close_problem(&p);
    pthread_mutex_unlock(&mutex);
    return error;
}

const char *gemm(const Gemm *g, void *stream) {
    const Tensor *d = g->d;
    if (!d->shape[0] || !d->shape[1] || (g->beta && !g->a->shape[1])) return NULL;
    if (!g->a->shape[1]) {
        if (g->bias) return "NotImplementedError: a bias beside inner dimensions of 0 on CUDA";
        size_t item = d->dtype == F32 ? 4 : 2;
        cudaError_t status =
            cudaMemset2DAsync(d->data, (size_t)d->stride[0] * item, 0, (size_t)d->shape[1] * item,
                              (size_t)d->shape[0], stream);
        return status == cudaSuccess ? NULL : cudaGetErrorString(status);
    }
    Problem p;
    Choice *choice;
    Algorithm algorithm;
    lock();
    const char *error = open_problem(&p, g, stream);
    if (!error) error = look_up(&p, &choice);
    if (!error) algorithm = choice->algorithm;
    pthread_mutex_unlock(&mutex);
    if (!error) error = run(&p, &algorithm, g->beta);
    close_problem(&p);
    return error;
}
#else
enum { BUILT_WITHOUT_CUDA };
#endif
