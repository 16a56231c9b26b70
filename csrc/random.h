/* random.h: the counter-based random bits of stochastic rounding, the same on the CPU and CUDA:
 * a hash of (seed, step, flat index), so that no launch, thread count or resume changes them. */
#ifndef FLATOUT_RANDOM_H
#define FLATOUT_RANDOM_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define RANDOM_INLINE static __host__ __device__ inline
#else
#define RANDOM_INLINE static inline
#endif

typedef struct {
    uint32_t inner, outer[2]; /* outer: one per word drawn for an index */
} RandomKey;

/* The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
 * generators, 2014). */
RANDOM_INLINE uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* A 32-bit permutation of low bias (constants: Wellons, Prospecting for hash functions, 2018). */
RANDOM_INLINE uint32_t mix32(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* `high`: the upper 32 bits of the flat index. */
RANDOM_INLINE RandomKey random_key(uint64_t seed, uint64_t step, uint64_t high) {
    uint64_t a = mix64(mix64(mix64(seed) ^ step) ^ high), b = mix64(a);
    RandomKey key = {(uint32_t)a, {(uint32_t)(a >> 32), (uint32_t)b}};
    return key;
}

/* Random words 0 and 1 of an index are random_word(key, random_inner(key, index), 0 or 1). */
RANDOM_INLINE uint32_t random_inner(RandomKey key, uint32_t index) {
    return mix32(index ^ key.inner);
}

RANDOM_INLINE uint32_t random_word(RandomKey key, uint32_t inner, int word) {
    return mix32(inner + key.outer[word]);
}

/* Up with the probability that makes the mean exact; `noise`: 16 random bits. A value that bf16
 * holds is kept; infinity and NaN are not rounded. */
RANDOM_INLINE uint16_t float_to_bf16_stochastic(float value, uint32_t noise) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t quiet = (bits & 0x7fffff) != 0 ? 0x400000 : 0; /* NaN stays NaN without its low bits */
    uint32_t special = bits | quiet, finite = bits + noise;
    return (uint16_t)(((bits & 0x7f800000) == 0x7f800000 ? special : finite) >> 16);
}

#endif
