/* cpu.c: which instruction set runs here, and how many threads the CPU ops use. */
#include "cpu.h"

#include <omp.h>
#include <pthread.h>

static int level, threads;
static _Thread_local bool serial;
static volatile int forked;

static void in_child(void) { forked = 1; }

void cpu_init(void) {
#ifdef __x86_64__
    const char *most = getenv("FLATOUT_CPU"); /* "plain" or "avx2": to test the other code paths */
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    level = avx512 ? 2 : avx2 ? 1 : 0;
    if (most && !strcmp(most, "plain")) level = 0;
    if (most && !strcmp(most, "avx2") && level > 1) level = 1;
#endif
    pthread_atfork(NULL, NULL, in_child);
}

int cpu_level(void) { return level; }

int cpu_threads(void) {
    if (forked || serial) return 1;
    return threads ? threads : omp_get_max_threads();
}

void cpu_set_threads(int count) { threads = count; }

void cpu_set_serial(bool on) { serial = on; }
